"""The command `queryfoil list`: every name that the others take, with a line about it."""

from typing import Any

from queryfoil import plan
from queryfoil.attacks import ATTACKS, READINGS, RULES
from queryfoil.data import DATASETS
from queryfoil.defenses import DEFENSES
from queryfoil.models import MODELS
from queryfoil.models.checkpoints import PUBLISHED
from queryfoil.models.zoo import card
from queryfoil.report import cells
from queryfoil.terminal import console, plainly
from queryfoil.train import recipe


@plainly
def command() -> None:
    """Show every attack, acceptance rule, defense, model, data set, recipe and plan, with a line each."""
    groups: dict[str, dict[str, str]] = {
        "attacks": {k: _first_line(v) for k, v in ATTACKS.items()},
        "acceptance rules": {k: _first_line(v) for k, v in RULES.items()},
        "readings of the scores": {k: _first_line(v) for k, v in READINGS.items()},
        "defenses": {k: _first_line(v) for k, v in DEFENSES.items()},
        "models": {k: f"{v.about}; {cells.percent(card(k)['test_accuracy'])} right" for k, v in MODELS.items()},
        "published weights (NAME=PATH)": {k: v.about for k, v in PUBLISHED.items()},
        "data sets": {k: v.about for k, v in DATASETS.items()},
        "recipes": {p.stem: recipe.read(p.stem).about for p in sorted(recipe.SHIPPED.glob("*.toml"))},
        "plans": {k: plan.read(k).about for k in plan.shipped()},
    }
    for kind, entries in groups.items():
        console.print(kind, style="bold")
        width = max(map(len, entries))
        for name, line in entries.items():
            console.print(f"  {name:{width}}  {line}", markup=False, highlight=False, soft_wrap=True)
        console.print()


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]
