"""Looking a name up in a registry, with an error that helps."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def lookup(registry: Mapping[str, Value], name: str, kind: str) -> Value:
    """The registry's entry, or a ValueError that lists the names and suggests the nearest.

    >>> lookup({"square": 1, "simba": 2}, "squre", "attack")
    Traceback (most recent call last):
    ValueError: unknown attack 'squre': expected one of simba, square; did you mean 'square'?
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    near = difflib.get_close_matches(str(name), registry, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(sorted(registry))}{hint}")
