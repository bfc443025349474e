"""The frontier: what is left in the worst case over what the scores are worth to an honest user."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from queryfoil import metrics
from queryfoil.metrics import Interval
from queryfoil.report import sheets
from queryfoil.report.beside import Spot, write_beside
from queryfoil.report.drawing import COLOURS, INK, MARKERS, Picture
from queryfoil.report.worst import worst
from queryfoil.summary import CellResult

UNDEFENDED = "undefended"
LABELS = "labels alone"


class Axis(NamedTuple):
    """What the worst case is shown over: title of the figure, its name, text at the axis, whether less is better."""

    title: str
    name: str
    label: str
    less: bool


AXES = {
    "auroc": Axis("Worst case and usefulness", "AUROC", "AUROC of right against wrong answers (%)", False),
    "ece": Axis("Worst case and calibration", "ECE", "ECE (%), falling to the right: less is better", True),
}
"""By the field of a `Point`."""


class Point(NamedTuple):
    """A defense on the frontier: what an honest user gets, and what is left under attack, in [0, 1].

    corner: "undefended" without any defense, "labels alone" where the label is all that is shown, else empty.
    """

    label: str
    auroc: float
    ece: float
    nll: float
    left: float
    interval: Interval
    attackers: int
    corner: str = ""


def points(columns: Mapping[str, Sequence[CellResult]], q: int) -> list[Point]:
    """A point for each column whose attacks see scores."""
    found = []
    for label, cells in columns.items():
        w = worst(cells)
        if w is not None:
            probs, labels = sheets.shown(cells[0])
            auroc, ece, nll = (f(probs, labels) for f in (metrics.auroc, metrics.ece, metrics.nll))
            found.append(Point(label, auroc, ece, nll, w.left(q), w.interval(q), w.attackers, _corner(cells[0])))
    return found


def _corner(r: CellResult) -> str:
    """By the defenses of a cell, from the inside out, whatever its column is called."""
    if not r.cell.defenses:
        return "" if r.cell.audited else UNDEFENDED
    return LABELS if r.cell.defenses[-1].name == "label_only" else ""


def frontier(found: Sequence[Point], q: int, of: str = "") -> Picture:
    """Accuracy left in the worst case over AUROC, and over ECE to choose; all figures at each point's title."""
    first, *others = (_over(found, q, of, over) for over in AXES)
    return replace(first, others=tuple(others))


def _over(found: Sequence[Point], q: int, of: str, over: str) -> Picture:
    axis = AXES[over]
    known = [p for p in found if not math.isnan(_worth(p, over))]  # there is no AUROC without a wrong answer
    best = [p for p in known if not any(_dominates(other, p, over) for other in known)]

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for i, p in enumerate(found):
            _draw(axes, p, over, i, q)
        if axis.less:
            axes.invert_xaxis()
        top = axes.get_ylim()[1]
        axes.set(xlabel=axis.label, ylabel=f"left under the worst, {q} queries (%)", ylim=(-0.04 * top, 1.05 * top))
        line = _edge(sorted(best, key=lambda p: _worth(p, over)), over, axes.get_xlim()[0])
        axes.plot(*zip(*line, strict=True), lw=0.8, color=INK, ls=":", scalex=False)
        figure.legend(loc="outside lower center", ncols=2)
        write_beside(axes, [_spot(p, over) for p in found], line)

    caption = (
        f"Each point is a defense: to the right its {axis.name} is {'lower' if axis.less else 'higher'}, and its "
        "scores are worth more to an honest user; upwards more is left by the worst of all attacks for each image, "
        "with a 95 % interval. No defense is beyond the dotted line. Filled and named: the network without a defense, "
        "and labels alone, whose confidence is always the same. Point at one for all its figures."
    )
    titles = {_gid(i, over, q): _title(p, q) for i, p in enumerate(found)}
    height = 3.1 + 0.19 * ((len(found) + 1) // 2)
    return Picture(axis.title + (f": {of}" if of else ""), caption, plot, height, titles, axis.name)


def _draw(axes: Axes, p: Point, over: str, i: int, q: int) -> None:
    """Point number i, with its interval; no two of 40 have colour and shape in common, and one behind another shows."""
    spot, colour = _spot(p, over), COLOURS[i % len(COLOURS)]
    bar = [[max(spot.y - spot.low, 0)], [max(spot.high - spot.y, 0)]]
    axes.errorbar(spot.x, spot.y, yerr=bar, color=colour, lw=0.8, capsize=2)
    look = {"ms": 8, "zorder": 2} if p.corner else {"ms": 6, "mew": 1.5, "mfc": "none", "zorder": 3}
    axes.plot(spot.x, spot.y, MARKERS[i % len(MARKERS)], color=colour, label=p.label, gid=_gid(i, over, q), **look)


def _spot(p: Point, over: str) -> Spot:
    """Where a point lies in its figure, in percent."""
    return Spot(100 * getattr(p, over), 100 * p.left, 100 * p.interval.low, 100 * p.interval.high, p.corner)


def _worth(p: Point, over: str) -> float:
    """To an honest user: more is better."""
    value: float = getattr(p, over)
    return -value if AXES[over].less else value


def _dominates(a: Point, b: Point, over: str) -> bool:
    x, y = ((_worth(p, over), p.left) for p in (a, b))
    return x[0] >= y[0] and x[1] >= y[1] and x != y


def _edge(best: Sequence[Point], over: str, left: float) -> list[tuple[float, float]]:
    """Corners of the line that no defense is beyond, from the left end of the axes to the best and down."""
    corners, x = [], left
    for p in best:
        spot = _spot(p, over)
        corners += [(x, spot.y), (spot.x, spot.y)]
        x = spot.x
    return [*corners, (x, 0.0)]


def _gid(i: int, over: str, q: int) -> str:
    return f"{over}-{q}-{i}"


def _title(p: Point, q: int) -> str:
    low, high = (100 * end for end in p.interval)
    name = f"{p.label} ({p.corner})" if p.corner and p.corner != p.label else p.label
    return (
        f"{name}: {100 * p.left:.1f} % left after {q} queries ({low:.1f} to {high:.1f}; worst of {p.attackers}); "
        f"AUROC {100 * p.auroc:.1f} %, ECE {100 * p.ece:.2f} %, NLL {p.nll:.3f}"
    )
