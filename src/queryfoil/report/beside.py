"""Names beside some points of a figure, where they cover the least."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from queryfoil.report.drawing import INK

PLACES = ((7, 0), (6, 6), (6, -6), (-7, 0), (-6, 6), (-6, -6))
"""Of a name, in points from its point; on the right of it or on the left, and level, above or below."""

HALF = 4.5  # of a marker, in points
LINE, RIGHT, OUTSIDE = 0.6, 0.5, 2.0
"""What it costs to cover a part of the line, and to leave the axes to the right or elsewhere; a spot costs 1."""


class Spot(NamedTuple):
    """A point in units of the axes, its interval upwards, and its name (may be empty)."""

    x: float
    y: float
    low: float
    high: float
    name: str


def write_beside(axes: Axes, spots: Sequence[Spot], line: Sequence[tuple[float, float]]) -> None:
    """Write the names of these spots, which are drawn, as is a line, into axes whose limits and legend are final."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # so that it is laid out
    drawn = [spot for spot in spots if math.isfinite(spot.x) and math.isfinite(spot.y)]
    taken = [(1.0, box) for spot in drawn for box in _boxes(axes, spot, figure.dpi / 72)]
    ends = axes.transData.transform(line)
    taken += [(LINE, Bbox([np.minimum(a, b) - 1, np.maximum(a, b) + 1])) for a, b in itertools.pairwise(ends)]
    for spot in drawn:
        if not spot.name:
            continue
        text = axes.annotate(
            spot.name, (spot.x, spot.y), xytext=PLACES[0], textcoords="offset points", fontsize=8, color=INK
        )
        costs = []
        for x, y in PLACES:
            text.set(
                position=(x, y),
                horizontalalignment="left" if x > 0 else "right",
                verticalalignment="center" if y == 0 else "bottom" if y > 0 else "top",
            )
            box = text.get_window_extent()
            costs.append(
                (_cost(axes, box, taken), (x, y), text.get_horizontalalignment(), text.get_verticalalignment())
            )
        _, place, across, along = min(costs, key=lambda cost: cost[0])
        text.set(position=place, horizontalalignment=across, verticalalignment=along)
        taken.append((1.0, text.get_window_extent()))


def _boxes(axes: Axes, spot: Spot, point: float) -> list[Bbox]:
    """A marker and its interval, in pixels; `point` is so many of them."""
    (x, y), (_, low), (_, high) = axes.transData.transform([(spot.x, v) for v in (spot.y, spot.low, spot.high)])
    half = HALF * point
    return [Bbox([[x - half, y - half], [x + half, y + half]]), Bbox([[x - point, low], [x + point, high]])]


def _cost(axes: Axes, box: Bbox, taken: Sequence[tuple[float, Bbox]]) -> float:
    within = axes.get_window_extent()
    outside = box.x0 < within.x0 or box.y0 < within.y0 or box.y1 > within.y1
    covered = sum(cost for cost, other in taken if box.overlaps(other))
    return covered + RIGHT * float(box.x1 > within.x1) + OUTSIDE * float(outside)
