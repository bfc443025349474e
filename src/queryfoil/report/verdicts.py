"""When a comparison counts as shown: by its whole spread, against the margin that the claim allows."""

from collections.abc import Sequence

import numpy as np

from queryfoil import metrics
from queryfoil.report.sheets import Difference

HOLDS, PARTLY, FAILS, OPEN = "holds here", "holds in part", "does not hold here", "cannot be told here"
Shown = bool | None
"""What became of a comparison: shown, refuted, or open."""


def verdict(parts: Sequence[Shown]) -> str:
    """All shown: it holds. None shown, and some refuted: it does not. Both: in part. Else it cannot be told.

    >>> verdict([True, True]), verdict([True, None]), verdict([True, False]), verdict([None, False])
    ('holds here', 'cannot be told here', 'holds in part', 'does not hold here')
    """
    if all(parts):
        return HOLDS
    if not any(part is False for part in parts):
        return OPEN
    return PARTLY if any(parts) else FAILS


def points(d: Difference) -> str:
    return f"{100 * d.value:+.1f} ± {100 * d.spread:.1f}"


def above(d: Difference, margin: float = 0.0) -> Shown:
    """Whether a difference is above minus a margin in points: with its whole spread, not at all, or neither.

    >>> above(Difference(0.05, 0.02)), above(Difference(-0.05, 0.02)), above(Difference(-0.01, 0.02), margin=5)
    (True, False, True)
    """
    low, high = 100 * (d.value - d.spread), 100 * (d.value + d.spread)
    return True if low > -margin else False if high < -margin else None


def near(d: Difference, margin: float) -> Shown:
    """Whether a difference is within a margin in points: with its whole spread, not at all, or neither."""
    size, spread = 100 * abs(d.value), 100 * d.spread
    return True if size + spread < margin else False if size - spread > margin else None


def below(hits: int, n: int, margin: float) -> Shown:
    """Whether a share of n images is below a margin in percent, by its 95 % interval."""
    low, high = metrics.wilson(hits, n)
    return True if 100 * high < margin else False if 100 * low > margin else None


def deviation(values: Sequence[float]) -> metrics.Interval:
    """95 % interval of the standard deviation of which these few values are a sample.

    By chi-squared, whose quantiles are those of Wilson and Hilferty (1931).

    >>> [round(v, 2) for v in deviation([1, 2, 3, 4, 5])]
    [0.95, 4.72]
    """
    free = len(values) - 1
    squares = float(np.var(values)) * len(values)
    quantiles = [free * (1 - 2 / (9 * free) + z * np.sqrt(2 / (9 * free))) ** 3 for z in (1.959964, -1.959964)]
    return metrics.Interval(*(float(np.sqrt(squares / q)) for q in quantiles))


def count(parts: Sequence[Shown]) -> str:
    shown, refuted = sum(part is True for part in parts), sum(part is False for part in parts)
    return f"shown in {shown} of {len(parts)}, refuted in {refuted}, open in {len(parts) - shown - refuted}"
