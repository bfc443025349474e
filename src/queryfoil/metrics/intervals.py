"""95 % intervals: Wilson for shares, the bootstrap over images for all else."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from queryfoil.metrics.calibration import binned_gap
from queryfoil.metrics.inputs import Floats, checked, checked_probs


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A value with its 95 % interval; NaN where there is none."""

    value: float
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


def corrected(value: float, values: Floats, low: float = -np.inf, high: float = np.inf) -> Interval:
    """Basic bootstrap interval: the percentiles mirrored at the value, which takes out the estimator's bias.

    Widened, where need be, to contain the value; no wider than from `low` to `high`.
    """
    lower, upper = np.quantile(values, [0.025, 0.975])
    corrected_low, corrected_high = 2 * value - upper, 2 * value - lower
    return Interval(float(max(min(corrected_low, value), low)), float(min(max(corrected_high, value), high)))


def ece_interval(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, bins: int = 15, draws: int = 1000) -> Interval:
    """Bootstrap interval of the ECE (95 %), corrected for the upward bias that ECE has on few images."""
    p, y = checked(probs, labels)
    confidence, correct, rows = p.max(1), p.argmax(1) == y, bootstrap(len(y), draws)
    values = np.array([binned_gap(confidence[r], correct[r], bins) for r in rows])
    return corrected(float(binned_gap(confidence, correct, bins)), values, 0.0, 1.0)


def ece_difference(
    probs: ArrayLike | Tensor,
    reference: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    bins: int = 15,
    draws: int = 1000,
) -> tuple[float, Interval]:
    """ECE(probs) - ECE(reference) on the same images, with its paired bootstrap interval (95 %, corrected)."""
    columns = [(p.max(1), p.argmax(1) == y) for p, y in (checked(q, labels) for q in (probs, reference))]
    value, other = (float(binned_gap(confidence, correct, bins)) for confidence, correct in columns)
    rows = bootstrap(len(columns[0][0]), draws)
    a, b = (np.array([binned_gap(c[r], hit[r], bins) for r in rows]) for c, hit in columns)
    return value - other, corrected(value - other, a - b)


def ece_by_chance(probs: ArrayLike | Tensor, bins: int = 15, draws: int = 1000, seed: int = 0) -> Estimate:
    """The ECE that a perfectly calibrated model with these confidences shows on so few images.

    Mean and middle 95 % over draws in which each image's label is drawn from its own probabilities. An ECE inside
    shows no miscalibration; its excess over the mean is about what is real.

    >>> found = ece_by_chance([[0.8, 0.2]] * 100)
    >>> round(found.value, 3), round(found.high, 3)
    (0.032, 0.09)
    """
    confidence, generator = checked_probs(probs).max(1), np.random.default_rng(seed)
    # for the ECE, a label is the top class or not
    hits = (generator.random(len(confidence)) < confidence for _ in range(draws))
    values = np.array([binned_gap(confidence, hit, bins) for hit in hits])
    return Estimate(float(values.mean()), *percentiles(values))
