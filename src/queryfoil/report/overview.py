"""The paper's table 1 as measured columns, and its table 11 as the presets that the plans use."""

from collections.abc import Mapping, Sequence
from typing import Any

from queryfoil import metrics, table
from queryfoil.attacks import PRESETS
from queryfoil.models.zoo import MODELS, card
from queryfoil.report import sheets
from queryfoil.summary import CellResult

NETWORK = "WideResNet-28"
PAPER: dict[str, dict[str, str]] = {
    "AT": {"accuracy": "↓↓", "calibration": "/", "test cost": "=", "training cost": "↑↑↑", "under attack": "↑↑"},
    "RND": {"accuracy": "↓", "calibration": "↓", "test cost": "=", "training cost": "=", "under attack": "↑"},
    "DENT": {"accuracy": "=", "calibration": "↓", "test cost": "↑", "training cost": "=", "under attack": "↑"},
    "AAA-linear": {"accuracy": "=", "calibration": "↑", "test cost": "=", "training cost": "=", "under attack": "↑↑↑"},
}
"""Table 1 of the paper; its preprocessing is RND here, its dynamic inference DENT."""


def table_1(recorded: Mapping[str, Sequence[CellResult]], costs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: for each defense what was measured, and below it the paper's sign; none without its cells."""
    cells = {
        r.cell.place["defense"]: r
        for name in ("table3", "table2")
        for r in recorded.get(name, ())
        if r.cell.place["network"] == NETWORK and r.cell.place["attack"] == "Square"
    }
    if "None" not in cells:
        return []
    ratios = {row["place"]["defense"]: row["ratio"] for row in costs if row["place"].get("network") == NETWORK}
    columns = [c for c in (*PAPER, "AAA-linear, fitted") if c in cells]
    lines = ["| against undefended | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for feature in next(iter(PAPER.values())):
        values = [_feature(feature, cells["None"], cells[c], ratios.get(c)) for c in columns]
        signs = [PAPER.get(c, {}).get(feature, "") for c in columns]
        entries = [value + (f"<br>*{sign}*" if sign else "") for value, sign in zip(values, signs, strict=True)]
        lines.append(f"| {feature} | " + " | ".join(entries) + " |")
    return lines


def _feature(name: str, none: CellResult, r: CellResult, ratio: float | None) -> str:
    if name == "accuracy":
        return _points(sheets.clean_difference(r, none))
    if name == "calibration":
        change = sheets.ece_difference(r, none)
        return f"ECE {_points(change)}"
    if name == "test cost":
        return "not recorded" if ratio is None else f"x {ratio:.2f}"
    if name == "training cost":
        return f"x {_passes(r.cell.model) / _passes(none.cell.model):.1f}" if r.cell.model in MODELS else "its authors'"
    n = min(len(r.attacked), len(none.attacked))
    left = [100 * metrics.accuracy_at(table.fooled_at(c.attacked)[:n], c.cell.budget) for c in (none, r)]
    return f"{left[0]:.1f} → {left[1]:.1f} % (n = {n})"


def _points(d: sheets.Difference) -> str:
    return f"{100 * d.value:+.1f} ± {100 * d.spread:.1f}"


def _passes(model: str) -> int:
    """Forward and backward passes that a training image took, by the recipe in the network's card."""
    recipe = card(model)["recipe"]
    return int(recipe["epochs"]) * (1 + int(recipe["objective"].get("steps", 0)))


def table_11() -> list[str]:
    """Lines of Markdown: each preset's hyper-parameters."""
    lines = ["| preset | attack | norm | hyper-parameters, on the [0, 1] scale |", "|---|---|---|---|"]
    for preset, attacks in PRESETS.items():
        for attack, norms in attacks.items():
            for norm, hyper in norms.items():
                values = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in hyper.items())
                lines.append(f"| {preset} | {attack} | {norm} | {values} |")
    return lines
