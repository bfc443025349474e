"""From the text of a plan to its cells: grids of named choices, at one of several scales.

A plan lists cells one by one (`cell`), or as a grid: for each axis the names of its entries, and a cell for each
combination. An entry is a table of fields of a cell; those that many plans share are in `shipped/vocabulary.toml`,
others in the plan. A scale ("small", "paper") says what an entry means there: networks, data, sizes. A text "{at}" in a
field stands for what the cell's entries call so in their table `names`.
"""

import itertools
import tomllib
from pathlib import Path
from typing import Any

from queryfoil.checks import lookup

Table = dict[str, Any]

VOCABULARY = Path(__file__).parent / "shipped" / "vocabulary.toml"
CHECKPOINTS = Path("checkpoints")
"""Where published weights are looked for."""


def scales() -> list[str]:
    """The scales that plans can run at.

    >>> scales()
    ['small', 'paper']
    """
    return list(_vocabulary()["scale"])


def expand(content: Table, scale: str | None, checkpoints: str | Path = CHECKPOINTS) -> Table:
    """The content of a plan's file with all its cells written out, at a scale; ValueError for what does not fit.

    A plan has scales if it has a table `scale`, be it empty; the first one is the default.
    """
    content = dict(content)
    _check_tables(content)
    own, defaults = content.pop("axis", {}), content.pop("defaults", {})
    grids, listed, at = content.pop("grid", []), content.pop("cell", []), content.pop("scale", None)
    if at is None and scale is not None:
        raise ValueError(f"the plan has no scales, so scale={scale!r} would have no effect; leave it out")
    axes: Table = {"seed": {}}
    if at is not None:
        known = _vocabulary()
        scale = scale or scales()[0]
        for part in (known["axis"], lookup(known["scale"], scale, "scale"), own, at.get(scale, {})):
            for axis, entries in part.items():
                before = axes.setdefault(axis, {})
                axes[axis] = before | {name: {**before.get(name, {}), **entry} for name, entry in entries.items()}
        content["scale"] = scale
    else:
        axes |= own
    names = {"checkpoints": str(checkpoints)}
    cells = [_merged([defaults, cell], names) for cell in listed]
    for grid in grids:
        grid = dict(grid)
        always = [defaults, grid.pop("set", {})]
        for axis, entries in grid.items():
            if not isinstance(entries, list) or not entries:
                raise ValueError(f"expected a list of names for the axis {axis}, but got {entries!r}")
        for combination in itertools.product(*grid.values()):
            place = {axis: str(entry) for axis, entry in zip(grid, combination, strict=True)}
            parts = [_entry(axes, axis, entry) for axis, entry in zip(grid, combination, strict=True)]
            label = ", ".join(f"{a} {e}" if a in UNNAMED else e for a, e in place.items())
            cells.append({**_merged([*always, *parts], names), "label": label, "place": place})
    return {**content, "cells": cells}


UNNAMED = ("seed", "kappa", "alpha", "tau", "beta")
"""Axes whose entries are numbers: a label says of what."""


def _vocabulary() -> Table:
    return tomllib.loads(VOCABULARY.read_text(encoding="utf-8"))


def _check_tables(content: Table) -> None:
    """ValueError unless what should be tables, and lists of them, are."""
    for name in ("grid", "cell"):
        if not isinstance(content.get(name, []), list):
            raise ValueError(f"expected tables [[{name}]], but got {content[name]!r}")
    axes = [content.get("axis", {}), *(_table("scale", content.get("scale", {})).values())]
    for entries in [e for part in axes for e in _table("axis", part).values()]:
        for name, fields in _table("axis", entries).items():
            _table(name, fields)
    for part in (content.get("defaults", {}), *content.get("grid", []), *content.get("cell", [])):
        _table("defaults, grid or cell", part)


def _table(name: str, value: object) -> Table:
    if not isinstance(value, dict):
        raise ValueError(f"expected tables for {name}, but got {value!r}")
    return value


def _entry(axes: Table, axis: str, entry: object) -> Table:
    """The fields of an entry; a number on the axis `seed` is the seed."""
    if axis == "seed":
        return {"seed": entry}
    found: Table = lookup(lookup(axes, axis, "axis"), str(entry), axis)
    return found


def _merged(parts: list[Table], names: Table) -> Table:
    """One table of fields, the last part first; fields of a table `hyper` and `names` add up."""
    fields: Table = {}
    for part in parts:
        added = {k: {**fields.get(k, {}), **_table(k, part[k])} for k in ("hyper", "names") if k in part}
        fields |= part | added
    filled: Table = _filled(fields, {**names, **fields.pop("names", {})})
    return filled


def _filled(value: Any, names: Table) -> Any:
    """A value with names put for "{name}" in its texts; a text that is nothing else takes the name's own type."""
    if isinstance(value, dict):
        return {key: _filled(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, names) for part in value]
    if not isinstance(value, str) or "{" not in value:
        return value
    if value[0] == "{" and value[-1] == "}" and value.count("{") == 1:
        meant = lookup(names, value[1:-1], "name in this cell")
        return _filled(meant, {k: v for k, v in names.items() if k != value[1:-1]})  # a name never means itself
    for name, meaning in names.items():
        value = value.replace(f"{{{name}}}", str(meaning))
    return value
