"""User side: is the order of the classes still that of the undefended scores?

Of scores of any kind, (N, K) both, as only their order counts: logits, log-probabilities or probabilities.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from queryfoil.metrics.inputs import Bools, Floats


def _both(shown: ArrayLike | Tensor, raw: ArrayLike | Tensor) -> tuple[Floats, Floats]:
    s, r = np.asarray(shown, dtype=np.float64), np.asarray(raw, dtype=np.float64)
    if s.ndim != 2 or s.shape != r.shape or not s.size:
        raise ValueError(f"expected shown and raw scores (N, K) of the same images, but got {s.shape} and {r.shape}")
    if np.isnan(s).any() or np.isnan(r).any():
        raise ValueError("expected scores that are numbers, but got NaN")
    return s, r


def rank_kept(shown: ArrayLike | Tensor, raw: ArrayLike | Tensor, k: int | None = None) -> float:
    """Share of the images that show the first k classes in the undefended order; None: all classes. In [0, 1].

    Each of the k must be strictly above all that it was strictly above: where shown scores tie, the order is lost. Of
    classes that were tied already, any order is right.

    >>> rank_kept([[3.0, 2.0, 1.0], [3.0, 1.0, 1.0]], [[9.0, 5.0, 4.0], [9.0, 5.0, 4.0]])
    0.5
    >>> rank_kept([[3.0, 2.0, 1.0], [3.0, 1.0, 1.0]], [[9.0, 5.0, 4.0], [9.0, 5.0, 4.0]], k=1)
    1.0
    """
    s, r = _both(shown, raw)
    k = s.shape[1] if k is None else k
    if not 1 <= k <= s.shape[1]:
        raise ValueError(f"expected k from 1 to {s.shape[1]}, the number of classes, or None, but got {k}")
    return float((depth_kept(s, r) >= k).mean())


def rank_reversed(shown: ArrayLike | Tensor, raw: ArrayLike | Tensor) -> float:
    """Share of the images that show some two classes in the opposite of the undefended order. In [0, 1].

    What ties is lost (`rank_kept`), not reversed: 1 - `rank_kept` - `rank_reversed` is the share that only shows less.

    >>> rank_reversed([[3.0, 1.0, 2.0], [3.0, 1.0, 1.0]], [[9.0, 5.0, 4.0], [9.0, 5.0, 4.0]])
    0.5
    """
    return float(any_reversed(*_both(shown, raw)).mean())


def depth_kept(s: Floats, r: Floats) -> NDArray[np.int64]:
    """For each image, how many of the first classes are shown in the undefended order: (N,), 0 to K."""
    shown, below, last = _sorted_by(r, s)
    return np.asarray(np.cumprod((shown > below) | last, axis=1).sum(1), dtype=np.int64)


def any_reversed(s: Floats, r: Floats) -> Bools:
    """For each image, whether two classes are shown in the opposite of the undefended order: (N,)."""
    shown, below, _ = _sorted_by(r, s)
    return np.asarray((shown < below).any(1))


def _sorted_by(r: Floats, s: Floats) -> tuple[Floats, Floats, Bools]:
    """Shown scores in the undefended order; the highest shown of the classes strictly below; whether there are none.

    Of classes tied in the undefended scores, that comes first which is shown higher.
    """
    order = np.lexsort((-s, -r), axis=1)
    s, r = (np.take_along_axis(v, order, 1) for v in (s, r))
    below = np.full(s.shape, -np.inf)
    highest = below[:, 0]  # shown, of the classes from the next on
    for j in range(s.shape[1] - 2, -1, -1):
        highest = np.maximum(highest, s[:, j + 1])
        below[:, j] = np.where(r[:, j] > r[:, j + 1], highest, below[:, j + 1])
    return s, below, r == r[:, -1:]


def spearman(shown: ArrayLike | Tensor, raw: ArrayLike | Tensor) -> float:
    """Mean over images of Spearman's rank correlation of their class scores, ties having mean ranks. In [-1, 1].

    An image that shows all classes tied counts 0; one whose undefended classes are all tied has no order to keep and is
    left out. NaN where none is left.

    >>> spearman([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]], [[9.0, 5.0, 4.0], [9.0, 5.0, 4.0]])
    0.75
    """
    return _mean(spearman_of_images(*_both(shown, raw)))


def spearman_of_images(s: Floats, r: Floats) -> Floats:
    """Spearman's rank correlation of each image's class scores: (N,), NaN where there is no order to keep."""
    a, b = (_mean_ranks(v) for v in (s, r))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return _correlation((a * b).sum(1), (a * a).sum(1), (b * b).sum(1))


def _mean_ranks(values: Floats) -> Floats:
    """Ranks within rows, 0 to K - 1; ties have the mean of theirs."""
    n, classes = values.shape
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    steps = ordered[:, 1:] != ordered[:, :-1]
    place, edge = np.arange(classes), np.ones((n, 1), dtype=bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, steps]), place, 0), axis=1)
    last = np.where(np.hstack([steps, edge]), place, classes)
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty((n, classes))
    np.put_along_axis(ranks, order, (first + last) / 2, 1)
    return ranks


def kendall(shown: ArrayLike | Tensor, raw: ArrayLike | Tensor) -> float:
    """Mean over images of Kendall's tau-b of their class scores, which takes ties into account. In [-1, 1].

    Pairs of classes in the same order less those in the other, over all pairs. What counts 0 and what is left out: as
    with `spearman`. Takes time K^2: seconds for 1,000 images of 1,000 classes.

    >>> round(kendall([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]], [[9.0, 5.0, 4.0], [9.0, 5.0, 4.0]]), 4)
    0.6667
    """
    return _mean(kendall_of_images(*_both(shown, raw)))


def kendall_of_images(s: Floats, r: Floats) -> Floats:
    """Kendall's tau-b of each image's class scores: (N,), NaN where there is no order to keep."""
    agreeing, in_s, in_r = np.zeros((3, len(s)))
    for apart in range(1, s.shape[1]):
        a, b = (_signs(v[:, apart:], v[:, :-apart]) for v in (s, r))
        agreeing, in_s, in_r = agreeing + (a * b).sum(1), in_s + np.abs(a).sum(1), in_r + np.abs(b).sum(1)
    return _correlation(agreeing, in_s, in_r)


def _signs(a: Floats, b: Floats) -> Floats:
    """1 where a > b, -1 where a < b, else 0; infinite values, as of log-probabilities, may tie."""
    return np.subtract(a > b, a < b, dtype=np.float64)


def _correlation(product: Floats, shown: Floats, raw: Floats) -> Floats:
    """product / sqrt(shown * raw); 0 where nothing of an order is shown, NaN where there was none."""
    scale = np.sqrt(shown * raw)
    values = np.divide(product, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.asarray(np.where(raw > 0, np.clip(values, -1, 1), np.nan), dtype=np.float64)


def _mean(values: Floats) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
