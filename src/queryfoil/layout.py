"""How the cells of a plan form a table of the paper."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from queryfoil.checks import lookup

PAPER = re.compile(r"\d+(\.\d+)?( \+- \d+(\.\d+)?)?( / \d+(\.\d+)?( \+- \d+(\.\d+)?)?)*")
"""Numbers of the paper's tables: one, or several, with or without a spread."""


class Layout(BaseModel):
    """How the cells of a grid form a table of the paper.

    Each combination of entries on the axes `rows` is a row, which shows `show` ("accuracy" left or "queries", at `at`
    queries); before these stand rows of calibration and clean accuracy for each combination on the axes `users`.
    `columns` is the axis of the columns. `over` is an axis to average over. With `worst`, a row before the others
    counts an image of a column as left only if it is left by every attack of the column that sees scores; such a row
    for each combination on `users`, and on average over the axis `over`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    columns: str
    rows: tuple[str, ...] = ()
    users: tuple[str, ...] | None = None  # no such rows
    at: tuple[Annotated[int, Field(ge=1)], ...] = (100,)
    show: tuple[Literal["accuracy", "queries"], ...] = ("accuracy",)
    over: str | None = None
    worst: bool = False
    ceiling: str | None = None  # the column that shows labels alone: the worst case of the others is compared with its
    ours: str | None = None  # the column whose place among the others the paper argues for
    figures: tuple[Literal["queries", "losses", "scores", "sweep", "curves", "frontier"], ...] = ()

    def check(self, places: Sequence[Mapping[str, str]], budget: int, paper: Mapping[str, Mapping[str, str]]) -> None:
        """ValueError unless it fits cells at these places, of which each has this budget, and the paper's numbers."""
        axes = dict.fromkeys(axis for place in places for axis in place)
        for axis in (self.columns, *self.rows, *(self.users or ()), *([self.over] if self.over else [])):
            lookup(axes, axis, "axis of the layout")
        columns = dict.fromkeys(place[self.columns] for place in places if self.columns in place)
        if self.ceiling is not None and not self.worst:
            raise ValueError("a ceiling is compared with the worst case; set worst, or leave ceiling out")
        for column in [
            *([self.ours] if self.ours else []),
            *([self.ceiling] if self.ceiling else []),
            *(c for row in paper.values() for c in row),
        ]:
            lookup(columns, column, "column of the layout")
        if late := [q for q in self.at if q > budget]:
            raise ValueError(f"expected at <= the budget of every cell, but got {late[0]}")
        for text in (text for row in paper.values() for text in row.values()):
            if not PAPER.fullmatch(text):
                raise ValueError(f"expected the paper's numbers as '39.38' or '39.38 / 0.09', but got {text!r}")
        shown_by = (self.columns, *self.rows, self.over or "")
        shown = [tuple(map(place.get, shown_by)) for place in places if self.columns in place]
        if len(set(shown)) < len(shown):
            raise ValueError("expected one cell for each row and column of the layout, but some share one")
