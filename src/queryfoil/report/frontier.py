"""The frontier: what is left in the worst case over what the scores are worth to an honest user."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from queryfoil import metrics
from queryfoil.metrics import Interval
from queryfoil.report import sheets
from queryfoil.report.drawing import COLOURS, INK, Picture
from queryfoil.report.worst import worst
from queryfoil.summary import CellResult


class Point(NamedTuple):
    """A defense on the frontier: what an honest user gets, and what is left under attack, in [0, 1]."""

    label: str
    auroc: float
    ece: float
    nll: float
    left: float
    interval: Interval
    attackers: int


def points(columns: Mapping[str, Sequence[CellResult]], q: int) -> list[Point]:
    """A point for each column whose attacks see scores."""
    found = []
    for label, cells in columns.items():
        w = worst(cells)
        if w is not None:
            probs, labels = sheets.shown(cells[0])
            auroc, ece, nll = (f(probs, labels) for f in (metrics.auroc, metrics.ece, metrics.nll))
            found.append(Point(label, auroc, ece, nll, w.left(q), w.interval(q), w.attackers))
    return found


def frontier(found: Sequence[Point], q: int, of: str = "") -> Picture:
    """Accuracy left in the worst case over what the scores are worth; a name and all figures at each point's title."""
    best = [p for p in found if not any(_dominates(other, p) for other in found)]

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        edge = sorted(best, key=lambda p: p.auroc)
        axes.step([100 * p.auroc for p in edge], [100 * p.left for p in edge], where="pre", lw=0.8, color=INK, ls=":")
        for i, p in enumerate(found):
            colour = COLOURS[i % len(COLOURS)]
            low, high = 100 * (p.left - p.interval.low), 100 * (p.interval.high - p.left)
            axes.errorbar(
                100 * p.auroc, 100 * p.left, yerr=[[max(low, 0)], [max(high, 0)]], color=colour, lw=0.8, capsize=2
            )
            marker = "os^Dv"[i // len(COLOURS) % 5]
            axes.plot(100 * p.auroc, 100 * p.left, marker, color=colour, ms=6, label=p.label, gid=_gid(i))
        axes.set(xlabel="AUROC of right against wrong answers (%)", ylabel=f"left under the worst, {q} queries (%)")
        axes.set(ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=2)

    caption = (
        "Each point is a defense: to the right its scores are worth more to an honest user, upwards more is left by "
        "the worst of all attacks for each image, with a 95 % interval. No defense is better in both than those on the "
        "dotted line. Point at one for all its figures."
    )
    titles = {_gid(i): _title(p, q) for i, p in enumerate(found)}
    height = 3.1 + 0.19 * ((len(found) + 1) // 2)
    return Picture("Worst case and usefulness" + (f": {of}" if of else ""), caption, plot, height, titles)


def _dominates(a: Point, b: Point) -> bool:
    return a.auroc >= b.auroc and a.left >= b.left and (a.auroc, a.left) != (b.auroc, b.left)


def _gid(i: int) -> str:
    return f"point-{i}"


def _title(p: Point, q: int) -> str:
    low, high = (100 * end for end in p.interval)
    return (
        f"{p.label}: {100 * p.left:.1f} % left after {q} queries ({low:.1f} to {high:.1f}; worst of {p.attackers}); "
        f"AUROC {100 * p.auroc:.1f} %, ECE {100 * p.ece:.2f} %, NLL {p.nll:.3f}"
    )
