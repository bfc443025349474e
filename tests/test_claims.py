"""The paper's claims in two made-up worlds: one in which the paper is right, and one in which it is not."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from queryfoil import plan, table
from queryfoil.metrics import NEVER
from queryfoil.plan import Cell
from queryfoil.report import claims, verdicts
from queryfoil.summary import CellResult
from test_grid import scaled

N = 4000
DEFENDED = {"AAA-linear", "AAA-sine", "AT-AAA-linear"}

RIGHT = {  # accuracy left and on clean images, and by how much the confidence is below that, in points
    "None": (5, 95, 5),
    "AT": (60, 90, 8),
    "RND": (50, 92, 6),
    "DENT": (40, 95, 5),
    "PNI": (45, 88, 5),
    "TRS": (50, 88, 5),
    "AAA": (80, 95, 3),
}
WRONG = {**RIGHT, "AAA": (30, 90, 9), "AT": (70, 95.5, 8), "RND": (50, 95.5, 6)}


def cell_result(cell: Cell, left: float, clean: float, doubt: float, fitted: dict[str, Any], late: int) -> CellResult:
    """A cell of N images, of which the same ones are fooled first in every cell, `late` of them after 100 queries."""
    rank = np.arange(N)
    kept = rank >= round(N * (1 - left / 100))
    fooled = np.where(rank < late, 150, 50)
    hit = rank >= round(N * (1 - clean / 100))
    confidence = np.full(N, (clean - doubt) / 100)
    columns = {
        "id": rank,
        "queries": np.where(kept, cell.budget, 50),
        "fooled_at": pa.array(np.where(kept, NEVER, fooled), mask=kept),
    }
    raw = np.full(N, (RIGHT["None"][1] - RIGHT["None"][2]) / 100)
    first = (rank >= round(N * (1 - RIGHT["None"][1] / 100))) == hit  # does the undefended network say 0?
    spread = {
        name: pa.array(np.log(np.stack([c, 1 - c], 1)).astype(np.float32).tolist(), table.SCORES)
        for name, c in (("scores", confidence), ("undefended_scores", np.where(first, raw, 1 - raw)))
    }
    clean_table = pa.table({"id": rank, "label": np.where(hit, 0, 1), **spread})
    info = {"fitted": [fitted for _ in cell.defenses]}
    return CellResult(cell, info, pa.table(columns), clean_table, table.TRACE.empty_table())


def world(right: bool) -> claims.Recorded:
    """All plans with made-up results, as in the paper or against it."""
    found = {}
    for name in (n for n in scaled() if n.startswith("table") or n == "figure4"):
        full = plan.read(name)
        found[name] = full, [invented(name, cell, right) for cell in full.cells]
    return found


def invented(name: str, cell: Cell, right: bool) -> CellResult:
    place = cell.place
    defense = place.get("defense", "AAA-linear").partition(",")[0]
    kind = "AAA" if defense in DEFENDED else "AT" if defense == "AT (L2)" else defense
    left, clean, doubt = (RIGHT if right else WRONG)[kind]
    late = 0 if right or kind != "AAA" else N // 10
    temperature = 1.0
    if name == "table5" and place["kappa"] in ("60", "80") and not right:
        left, clean, doubt = left - 10, clean - 5, doubt + 5
    if name == "table6" and place["attack"] != "Square":
        left -= 20 if (defense == "AAA-linear") == right else 0
    if name == "table7":
        step = ["L2 0.5", "L2 1.0", "L2 1.5", "L2 2.0", "L2 2.5"].index(place["bound"])
        left += 4 * step * (1 if right else -1) if kind == "AAA" else 0
        if place["attack"] == "RamBo":
            left = 94 if right else 50
    if name == "table8":
        left -= 0 if right or place["loss"] == "logits-margin" else 10
        if not right:
            left += {"AAA": 0, "AT": 5}[kind]
    if name == "table9":
        left += (0.1 if right else 3) * int(place["seed"])
    if name == "figure4":
        axis = next(a for a in ("tau", "alpha", "beta") if a in place)
        grid = sorted({float(c.place[axis]) for c in plan.read(name).cells if axis in c.place}, reverse=axis == "beta")
        rank, usual = grid.index(float(place[axis])), grid.index({"tau": 6.0, "alpha": 1.0, "beta": 5.0}[axis])
        temperature = np.exp(-rank / 10 if right else rank / 10)
        left += 0.5 * (rank - usual) if right else -15 * np.sign(rank - usual)
        doubt = 2 + 0.3 * (rank - usual) if right else 9 - 0.3 * (rank - usual)
    return cell_result(cell, left, clean, doubt, {"temperature": temperature}, late)


LIMITS = [
    {"attacker": a, "defense": d, "accuracy": 0.01, "n": 300, "wrong": list(range(297))}
    for a in ("white-box", "transfer")
    for d in ("None", "AAA-linear", "AT")
]


@pytest.mark.parametrize(("right", "verdict"), [(True, verdicts.HOLDS), (False, verdicts.FAILS)])
def test_each_claim_holds_where_the_paper_is_right_and_not_where_it_is_wrong(right: bool, verdict: str) -> None:
    limits = (
        LIMITS
        if right
        else [
            {**row, "accuracy": 0.5, "wrong": list(range(150))} if row["defense"] == "AAA-linear" else row
            for row in LIMITS
        ]
    )
    judged = claims.judge(world(right), limits)
    assert {j.claim: j.verdict for j in judged} == {j.claim: verdict for j in judged}
    assert len(judged) == len(claims.CLAIMS) + 1
