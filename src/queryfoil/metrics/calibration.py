"""User side: is the confidence right? Expected calibration error (ECE) in its forms."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from queryfoil.metrics.inputs import Bools, Floats, checked, checked_probs, top
from queryfoil.metrics.selective import tied

AT_LEAST = 200
"""Images that an ECE near the boundary needs."""


class Reliability(NamedTuple):
    """Per confidence bin: number of images, mean confidence and accuracy (NaN where empty)."""

    size: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


def bin_index(confidence: Floats, bins: int) -> NDArray[np.int64]:
    """Right-closed bins of equal width: bin b holds (b/bins, (b+1)/bins]; 0 goes to the first.

    >>> bin_index(np.array([0.0, 0.5, 0.5000001, 1.0]), 2).tolist()
    [0, 0, 1, 1]
    """
    if bins < 1:
        raise ValueError(f"expected at least 1 bin, but got {bins}")
    edges = np.arange(1, bins) / bins
    return np.searchsorted(edges, confidence, side="left").astype(np.int64)


def reliability(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15) -> Reliability:
    """Confidence against accuracy, by bins of the top probability: what a reliability diagram shows."""
    p, y = checked(probs, labels)
    confidence, correct = p.max(1), (p.argmax(1) == y).astype(np.float64)
    index = bin_index(confidence, bins)
    size = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        sums = [np.bincount(index, weights=w, minlength=bins) / size for w in (confidence, correct)]
    return Reliability(size, *sums)


def ece(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: mean gap of confidence and accuracy over bins.

    Top-label, equal-width, right-closed bins weighted by their size (Guo et al. 2017; paper, section 5.1).

    >>> round(ece([[0.8, 0.2], [0.8, 0.2]], [0, 1]), 3)
    0.3
    """
    return float(binned_gap(*top(probs, labels), bins))


def mce(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15) -> float:
    """Maximum calibration error in [0, 1]: the largest gap of the bins of `ece` that hold an image.

    >>> round(mce([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4]], [0, 1, 0]), 3)
    0.4
    """
    return _largest_gap(*top(probs, labels), bins)


def rms_calibration_error(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15) -> float:
    """Root of the mean squared gap over the bins of `ece`, weighted by size; never below the ECE. In [0, 1].

    >>> round(rms_calibration_error([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]], [0, 1, 0, 0]), 4)
    0.3536
    """
    return _rms_gap(*top(probs, labels), bins)


def adaptive_ece(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15) -> float:
    """ECE over bins of equally many images, sorted by confidence (Nixon et al., 2019); sizes differ by at most one.

    Images of equal confidence keep their order; a warning says where that decides. In [0, 1].

    >>> round(adaptive_ece([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]], [0, 0, 1, 1], bins=2), 3)
    0.4
    """
    confidence, correct = top(probs, labels)
    starts, ordered = _adaptive_starts(bins, len(confidence)), np.sort(confidence)
    share = float(tied(confidence).mean())
    if share > 0.01 and (ordered[starts[1:]] == ordered[starts[1:] - 1]).any():
        warnings.warn(
            f"{100 * share:.0f} % of the images share their confidence with another, and bins of equally many split "
            "them by their order alone: so the value depends on that order; use ece",
            stacklevel=2,
        )
    return _adaptive_gap(confidence, correct, bins)


def classwise_ece(
    probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15, threshold: float = 0.0
) -> float:
    """Mean over classes of the ECE of that class's probability against its frequency (Kull et al., 2019). In [0, 1].

    `threshold`, in [0, 1), leaves out probabilities up to it, as of 1,000 classes nearly all lie in the first bin
    (Nixon et al., 2019); 1 / K is common. The weights of the bins stay shares of all images.

    >>> round(classwise_ece([[0.8, 0.2], [0.8, 0.2]], [0, 1]), 3)
    0.3
    """
    p, y = checked(probs, labels)
    if not 0 <= threshold < 1:
        raise ValueError(f"expected a threshold from 0 to below 1, but got {threshold}")
    return float(classwise_gap(p, y, np.ones((1, len(y))), bins, threshold)[0])


def classwise_gap(p: Floats, y: NDArray[np.int64], weights: Floats, bins: int, threshold: float) -> Floats:
    """`classwise_ece` where image i counts `weights[., i]` times, which sum to N: one value a row of weights (D, N)."""
    n, classes = p.shape
    total = np.zeros(len(weights))
    for k in range(classes):
        gaps = np.zeros((n, bins))
        gaps[np.arange(n), bin_index(p[:, k], bins)] = p[:, k] - (y == k)
        if threshold > 0:
            gaps[p[:, k] <= threshold] = 0
        total += np.abs(weights @ gaps).sum(1)
    return np.asarray(total / (n * classes), dtype=np.float64)


