"""User side: is the confidence right? Expected calibration error (ECE) in its forms."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from queryfoil.metrics.inputs import Floats, checked


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
    p, y = checked(probs, labels)
    return float(binned_gap(p.max(1), p.argmax(1) == y, bins))


def mce(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15) -> float:
    """Maximum calibration error in [0, 1]: the largest gap of the bins of `ece` that hold an image.

    >>> round(mce([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4]], [0, 1, 0]), 3)
    0.4
    """
    found = reliability(probs, labels, bins)
    return float(np.nanmax(np.abs(found.accuracy - found.confidence)))


def adaptive_ece(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15) -> float:
    """ECE over bins of equally many images, sorted by confidence (Nixon et al., 2019); sizes differ by at most one.

    Images of equal confidence keep their order. In [0, 1].

    >>> round(adaptive_ece([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]], [0, 0, 1, 1], bins=2), 3)
    0.4
    """
    p, y = checked(probs, labels)
    if not 1 <= bins <= len(y):
        raise ValueError(f"expected from 1 to {len(y)} bins, the number of images, but got {bins}")
    confidence = p.max(1)
    order = np.argsort(confidence, kind="stable")
    gaps = (confidence - (p.argmax(1) == y))[order]
    return float(sum(abs(float(part.sum())) for part in np.array_split(gaps, bins))) / len(y)


def classwise_ece(
    probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15, threshold: float = 0.0
) -> float:
    """Mean over classes of the ECE of that class's probability against its frequency (Kull et al., 2019). In [0, 1].

    `threshold` leaves out probabilities up to it, as of 1,000 classes nearly all lie in the first bin (Nixon et
    al., 2019); 1 / K is common. The weights of the bins stay shares of all images.

    >>> round(classwise_ece([[0.8, 0.2], [0.8, 0.2]], [0, 1]), 3)
    0.3
    """
    p, y = checked(probs, labels)
    total = 0.0
    for k in range(p.shape[1]):
        counted = p[:, k] > threshold if threshold > 0 else np.ones(len(y), dtype=bool)
        gaps = (p[:, k] - (y == k))[counted]
        sums = np.bincount(bin_index(p[counted, k], bins), weights=gaps, minlength=bins)
        total += float(np.abs(sums).sum()) / len(y)
    return float(total / p.shape[1])


def binned_gap(confidence: Floats, correct: NDArray[np.bool_], bins: int = 15) -> Floats:
    """ECE from confidences (..., N) and hits (..., N) or (N,): one value for each leading index."""
    gaps = (confidence - correct).reshape(-1, confidence.shape[-1])
    index = bin_index(confidence, bins).reshape(gaps.shape)
    flat = index + bins * np.arange(len(gaps))[:, None]
    sums = np.bincount(flat.ravel(), weights=gaps.ravel(), minlength=bins * len(gaps))
    total = np.abs(sums.reshape(len(gaps), bins)).sum(1) / gaps.shape[1]
    return np.asarray(total.reshape(confidence.shape[:-1]), dtype=np.float64)
