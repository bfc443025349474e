"""How useful the shown scores still are to an honest user: every figure of the user side, with intervals."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from queryfoil.metrics.calibration import AT_LEAST, GAPS, binned_gap, classwise_gap, is_near, lead
from queryfoil.metrics.inputs import Bools, Floats, checked, checked_probs
from queryfoil.metrics.intervals import Estimate, bootstrap, corrected, ece_by_chance, percentiles
from queryfoil.metrics.ranks import any_reversed, depth_kept, kendall_of_images, spearman_of_images
from queryfoil.metrics.selective import SELECTION, confidence_levels, tied

NAN = float("nan")
SHARE = (0.0, 1.0)
Figure = Callable[[Floats, Bools], float]  # of confidence (N,) and whether right (N,)


def usefulness(
    probs: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    raw_probs: ArrayLike | Tensor,
    *,
    bins: int = 15,
    draws: int = 1000,
) -> dict[str, Estimate]:
    """All figures of the shown probabilities (N, K) on images of known labels (N,), each with a 95 % interval.

    `raw_probs` (N, K) are those of the undefended model on the same images; pass them for `probs` as well for the
    undefended column. docs/metrics.md says what each name means. `ece_change` and `auroc_change` are shown less
    undefended, on the same resamples (the paired bootstrap).

    Intervals are over `draws` resamples of the images, without those where a figure is undefined; those of calibration
    errors, but for `mce`, are corrected for the upward bias. NaN where there is no value (no wrong answer to tell from
    the right ones, fewer than 200 images near the boundary, k above K) or no interval (`confidence_levels`, as a
    resample repeats images; an infinite NLL). N must be at least `bins`.

    5,000 images of 10 classes take some seconds; memory is about 30 bytes an image and draw.

    >>> shown, raw = [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]], [[0.8, 0.2], [0.7, 0.3], [0.9, 0.1]]
    >>> found = usefulness(shown, [0, 0, 1], raw, bins=2)
    >>> found["auroc"].value, found["auroc_change"].value, found["rank_kept_1"].value
    (1.0, 1.0, 1.0)
    """
    (p, y), raw = checked(probs, labels), checked_probs(raw_probs)
    if raw.shape != p.shape:
        raise ValueError(f"expected probs and raw_probs of the same shape (N, K), but got {p.shape} and {raw.shape}")
    near = is_near(lead(raw), len(y))
    if draws < 1:
        raise ValueError(f"expected at least 1 draw, but got {draws}")

    rows = bootstrap(len(y), draws)
    counts = np.stack([np.bincount(row, minlength=len(y)) for row in rows]).astype(np.float64)
    figures = {name: _with_bins(gap, bins) for name, gap in GAPS.items()} | SELECTION
    column, undefended = _Column(p, y, rows), _Column(raw, y, rows)
    shown = {name: column.figure(f) for name, f in figures.items()}
    return {
        **{name: _mean(values, counts) for name, values in _right(p, y).items()},
        **{name: _estimate(*shown[name], None if name == "mce" else SHARE) for name in GAPS},
        "ece_by_chance": ece_by_chance(p, bins, draws),
        "ece_change": _change(shown["ece"], undefended.figure(figures["ece"]), (-1.0, 1.0)),
        "near_boundary_ece": _near_boundary(p, y, near, rows, bins),
        "classwise_ece": _classwise(p, y, counts, bins, 0.0),
        "classwise_ece_above_chance": _classwise(p, y, counts, bins, 1 / p.shape[1]),
        **{name: _estimate(*shown[name]) for name in SELECTION},
        "auroc_change": _change(shown["auroc"], undefended.figure(figures["auroc"])),
        "confidence_levels": Estimate(float(confidence_levels(p)), NAN, NAN),
        "tied_share": _mean(tied(p.max(1)), counts),
        **{name: _mean(values, counts) for name, values in _order(p, raw).items()},
    }


class _Column:
    """Confidence and whether right, sorted by confidence, with the resamples: sorted too, so that a figure is quick."""

    def __init__(self, p: Floats, y: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        confidence, correct = p.max(1), p.argmax(1) == y
        order = np.argsort(confidence, kind="stable")
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(len(order))
        self.confidence, self.correct = confidence[order], correct[order]
        self.rows = np.sort(place[rows], axis=1)

    def figure(self, f: Figure) -> tuple[float, Floats]:
        """A figure of the images, and of each resample (draws,)."""
        values = [f(self.confidence[row], self.correct[row]) for row in self.rows]
        return f(self.confidence, self.correct), np.array(values)


def _with_bins(gap: Callable[[Floats, Bools, int], float], bins: int) -> Figure:
    return lambda confidence, correct: gap(confidence, correct, bins)


def _right(p: Floats, y: NDArray[np.int64]) -> dict[str, Floats]:
    """Of each image (N,): is it right, and its proper scores."""
    confidence, correct = p.max(1), (p.argmax(1) == y).astype(np.float64)
    with np.errstate(divide="ignore"):
        nll = -np.log(p[np.arange(len(y)), y])
    brier = ((p - np.eye(p.shape[1])[y]) ** 2).sum(1)
    return {"accuracy": correct, "nll": nll, "brier": brier, "top_label_brier": (confidence - correct) ** 2}


def _order(p: Floats, raw: Floats) -> dict[str, Floats]:
    """Of each image (N,): how much of the undefended order of the classes is kept; NaN where it does not count."""
    n, classes = p.shape
    depth = depth_kept(p, raw)
    first = {f"rank_kept_{k}": (depth >= k).astype(float) if k <= classes else np.full(n, NAN) for k in (1, 2, 3, 5)}
    return {
        **first,
        "rank_kept_all": (depth == classes).astype(np.float64),
        "rank_reversed": any_reversed(p, raw).astype(np.float64),
        "spearman": spearman_of_images(p, raw),
        "kendall": kendall_of_images(p, raw),
    }


def _mean(values: Floats | Bools, counts: Floats) -> Estimate:
    """The mean of the values (N,) that are not NaN; counts (draws, N) say how often each image is in a resample."""
    counted = ~np.isnan(values)
    if not counted.any():
        return Estimate(NAN, NAN, NAN)
    mean = float(values[counted].mean())
    if np.isinf(mean):
        return Estimate(mean, NAN, NAN)
    sizes = counts @ counted
    with np.errstate(invalid="ignore"):  # a resample may hold none that is counted
        return _estimate(mean, counts @ np.where(counted, values, 0.0) / sizes)


def _estimate(value: float, values: Floats, bounds: tuple[float, float] | None = None) -> Estimate:
    """With the percentiles of the resamples; with the corrected interval inside the bounds, where they are given."""
    values = values[~np.isnan(values)]
    if np.isnan(value) or not values.size:
        return Estimate(value, NAN, NAN)
    return Estimate(value, *(percentiles(values) if bounds is None else corrected(value, values, *bounds)))


def _change(
    shown: tuple[float, Floats], undefended: tuple[float, Floats], bounds: tuple[float, float] | None = None
) -> Estimate:
    (value, values), (other, others) = shown, undefended
    return _estimate(value - other, values - others, bounds)


def _near_boundary(p: Floats, y: NDArray[np.int64], near: Bools, rows: NDArray[np.int64], bins: int) -> Estimate:
    if near.sum() < AT_LEAST:
        return Estimate(NAN, NAN, NAN)
    confidence, correct = p.max(1), p.argmax(1) == y
    inside = [row[near[row]] for row in rows]
    values = np.array([binned_gap(confidence[row], correct[row], bins) for row in inside])
    return _estimate(float(binned_gap(confidence[near], correct[near], bins)), values, SHARE)


def _classwise(p: Floats, y: NDArray[np.int64], counts: Floats, bins: int, threshold: float) -> Estimate:
    value = classwise_gap(p, y, np.ones((1, len(y))), bins, threshold)
    return _estimate(float(value[0]), classwise_gap(p, y, counts, bins, threshold), SHARE)