def lead(probs: ArrayLike | Tensor) -> Floats:
    """Lead of the top class over the second, in logits: ln p1 - ln p2, (N,), from 0 up; infinite where p2 = 0.

    It is the margin of the logits themselves, as softmax only shifts them.

    >>> lead([[0.75, 0.25], [1.0, 0.0]]).round(4).tolist()
    [1.0986, inf]
    """
    p = checked_probs(probs)
    if p.shape[1] < 2:
        raise ValueError(f"expected probs (N, K) of at least 2 classes, but got {p.shape}")
    first_two = np.partition(p, -2, axis=1)[:, -2:]
    with np.errstate(divide="ignore"):
        return np.asarray(-np.diff(np.log(first_two[:, ::-1]), axis=1)[:, 0], dtype=np.float64)


def near_boundary_ece(
    probs: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    raw_margin: ArrayLike | Tensor,
    below: float = 2.0,
    bins: int = 15,
    at_least: int = AT_LEAST,
) -> float:
    """ECE of the images whose undefended lead (`raw_margin`, (N,), see `lead`) is below a bound, in logits. In [0, 1].

    There a rewritten margin has the least room, and a user the most use for the confidence. NaN where fewer than
    `at_least` images are that near, as the ECE of few images is mostly noise. The margin is that of the top class
    over the second, never of the label: to choose images by their label would make the best model look uncalibrated.

    >>> round(near_boundary_ece([[0.6, 0.4], [0.9, 0.1]], [0, 0], [0.4, 2.2], at_least=1), 3)
    0.4
    """
    confidence, correct = top(probs, labels)
    near = is_near(raw_margin, len(confidence), below)
    enough = near.sum() >= max(at_least, 1)
    return float(binned_gap(confidence[near], correct[near], bins)) if enough else float("nan")


def is_near(raw_margin: ArrayLike | Tensor, n: int, below: float = 2.0) -> Bools:
    """Which of n images have an undefended lead below a bound; ValueError unless they are leads (N,)."""
    margin = np.asarray(raw_margin, dtype=np.float64)
    if margin.shape != (n,) or not (margin >= 0).all():
        raise ValueError(
            f"expected raw_margin ({n},), the lead of the top class over the second, 0 or more, but got "
            f"shape {margin.shape}" + (f" with minimum {margin.min()}" if margin.size else "") + "; use lead(raw_probs)"
        )
    if not below > 0:
        raise ValueError(f"expected a bound above 0 for the margin, but got {below}")
    return np.asarray(margin < below)


def binned_gap(confidence: Floats, correct: Bools, bins: int = 15) -> Floats:
    """ECE from confidences (..., N) and hits (..., N) or (N,): one value for each leading index."""
    gaps = (confidence - correct).reshape(-1, confidence.shape[-1])
    index = bin_index(confidence, bins).reshape(gaps.shape)
    flat = index + bins * np.arange(len(gaps))[:, None]
    sums = np.bincount(flat.ravel(), weights=gaps.ravel(), minlength=bins * len(gaps))
    total = np.abs(sums.reshape(len(gaps), bins)).sum(1) / gaps.shape[1]
    return np.asarray(total.reshape(confidence.shape[:-1]), dtype=np.float64)


def _sums(confidence: Floats, correct: Bools, bins: int) -> tuple[Floats, Floats]:
    """Of each bin that holds an image: its size and the sum of its gaps, as a magnitude."""
    index = bin_index(confidence, bins)
    size = np.bincount(index, minlength=bins).astype(np.float64)
    sums = np.abs(np.bincount(index, weights=confidence - correct, minlength=bins))
    return size[size > 0], sums[size > 0]


def _largest_gap(confidence: Floats, correct: Bools, bins: int) -> float:
    size, sums = _sums(confidence, correct, bins)
    return float((sums / size).max())


def _rms_gap(confidence: Floats, correct: Bools, bins: int) -> float:
    size, sums = _sums(confidence, correct, bins)
    return float(np.sqrt((sums**2 / size).sum() / len(confidence)))


def _adaptive_starts(bins: int, n: int) -> NDArray[np.int64]:
    """Where each of the bins of equally many images starts; the first n % bins hold one more."""
    if not 1 <= bins <= n:
        raise ValueError(f"expected from 1 to {n} bins, the number of images, but got {bins}")
    return np.arange(bins) * (n // bins) + np.minimum(np.arange(bins), n % bins)


def _adaptive_gap(confidence: Floats, correct: Bools, bins: int) -> float:
    order = np.argsort(confidence, kind="stable")
    sums = np.add.reduceat((confidence - correct)[order], _adaptive_starts(bins, len(order)))
    return float(np.abs(sums).sum()) / len(order)


def _gap(confidence: Floats, correct: Bools, bins: int) -> float:
    return float(binned_gap(confidence, correct, bins))


GAPS: dict[str, Callable[[Floats, Bools, int], float]] = {
    "ece": _gap,
    "mce": _largest_gap,
    "rms_calibration_error": _rms_gap,
    "adaptive_ece": _adaptive_gap,
}
"""Calibration errors as functions of confidence (N,), whether right (N,) and bins."""
