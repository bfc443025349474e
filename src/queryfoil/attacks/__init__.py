"""Score-based query attacks, one a file; `ATTACKS` names them."""

from dataclasses import fields
from typing import Any

from queryfoil.attacks.square import Square
from queryfoil.checks import lookup

ATTACKS: dict[str, Any] = {
    "square": Square,
}


def build(name: str, accept: str = "greedy", **hyper: Any) -> Any:
    """An attack by its name, with its hyper-parameters; ValueError for what it does not take.

    `accept` goes to attacks that have an acceptance rule; for others only the default is allowed.
    """
    kind = lookup(ATTACKS, name, "attack")
    known = dict.fromkeys(field.name for field in fields(kind))
    if "accept" in known:
        hyper = {**hyper, "accept": accept}
    elif accept != "greedy":
        raise ValueError(f"{name} has no acceptance rule, so accept={accept!r} would have no effect; leave it out")
    for given in hyper:
        if given not in known:
            raise ValueError(f"{name} does not take these hyper-parameters: {given}; it takes {', '.join(known)}")
    return kind(**hyper)
