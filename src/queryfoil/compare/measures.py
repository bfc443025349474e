"""What is compared of two subjects, each figure with its difference and the paired bootstrap over their images."""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from queryfoil import metrics
from queryfoil.compare.runs import Scores, Subject
from queryfoil.metrics import Interval
from queryfoil.metrics.selective import SELECTION

NAN = float("nan")
NONE = Interval(NAN, NAN)
DRAWS = 1000
ROUNDING = 1e-12
"""Of sums of thirds, as over three seeds: no difference is so small."""


class Measure(NamedTuple):
    """A figure of A and of B, and B - A with its 95 % interval; NaN where there is none.

    `kind` is "share" (in [0, 1]) or "queries"; `equal` means the same on every one of the `n` images.
    """

    name: str
    kind: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    n: int
    equal: bool

    @property
    def direction(self) -> int:
        """1 where B is above A beyond noise, -1 where it is below, else 0: whether the interval leaves out 0."""
        return 1 if self.low > ROUNDING else -1 if self.high < -ROUNDING else 0

    @property
    def counts(self) -> bool:
        """Whether it could have been marked by chance: it has an interval, and is not equal on every image."""
        return not (self.equal or np.isnan(self.low))


def common(a: Subject | Scores, b: Subject | Scores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a and of b with the images that both have, of the same id and label; in the order of the ids."""
    _, left, right = np.intersect1d(a.ids, b.ids, return_indices=True)
    same = a.labels[left] == b.labels[right]
    return left[same], right[same]


def under_attack(a: Subject, b: Subject, rows: tuple[NDArray[np.int64], NDArray[np.int64]]) -> list[Measure]:
    """Clean accuracy, accuracy left, mean and median queries, over the images at these rows (one or more).

    Accuracy left at each number of queries that either shows and both reach. Queries are over those that every run of
    both answered correctly at first, survivors counted with the smaller budget.
    """
    x, y = a.fooled_at[:, rows[0]], b.fooled_at[:, rows[1]]
    budget = min(a.budget, b.budget)
    at = sorted({q for q in (*a.at, *b.at) if q < budget} | {budget})
    found = [_share(x, y, 1, "clean accuracy"), *(_share(x, y, q, f"accuracy left at {q}") for q in at)]
    correct = (x > 1).all(0) & (y > 1).all(0)
    queries = [np.minimum(v[:, correct], budget).astype(np.float64) for v in (x, y)]
    return [*found, _mean_queries(*queries), _median_queries(*queries)]


def of_scores(a: Scores, b: Scores) -> list[Measure]:
    """ECE and AUROC on the images that nothing was fitted on and both have; nothing where there are none."""
    left, right = common(a, b)
    if not len(left) or a.probs.shape[1] != b.probs.shape[1]:
        return []
    p, q, labels = a.probs[left], b.probs[right], a.labels[left]
    n, equal = len(labels), bool(np.array_equal(p, q))
    if equal:
        values = {"ECE": metrics.ece(p, labels), "AUROC": metrics.auroc(p, labels)}
        return [Measure(name, "share", v, v, 0.0, 0.0, 0.0, n, True) for name, v in values.items()]
    change, interval = metrics.ece_difference(q, p, labels)
    columns = [(v.max(1), v.argmax(1) == labels) for v in (p, q)]
    auroc = SELECTION["auroc"]
    first, second = (auroc(*column) for column in columns)
    drawn = [[auroc(c[r], hit[r]) for r in _draws(n)] for c, hit in columns]
    differences = np.subtract(drawn[1], drawn[0])
    differences = differences[~np.isnan(differences)]  # of resamples with a right and a wrong answer
    known = len(differences) > 0 and not np.isnan(second - first)
    spread = metrics.percentiles(differences) if known else NONE
    return [
        Measure("ECE", "share", metrics.ece(p, labels), metrics.ece(q, labels), change, *interval, n, equal),
        Measure("AUROC", "share", first, second, second - first, *spread, n, equal),
    ]


def _share(x: NDArray[np.int64], y: NDArray[np.int64], q: int, name: str) -> Measure:
    """Share of images that are left after q queries, a mean over seeds."""
    left = [(v > q).mean(0, dtype=np.float64) for v in (x, y)]
    by_image = left[1] - left[0]
    a, b = (float(v.mean()) for v in left)
    return Measure(
        name, "share", a, b, float(by_image.mean()), *mean_interval(by_image, 1.0), len(by_image),
        bool(np.array_equal(x > q, y > q) if x.shape == y.shape else not by_image.any()),
    )  # fmt: skip


def _mean_queries(x: metrics.Floats, y: metrics.Floats) -> Measure:
    if not x.size:
        return Measure("mean queries", "queries", NAN, NAN, NAN, NAN, NAN, 0, False)
    by_image = y.mean(0) - x.mean(0)
    interval = mean_interval(by_image, float(np.abs(by_image).max()))
    a, b = float(x.mean()), float(y.mean())
    return Measure(
        "mean queries", "queries", a, b, float(by_image.mean()), *interval, len(by_image), not by_image.any()
    )


def _median_queries(x: metrics.Floats, y: metrics.Floats) -> Measure:
    if not x.size:
        return Measure("median queries", "queries", NAN, NAN, NAN, NAN, NAN, 0, False)
    a, b = float(np.median(x)), float(np.median(y))
    rows = _draws(x.shape[1])
    drawn = [np.median(v[:, rows], axis=(0, 2)) for v in (x, y)]
    equal = x.shape == y.shape and bool(np.array_equal(x, y))
    return Measure(
        "median queries", "queries", a, b, b - a, *metrics.percentiles(drawn[1] - drawn[0]), x.shape[1], equal
    )


def mean_interval(differences: metrics.Floats, unit: float) -> Interval:
    """95 % interval of the mean of differences of each image (N,), from resamples of the images (paired bootstrap).

    Taken as if two more images had changed, one by `unit` and one by -`unit`: a few images that all changed the same
    way say less than their resamples do. Of 200, four that all fell would be beyond noise, though such a run is
    no rarer than one in eight; with the two, it takes six, as a sign test does.
    """
    n = len(differences)
    changed = differences[differences != 0]
    turn = 1.0 if not len(changed) else float(np.sign(changed[0]))  # B - A is exactly the mirrored A - B
    sums = np.concatenate([turn * differences, [unit, -unit]])[_draws(n + 2)].sum(1)
    low, high = metrics.percentiles(sums / n)
    if not len(changed):
        half = max(-low, high)
        return Interval(-half, half)
    return Interval(low, high) if turn > 0 else Interval(-high, -low)


@functools.lru_cache(maxsize=4)
def _draws(n: int) -> NDArray[np.int64]:
    return metrics.bootstrap(n, DRAWS)
