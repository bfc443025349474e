"""Terraces with NumPy alone: `queryfoil export scores OUT.py` writes this file with a fit's parameters in it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryfoil.deploy.numpy_scores import log_scores, show

GIVEN, SHOWN = "logits", "logits"  # kinds of the scores that come, and of those that are shown
GROUP = [0, 0, 0]  # of each class
BORDERS = [[1.0]]  # of each group: margins in units of logits
SHARES = [[[0.6], [0.9]]]  # of each group and interval: probabilities of the first places


def tables(
    group: Sequence[int], borders: Sequence[Sequence[float]], shares: Sequence[Sequence[Sequence[float]]]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Group of each class (K,), borders (G, B) and log-shares (G, B + 1, ranks + 1), the last that of all others."""
    most, rest = max(map(len, borders)), len(group) - len(shares[0][0])
    cuts = [[*own, *[np.inf] * (most - len(own))] for own in borders]
    levels = [[[*row, (1 - sum(row)) / rest] for row in [*own, *[own[-1]] * (most + 1 - len(own))]] for own in shares]
    return np.array(group), np.array(cuts).reshape(len(cuts), most), np.log(levels)


TABLES = tables(GROUP, BORDERS, SHARES)


def protect(scores: NDArray[Any]) -> NDArray[Any]:
    """Scores (N, K), floating-point, of the kind GIVEN, as they are shown (N, K), of the kind SHOWN.

    The label of each row stays, and each row is independent of the others. Half precision gives single. A row that is
    not finite, or has a probability outside [0, 1], is shown as NaN. ValueError for another number of classes or
    dimensions, or scores that are not floating-point.
    """
    with np.errstate(all="ignore"):  # what rows that are not finite would tell of
        z = log_scores(scores, GIVEN, len(GROUP))
        return show(terraced(z.astype(np.float64), *TABLES), SHOWN, z.dtype)


def terraced(z: NDArray[Any], group: NDArray[Any], borders: NDArray[Any], levels: NDArray[Any]) -> NDArray[Any]:
    """Log-shares (N, K) for log-scores in double precision; NaN for a row that is not finite."""
    ranks = levels.shape[2] - 1
    rows = np.arange(len(z))
    place, left = [], z.copy()
    for _ in range(max(ranks, 2)):
        place.append(left.argmax(1))
        left[rows, place[-1]] = -np.inf
    mine = group[place[0]]
    margin = z[rows, place[0]] - z[rows, place[1]]
    shares = levels[mine, (borders[mine] <= margin[:, None]).sum(1)]
    shown = np.repeat(shares[:, -1:], z.shape[1], 1)
    for rank in range(ranks):
        shown[rows, place[rank]] = shares[:, rank]
    shown[~np.isfinite(z).all(1)] = np.nan
    return shown
