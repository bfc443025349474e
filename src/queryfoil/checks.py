"""Checks of input that several places share."""

import difflib
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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


def require(name: str, value: object, expected: str, holds: Callable[[Any], bool]) -> None:
    """ValueError unless a value is a finite number for which `holds` is true; `expected` says what that means.

    >>> require("eps", -1, "> 0", lambda value: value > 0)
    Traceback (most recent call last):
    ValueError: expected eps > 0, but got -1
    """
    if not is_real(value) or not -math.inf < float(value) < math.inf or not holds(value):  # type: ignore[arg-type]
        raise ValueError(f"expected {name} {expected}, but got {value!r}")


def require_whole(name: str, value: object, least: int = 1) -> None:
    """ValueError unless a value is an integer of at least `least`."""
    require(name, value, f"as a whole number >= {least}", lambda v: isinstance(v, numbers.Integral) and int(v) >= least)


def require_positive(name: str, value: object) -> None:
    """ValueError unless a value is a finite number above 0."""
    require(name, value, "> 0 and finite", lambda v: v > 0)


def is_real(value: object) -> bool:
    """Whether a value is a real number, Python's or NumPy's; a bool is none.

    >>> is_real(0.5), is_real(True), is_real("0.5")
    (True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
