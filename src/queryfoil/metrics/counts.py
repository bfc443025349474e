"""Attack side: what the attacked images cost, from the number of the query that fooled each.

`fooled_at` (N,) int64 holds, for each image, the number of the query that first reached the attacker's goal (1: the
clean image; larger than any budget: never).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from queryfoil.metrics.inputs import Floats

NEVER = 2**62
"""`fooled_at` of an image that was never fooled."""


def _fooled_at(values: ArrayLike | Tensor, q: int) -> NDArray[np.int64]:
    fooled_at = np.asarray(values)
    if fooled_at.size and fooled_at.dtype.kind not in "iu":
        raise ValueError(f"expected fooled_at as integers, but got {fooled_at.dtype}")
    fooled_at = fooled_at.astype(np.int64)
    if fooled_at.ndim != 1 or fooled_at.size == 0 or fooled_at.min() < 1:
        raise ValueError(
            f"expected fooled_at (N,) with N >= 1 and entries >= 1, but got shape {fooled_at.shape}"
            + (f" with minimum {fooled_at.min()}" if fooled_at.size else "")
        )
    if q < 1:
        raise ValueError(f"expected a number of queries >= 1, but got {q}")
    return fooled_at


def accuracy_at(fooled_at: ArrayLike | Tensor, q: int) -> float:
    """Share of all images not fooled within q queries; q = 1 is clean accuracy (in [0, 1]).

    >>> accuracy_at([1, 5, 2**62, 2**62], 1), accuracy_at([1, 5, 2**62, 2**62], 5)
    (0.75, 0.5)
    """
    return float((_fooled_at(fooled_at, q) > q).mean())


def average_queries(fooled_at: ArrayLike | Tensor, q: int) -> float:
    """Mean queries over initially correct images, survivors counted with q (the paper's AQ).

    NaN where no image was initially correct.

    >>> average_queries([1, 5, 2**62], 100)
    52.5
    """
    fooled = _fooled_at(fooled_at, q)
    fooled = fooled[fooled > 1]
    return float(np.minimum(fooled, q).mean()) if fooled.size else float("nan")


def average_queries_of_successes(fooled_at: ArrayLike | Tensor, q: int) -> float:
    """Mean queries over the initially correct images that were fooled within q; NaN where none was.

    >>> average_queries_of_successes([1, 5, 7, 2**62], 100)
    6.0
    """
    fooled = _fooled_at(fooled_at, q)
    fooled = fooled[(fooled > 1) & (fooled <= q)]
    return float(fooled.mean()) if fooled.size else float("nan")


def success_curve(fooled_at: ArrayLike | Tensor, q: int) -> Floats:
    """Accuracy left after 1, 2, ..., q queries: (q,), never rising.

    >>> success_curve([1, 3, 2**62, 2**62], 4).tolist()
    [0.75, 0.75, 0.5, 0.5]
    """
    fooled = _fooled_at(fooled_at, q)
    counts = np.bincount(fooled[fooled <= q], minlength=q + 1)[1:]
    return np.asarray(1 - counts.cumsum() / fooled.size, dtype=np.float64)
