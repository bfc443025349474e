"""The margins that a client is shown."""

import numpy as np
import torch
from numpy.typing import NDArray

from queryfoil.oracle import as_log_scores


def shown_margins(scores: NDArray[np.float32], output: str) -> NDArray[np.float64]:
    """The lead (N,) of the first class over the second, in units of logits, of scores (N, K) of that kind.

    >>> shown_margins(np.array([[3.0, 1.0, 2.0]], np.float32), "logits")
    array([1.])
    """
    z = as_log_scores(torch.from_numpy(np.ascontiguousarray(scores)).double(), output)
    top = z.topk(2).values
    margins: NDArray[np.float64] = (top[:, 0] - top[:, 1]).numpy()
    return margins
