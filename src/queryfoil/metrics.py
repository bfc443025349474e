"""Figures of merit: pure functions of recorded results, never of a model.

Attack side: `fooled_at` (N,) int64 holds, for each image, the number of the query that first reached the
attacker's goal (1: the clean image; larger than any budget: never). User side: `probs` (N, K) are
probabilities, and `probabilities` makes them from scores of a declared kind. Everything is float64.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

NEVER = 2**62
"""`fooled_at` of an image that was never fooled."""

Floats = NDArray[np.float64]


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


def probabilities(scores: ArrayLike | Tensor, kind: str) -> Floats:
    """Probabilities (N, K) from scores of kind "logits", "log_probs" or "probs"; nothing is guessed.

    >>> probabilities([[0.0, 0.0]], "logits").tolist()
    [[0.5, 0.5]]
    """
    values = np.asarray(scores, dtype=np.float64)
    if kind == "probs":
        return values
    if kind not in ("logits", "log_probs"):
        raise ValueError(f"expected kind logits, log_probs or probs, but got {kind!r}")
    exps = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exps / exps.sum(axis=-1, keepdims=True), dtype=np.float64)


def _checked(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> tuple[Floats, NDArray[np.int64]]:
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if y.size and y.dtype.kind not in "iu":
        raise ValueError(f"expected integer labels, but got {y.dtype}")
    if p.ndim != 2 or y.shape != p.shape[:1] or not y.size:
        raise ValueError(f"expected probs (N, K) and labels (N,), N >= 1, but got {p.shape} and {y.shape}")
    if not (np.isfinite(p).all() and p.min() >= 0 and np.abs(p.sum(1) - 1).max() < 1e-3):
        raise ValueError(
            "expected rows of probabilities that sum to 1, but got other values; "
            "turn logits into probabilities with probabilities(scores, 'logits') first"
        )
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"expected labels in 0..{p.shape[1] - 1}, but got {y.min()}..{y.max()}")
    return p, y


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
    p, y = _checked(probs, labels)
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
    p, y = _checked(probs, labels)
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
    p, y = _checked(probs, labels)
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
    p, y = _checked(probs, labels)
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


def nll(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Negative log-likelihood, natural logarithm, mean over images; infinite where p_y = 0.

    >>> round(nll([[0.5, 0.5]], [0]), 4)
    0.6931
    """
    p, y = _checked(probs, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(p[np.arange(len(y)), y]).mean())


def brier(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Multi-class Brier score in [0, 2]: mean over images of the sum over classes of (p_k - [k = y])^2.

    >>> brier([[0.5, 0.5]], [0])
    0.5
    """
    p, y = _checked(probs, labels)
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean())


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def wilson(successes: int, n: int) -> Interval:
    """Wilson score interval of a share of n images (95 %).

    >>> [round(v, 3) for v in wilson(50, 100)]
    [0.404, 0.596]
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, but got {successes} of {n}")
    z = 1.959964
    share, width = successes / n, 1 + z * z / n
    center = (share + z * z / (2 * n)) / width
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / width
    return Interval(float(max(center - half, 0.0)), float(min(center + half, 1.0)))


def bootstrap(n: int, draws: int = 1000, seed: int = 0) -> NDArray[np.int64]:
    """Row numbers (draws, n) of resamples with replacement; the same for the same n, draws and seed.

    Use the same rows for two columns and take differences: that is the paired bootstrap.
    """
    return np.random.default_rng(seed).integers(0, n, (draws, n))


def percentiles(values: Floats) -> Interval:
    """The middle 95 % of bootstrap values; NaN for values that are NaN (a column with nothing in it)."""
    return Interval(*(float(v) for v in np.quantile(values, [0.025, 0.975])))


def corrected(value: float, values: Floats, low: float = -np.inf) -> Interval:
    """Basic bootstrap interval: the percentiles mirrored at the value, which takes out the estimator's bias.

    Widened, where need be, to contain the value.
    """
    lower, upper = np.quantile(values, [0.025, 0.975])
    corrected_low, corrected_high = 2 * value - upper, 2 * value - lower
    return Interval(float(max(min(corrected_low, value), low)), float(max(corrected_high, value)))


def ece_interval(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15, draws: int = 1000) -> Interval:
    """Bootstrap interval of the ECE (95 %), corrected for the upward bias that ECE has on few images."""
    p, y = _checked(probs, labels)
    confidence, correct, rows = p.max(1), p.argmax(1) == y, bootstrap(len(y), draws)
    values = np.array([binned_gap(confidence[r], correct[r], bins) for r in rows])
    return corrected(float(binned_gap(confidence, correct, bins)), values, low=0.0)


def ece_difference(
    probs: ArrayLike | Tensor,
    reference: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    bins: int = 15,
    draws: int = 1000,
) -> tuple[float, Interval]:
    """ECE(probs) - ECE(reference) on the same images, with its paired bootstrap interval (95 %, corrected)."""
    columns = [(p.max(1), p.argmax(1) == y) for p, y in (_checked(q, labels) for q in (probs, reference))]
    value, other = (float(binned_gap(confidence, correct, bins)) for confidence, correct in columns)
    rows = bootstrap(len(columns[0][0]), draws)
    a, b = (np.array([binned_gap(c[r], hit[r], bins) for r in rows]) for c, hit in columns)
    return value - other, corrected(value - other, a - b)
