"""Checks of input that several places share."""

import difflib
import numbers
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


def is_real(value: object) -> bool:
    """Whether a value is a real number, Python's or NumPy's; a bool is none.

    >>> is_real(0.5), is_real(True), is_real("0.5")
    (True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
