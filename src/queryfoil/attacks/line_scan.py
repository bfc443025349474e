"""The period of AAA from answers alone: what an attacker asks a victim once, before he attacks its images.

Along a line between two images the raw margin changes steadily. AAA-linear's jumps where the raw one crosses a border
k tau, from k tau - (1 + alpha) tau / 2 to k tau + (1 + alpha) tau / 2, and falls on both sides while the raw one rises:
the closer one looks, the larger the jump, as with no network by itself. AAA-sine's has no jumps, but turns in each
interval at two heights that lie as far from its middle.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from queryfoil.attacks.readings import _margin
from queryfoil.attacks.sine import peak
from queryfoil.checks import require_whole
from queryfoil.oracle import Model, answers, check_mode, quantize
from queryfoil.task import check_images

TRIED = 4  # jumps of a line that are looked at, the lowest ones: each border is crossed on both sides of a boundary
GROWS = 1.001  # by which a jump does at least, from one step of the line to its limits
TRIALS = 8  # for the place of a turning point between three points of a line
REPEATED = 1e-4  # by how much an answer to the same image may differ, before the model counts as randomized
ALIKE = {"linear": 0.06, "sine": 0.005}  # by how much heights of one kind may differ, as a share
LINES = {"linear": 2, "sine": 3}  # that must have a height in common
FITTING = 0.6  # share of the jumps that must be at borders
CONFIRMING = 3  # turning points of other heights that must be where the curve has them; a margin turns elsewhere too
USUAL = {"linear": 1.0, "sine": 0.7}  # alpha where only one border or interval was seen: the paper's


@dataclass(frozen=True)
class Scan:
    """What a line scan found: curve ("linear" or "sine"), tau and alpha, or None for each.

    lines: how many were scanned. jumps: places on them at which the margin jumped (linear) or turned (sine) as it does
    behind AAA. queries: what that cost, all images together. alpha is measured where two borders or intervals
    were seen, else the paper's.
    """

    curve: str | None
    tau: float | None
    alpha: float | None
    lines: int
    jumps: int
    queries: int


class Place(NamedTuple):
    """Of a jump, its limits; of a turning point, its height twice."""

    line: int
    low: float
    high: float


def estimate_tau(model: Model, images: Tensor, *, points: int = 60, halvings: int = 12, micro_batch: int = 128) -> Scan:
    """The period of the AAA around a model, from its answers on lines between images.

    images: (N, C, H, W) in [0, 1], N >= 4: a line from the first to the second, from the third to the fourth, and so
    on; five lines between images of different classes do. They are asked in 8 bits, as an attack is. points: on each
    line, and as many more where it is steep if nothing jumps. halvings: of a step that has a jump, for its limits.
    Several lines must agree: nothing is found of a model without such a defense, one that shows labels alone, or one
    that is randomized.

    >>> from queryfoil import AAA, data, models
    >>> images = data.load("fashion-mnist", "attack").images[:10]
    >>> scan = estimate_tau(AAA(models.load("fashion-resnet"), tau=6.0).eval(), images)
    >>> scan.curve, round(scan.tau, 1), scan.lines
    ('linear', 6.0, 5)
    """
    check_mode(model)
    check_images(images)
    require_whole("points", points, 8)
    require_whole("halvings", halvings)
    if len(images) < 4:
        raise ValueError(f"expected at least 4 images, the ends of two lines, but got {len(images)}")
    lines = [
        Line(model, number, images[2 * number], images[2 * number + 1], points, micro_batch)
        for number in range(len(images) // 2)
    ]
    if not any(line.randomized() for line in lines):
        jumps = [jump for line in lines for jump in line.jumps(halvings)]
        found, places = _linear(jumps), len(jumps)
        if not jumps:
            peaks, valleys = _turns(lines, points)
            found, places = _sine(peaks, valleys), len(peaks) + len(valleys)
        if found is not None:
            return Scan(*found, len(lines), places, sum(line.queries for line in lines))
    return Scan(None, None, None, len(lines), 0, sum(line.queries for line in lines))


class Line:
    """The images between two, by their place from 0 to 1, and what a model shows of them."""

    def __init__(self, model: Model, number: int, start: Tensor, end: Tensor, points: int, micro_batch: int) -> None:
        self.model, self.number, self.start, self.end, self.micro_batch = model, number, start, end, micro_batch
        self.queries = 0
        self.places = torch.linspace(0, 1, points).tolist()
        self.margins, self.labels = self.ask(self.places)

    def ask(self, places: Sequence[float]) -> tuple[list[float], list[int]]:
        """Margins and labels that are shown at some places, each of which is a query."""
        t = torch.tensor(places, dtype=torch.float64, device=self.start.device)[:, None, None, None]
        x = quantize((self.start + t * (self.end.double() - self.start)).float())
        number = self.queries + 1 + torch.arange(len(x), device=x.device)
        self.queries += len(x)
        scores = answers(self.model, x, torch.full_like(number, self.number), number, 0, self.micro_batch)
        return _margin(scores).tolist(), scores.argmax(1).tolist()

    def randomized(self) -> bool:
        """Whether the start is answered differently when it is asked again."""
        (again,), _ = self.ask([0.0])
        return abs(again - self.margins[0]) > REPEATED * (1 + self.margins[0])

    def jumps(self, halvings: int) -> list[Place]:
        """The lowest jumps on the line between images of one label, by their limits."""
        m, labels = self.margins, self.labels
        steps = {i: abs(m[i + 1] - m[i]) for i in range(len(m) - 1) if labels[i] == labels[i + 1]}
        least = max(steps.values(), default=0.0) / 2
        steep = sorted((i for i, step in steps.items() if step > least), key=lambda i: max(m[i], m[i + 1]))
        found: list[Place] = []
        for i in steep[:TRIED]:
            limits = self._limits(i, halvings)
            if limits is not None and abs(limits[1] - limits[0]) > GROWS * steps[i]:
                found.append(Place(self.number, min(limits), max(limits)))
        return found

    def _limits(self, i: int, halvings: int) -> tuple[float, float] | None:
        """What is shown on both sides of the largest jump in a step; None where the label changes."""
        (left, right), (low, high) = self.places[i : i + 2], self.margins[i : i + 2]
        for _ in range(halvings):
            middle = (left + right) / 2
            (shown,), (label,) = self.ask([middle])
            if label != self.labels[i]:
                return None
            if abs(shown - low) > abs(high - shown):
                right, high = middle, shown
            else:
                left, low = middle, shown
        return low, high

    def densify(self, more: int) -> None:
        """Ask at so many more places, each in the middle of the step in which the signed margin changes most."""
        for _ in range(more):
            m, labels = self.margins, self.labels
            signs = [1 if labels[i] == labels[i + 1] else -1 for i in range(len(m) - 1)]
            i = max(range(len(m) - 1), key=lambda i: abs(m[i + 1] - signs[i] * m[i]))
            middle = (self.places[i] + self.places[i + 1]) / 2
            (shown,), (label,) = self.ask([middle])
            self.places.insert(i + 1, middle)
            self.margins.insert(i + 1, shown)
            self.labels.insert(i + 1, label)

    def turns(self, way: int) -> list[Place]:
        """Peaks (way 1) or valleys (-1) inside the line, where one label is shown on both sides."""
        m, labels = [way * margin for margin in self.margins], self.labels
        found = []
        for i in range(1, len(m) - 1):
            if m[i] > max(m[i - 1], m[i + 1]) and labels[i - 1] == labels[i] == labels[i + 1]:
                height = way * self._height(i, way)
                found.append(Place(self.number, height, height))
        return found

    def _height(self, i: int, way: int) -> float:
        """The largest margin (times `way`) around a point of the line, by trials in ever closer thirds."""
        left, best, right = self.places[i - 1 : i + 2]
        top = way * self.margins[i]
        for _ in range(TRIALS // 2):
            (one, two), _ = self.ask([(left + best) / 2, (best + right) / 2])
            one, two = way * one, way * two
            if max(one, two) <= top:
                left, right = (left + best) / 2, (best + right) / 2
            elif one > two:
                left, best, right, top = left, (left + best) / 2, best, one
            else:
                left, best, right, top = best, (best + right) / 2, right, two
        return top


def _linear(jumps: list[Place]) -> tuple[str, float, float] | None:
    """Period and alpha of a linear curve from its jumps: the lowest border is at tau, the next at 2 tau."""
    borders = _groups(jumps, "linear")
    if not borders:
        return None
    above = statistics.median(place.high for place in borders[0])
    tau, alpha = above / 2, USUAL["linear"]
    if len(borders) > 1 and 1.4 < borders[1][0].high / above < 1.75:
        # the lower limit at the first border is raised by calibration, at the second it is not
        tau = statistics.median((place.low + place.high) / 4 for place in borders[1])
        alpha = statistics.median(place.high - place.low for place in borders[1]) / tau - 1
    fitting = sum(_off(place.high / tau - (1 + alpha) / 2) < 0.1 for place in jumps)
    return ("linear", tau, alpha) if fitting >= FITTING * len(jumps) and alpha > 0 else None


def _turns(lines: list[Line], more: int) -> tuple[list[Place], list[Place]]:
    """Peaks and valleys of lines, after asking `more` on each where it is steep."""
    for line in lines:
        line.densify(more)
    peaks, valleys = ([place for line in lines for place in line.turns(way)] for way in (1, -1))
    return peaks, valleys


def _sine(peaks: list[Place], valleys: list[Place]) -> tuple[str, float, float] | None:
    """Period and alpha of a sine from its turning points, `peak` above and below the middles of the intervals."""
    tops = [statistics.median(place.high for place in group) for group in _groups(peaks, "sine")]
    guesses = [(top / (k + 0.5 + peak(1.0, USUAL["sine"])), USUAL["sine"]) for top in tops for k in range(3)]
    guesses += [(two - one, _alpha(one / (two - one))) for one, two in itertools.pairwise(tops)]

    def hits(guess: tuple[float, float]) -> list[float]:
        tau, alpha = guess
        heights = [(place.high, way) for way, places in ((1, peaks), (-1, valleys)) for place in places]
        return [m for m, way in heights if _off(m / tau - 0.5 - way * peak(1.0, alpha)) < ALIKE["sine"]]

    best = max(guesses, key=lambda guess: len(hits(guess)), default=None)
    if best is None:
        return None
    common = max(tops, key=lambda top: sum(_near(m, top) for m in hits(best)))
    confirming = sum(not _near(m, common) for m in hits(best))
    return ("sine", *best) if confirming >= CONFIRMING else None


def _alpha(height: float) -> float:
    """Of a sine whose peaks lie `height` periods high, but for a whole number of them."""
    return min((step / 1000 for step in range(160, 731)), key=lambda alpha: _off(height - 0.5 - peak(1.0, alpha)))


def _off(value: float) -> float:
    """Distance to the nearest whole number."""
    return abs(value - round(value))


def _near(one: float, other: float) -> bool:
    """Whether two heights of turning points are the same one."""
    return abs(one - other) <= 2 * ALIKE["sine"] * other


def _groups(places: list[Place], curve: str) -> list[list[Place]]:
    """Places of about the same upper height, lowest first, where enough lines agree."""
    groups: list[list[Place]] = []
    for place in sorted(places, key=lambda place: place.high):
        if groups and place.high <= groups[-1][0].high * (1 + ALIKE[curve]):
            groups[-1].append(place)
        else:
            groups.append([place])
    return [group for group in groups if len({place.line for place in group}) >= LINES[curve]]
