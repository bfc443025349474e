"""What is recorded, by plan, for whoever judges it."""

from collections.abc import Mapping, Sequence

from queryfoil import metrics, table
from queryfoil.plan import Plan
from queryfoil.report.verdicts import Shown
from queryfoil.summary import CellResult

Recorded = Mapping[str, tuple[Plan, Sequence[CellResult]]]
"""Each plan by its name, with its finished cells."""

Verdict = tuple[list[Shown], str]
"""What became of each comparison, and what was measured."""


class NotRecordedError(Exception):
    """A cell that a claim needs is not recorded."""


def cell(recorded: Recorded, plan: str, **place: str) -> CellResult:
    """The cell of a plan with these entries."""
    for r in recorded[plan][1] if plan in recorded else ():
        if place.items() <= r.cell.place.items():
            return r
    raise NotRecordedError(f"{plan}: {', '.join(place.values())}")


def entries(recorded: Recorded, plan: str, axis: str) -> list[str]:
    """The entries on an axis that the plan has, recorded or not."""
    if plan not in recorded:
        raise NotRecordedError(plan)
    return list(dict.fromkeys(cell.place[axis] for cell in recorded[plan][0].cells if axis in cell.place))


def left(r: CellResult, q: int | None = None) -> float:
    return 100 * metrics.accuracy_at(table.fooled_at(r.attacked), q or r.cell.budget)
