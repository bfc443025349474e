"""An audit: the benchmark's attacks against an endpoint, or a function, that is yours."""

import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from queryfoil import pictures
from queryfoil.attacks import ATTACKS
from queryfoil.checks import lookup, require_whole
from queryfoil.data import DATASETS, Images
from queryfoil.deploy import ledger
from queryfoil.deploy.endpoint import Address, is_url
from queryfoil.deploy.remote import Limits
from queryfoil.deploy.sameness import EVERY, IMAGES
from queryfoil.plan import AS_SERVED, SHIPPED, Cell, Plan, reasons

SUITE = ("greedy", "drift, p 0.3", "logit sum, drift, p 0.8", "reverse 23, p 0.3", "scale-free", "op", "SignHunter")
"""Of the plan worst-case, those that together come next to all of it; docs/audit.md has how near."""
BORDERS = {"linf": ("border walk", "border walk, labels"), "l2": ("hopskipjump",)}
"""Those that walk along borders, of levels and of labels alone."""
KNOWING = ("invert", "leak")  # readings of attackers who know which defense it is
LEAST = 15  # images: the report's calibration has as many bins
SPARE = 1.1  # of the images that an audit may need at most: a tenth for requests that are sent again
LEDGER = "spent.json"
REPEATS = 10  # fresh queries to confirm a success against a randomized model


def attackers() -> dict[str, dict[str, Any]]:
    """Name to settings of the attacks: those of the plan worst-case that know no defense, and the library's.

    >>> attackers()["drift, p 0.3"]
    {'accept': 'drift', 'hyper': {'p_init': 0.3}}
    """
    known = tomllib.loads((SHIPPED / "worst-case.toml").read_text(encoding="utf-8"))["axis"]["attacker"]
    blind = {k: v for k, v in known.items() if not str(v.get("hyper", {}).get("reading", "")).startswith(KNOWING)}
    return blind | {name: {"attack": name} for name in ATTACKS}


@dataclass(frozen=True)
class Audit:
    """An audit that is checked and ready: what is attacked and how, and on which images."""

    plan: Plan
    images: Images
    address: Address | None  # None: a function
    limits: Limits
    out: Path
    most: int  # images that may be sent by all runs in `out`

    @property
    def cell(self) -> Cell:
        """Any of the cells, for what all have in common."""
        return self.plan.cells[0]

    @property
    def sent(self) -> int:
        """Images that earlier runs sent."""
        return ledger.read(self.out / LEDGER)[0]

    @property
    def needed(self) -> int:
        """Images that it may need at most, if no request is sent again."""
        return _needed(self.plan, len(self.images))

    @property
    def estimate(self) -> str:
        """What it will cost, at most."""
        n, budget, attacks = len(self.images), self.cell.budget, len(self.plan.cells)
        kinds = "1 attack" if attacks == 1 else f"{attacks} attacks"
        done = f" ({self.sent:,} were sent before)" if self.sent else ""
        seconds = self.limits.seconds(max(min(self.needed, self.most) - self.sent, 0))
        pace = "no limit of rate" if seconds is None else f"at the rate allowed, {_duration(seconds)} if all are needed"
        return (
            f"{self.plan.about}: {kinds} x {n} images x {budget} queries, at most {attacks * n * budget:,}; "
            f"with all checks and what is sent again never more than {self.most:,} images{done}; {pace}"
        )


def prepare(
    model: str,
    images: str,
    out: str | Path,
    *,
    attacks: Iterable[str] = (),
    n: int | None = 100,
    budget: int = 500,
    norm: str = "linf",
    eps: str | float = "8/255",
    seed: int = 0,
    output: str | None = None,
    mean: Any = None,
    std: Any = None,
    size: int | None = None,
    limits: Limits | None = None,
    most: int | None = None,
) -> Audit:
    """Check the settings of an audit, and read its images; asks nothing. ValueError for whatever is wrong.

    model: URL of an endpoint, or `module:function` as `queryfoil attack` takes it. images: as there. attacks: names of
    `attackers`; if left out, `SUITE` and `BORDERS`. n: the first images; None for all. most: images
    that may be sent by all runs in `out`.
    """
    limits = limits or Limits.of(model)
    address = Address.parse(model) if is_url(model) else None
    if address is None and ("=" in model or ":" not in model):
        raise ValueError(
            f"expected the URL of an endpoint or module:function, but got {model!r}; `queryfoil attack` attacks models "
            "and files of yours"
        )
    names = list(dict.fromkeys(attacks)) or [*SUITE, *lookup(BORDERS, norm, "norm")]
    known = attackers()
    usual: dict[str, Any] = {
        "model": model if address is None else str(address), "output": output, "mean": mean, "std": std, "size": size,
        "dataset": _dataset(images), "norm": norm, "eps": eps, "budget": budget, "seed": seed, "attack": "square",
    }  # fmt: skip
    given = pictures.read(images).images
    n = len(given) if n is None else n
    if not LEAST <= n <= len(given):
        raise ValueError(
            f"expected n from {LEAST}, as the report's calibration has so many bins, to {len(given)}, the number of "
            f"images, but got n = {n}"
        )
    given = given[:n]
    cells = [
        {**usual, **lookup(known, name, "attack"), "label": name, "n": len(given),
         "place": {"defense": AS_SERVED, "attacker": name}}
        for name in names
    ]  # fmt: skip
    content = {
        "name": "audit",
        "about": f"Audit of {usual['model']}",
        "report_at": [100],
        "cells": cells,
        "layout": {
            "columns": "defense", "rows": ["attacker"], "users": [], "worst": True,
            "at": sorted({min(100, budget), budget}), "figures": ["queries"],
        },
    }  # fmt: skip
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        raise ValueError("these settings are not valid:\n" + "\n".join(dict.fromkeys(_plainly(error)))) from None
    most = math.ceil(SPARE * _needed(plan, len(given))) if most is None else most
    require_whole("most", most)
    return Audit(plan, given, address, limits, Path(out), most)


def _plainly(error: ValidationError) -> list[str]:
    """What is wrong, without the number of a cell: all cells have the same settings."""
    lines = reasons(error, "settings").splitlines()
    return ["  " + line.strip().split(".", 2)[-1] if line.startswith("  cells.") else line for line in lines]


def _dataset(images: str) -> str:
    name = images.partition("=")[0]
    return name if name in DATASETS else "own-images"


def _needed(plan: Plan, n: int) -> int:
    """Images for attacks and confirmations, for the scores of the report, and to notice a change of the endpoint."""
    attacks = sum(n * (cell.budget + REPEATS) for cell in plan.cells) + n
    return attacks + 2 * IMAGES * (2 + attacks // EVERY)


def _duration(seconds: float) -> str:
    """Seconds as hours and minutes.

    >>> _duration(4000), _duration(50)
    ('1 h 07 min', '1 min')
    """
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
