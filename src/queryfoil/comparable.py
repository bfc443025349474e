"""What a plan compares: cells whose worst case is one number, and the column of a ceiling; checked before a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from queryfoil.attacks import settings
from queryfoil.layout import Layout

if TYPE_CHECKING:
    from queryfoil.plan import Cell

SHARED = ("model", "dataset", "n", "norm", "eps", "targeted")
"""What the cells of a worst case, and those of two that are compared, must share: network, images, and what may be done
to them."""


def check(layout: Layout, cells: Sequence[Cell]) -> None:
    """ValueError unless cells that a layout with `worst` pools, or compares with its ceiling, can be.

    Pooled are those of one column, for each combination on the axes `users`: on the same network and images, within the
    same ball and, of each seed, by the same attacks. With the ceiling are compared those of the same combination: with
    the same budget too, and a seed in common. Attacks that see labels alone are in no worst case. The budgets of those
    pooled may differ: no attack knows its own, and a layout shows nothing beyond the smallest.
    """
    if not layout.worst:
        return
    groups: dict[tuple[str, ...], dict[str, list[Cell]]] = {}
    for cell in cells:
        if layout.columns in cell.place and cell.loss is not None:
            group = tuple(cell.place[axis] for axis in layout.users or () if axis in cell.place)
            groups.setdefault(group, {}).setdefault(cell.place[layout.columns], []).append(cell)
    for columns in groups.values():
        for column, found in columns.items():
            _same(found, SHARED, f"the worst case of {column} needs one")
            _same_attacks(found, column)
        ceiling = columns.get(layout.ceiling or "", [])
        for column, found in columns.items():
            if ceiling and column != layout.ceiling:
                _same(
                    [*ceiling, *found],
                    (*SHARED, "budget"),
                    f"{column} is compared with the ceiling {layout.ceiling}, on one",
                )
                seeds = [sorted({cell.seed for cell in some}) for some in (found, ceiling)]
                if not set(seeds[0]) & set(seeds[1]):
                    raise ValueError(
                        f"{column} is compared with the ceiling {layout.ceiling}, but they have no seed in common: "
                        f"{seeds[0]} and {seeds[1]}; give them one"
                    )


def _same(cells: Sequence[Cell], fields: Sequence[str], why: str) -> None:
    first = cells[0]
    for field in fields:
        for cell in cells:
            if getattr(cell, field) != getattr(first, field):
                raise ValueError(
                    f"{why} {field}, but got {getattr(first, field)!r} ({first.label}) and {getattr(cell, field)!r} "
                    f"({cell.label}); set one for both, or put them in other groups by the layout's users"
                )


def _same_attacks(cells: Sequence[Cell], column: str) -> None:
    seeds: dict[int, list[str]] = {}
    for cell in cells:
        attack = repr((cell.attack, cell.accept, cell.loss, cell.budget, sorted(settings(cell.build()).items())))
        seeds.setdefault(cell.seed, []).append(attack)
    first, *others = seeds
    for seed in others:
        if sorted(seeds[seed]) != sorted(seeds[first]):
            raise ValueError(
                f"the worst case of {column} needs the same attacks for each seed, but seed {seed} has others than "
                f"{first}; add what is missing"
            )
