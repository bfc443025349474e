"""Every plan of the paper, at a tiny size, from its cells to its place in the account."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from queryfoil import bench, data, plan, summary, table
from queryfoil.defenses import calibration
from queryfoil.report import claims, page, reproduction, sheets, verdicts
from queryfoil.report.sheets import Difference
from queryfoil.store import Store
from test_grid import scaled


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def tiny(name: str) -> plan.Plan:
    """A plan with three images and four queries a cell; of a large grid, the first network."""
    full = plan.read(name)
    first = full.cells[0].place["network"]
    kept = [c for c in full.cells if c.place["network"] == first or name in ("table8", "table9")]
    cells = [c.model_copy(update={"n": 3, "budget": 4, "trace": min(c.trace, 1)}) for c in kept]
    assert full.layout is not None
    layout = full.layout.model_copy(update={"at": (2, 4)[: len(full.layout.at)]})
    return full.model_copy(update={"cells": tuple(cells), "report_at": (2,), "layout": layout})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty images of each split, and three temperatures, so that fits and intervals take no time."""
    load = data.load

    def first(*arguments: Any) -> data.Images:
        return load(*arguments)[:60]

    monkeypatch.setattr(data, "load", first)
    monkeypatch.setattr(data, "batches", lambda *arguments: iter([first(*arguments)]))
    monkeypatch.setattr(calibration, "TEMPERATURES", np.array([0.5, 2.0]))
    monkeypatch.setattr(calibration, "ALLOWED_ECE", 1.0)  # sixty images allow no tau


@pytest.mark.parametrize("name", scaled())
def test_a_tiny_run_of_each_plan_stops_continues_and_is_shown(
    name: str, shared: Path, tmp_path: Path, few: None
) -> None:
    chosen, out = tiny(name), tmp_path / name
    assert bench.bench(chosen, out, share=shared, time_limit=0).left > 0 or list(shared.glob("cells/*"))
    assert bench.bench(chosen, out, share=shared).left == 0
    rows = page.write(out)
    assert len(rows) == len(chosen.cells)
    assert chosen.layout is not None
    found = sheets.sheet(*summary.collect(Store(out)))
    assert found.lines
    for line in found.lines:
        assert set(line.values) <= set(found.columns)
        assert all(value.ours for value in line.values.values())
    source = (out / "report.html").read_text(encoding="utf-8")
    assert all(column in source for column in found.columns)
    assert bool(chosen.layout.figures) == bool(list(out.glob("figures/*.png")))
    judged = reproduction.write(tmp_path, tmp_path / "account.md")
    text = (tmp_path / "account.md").read_text(encoding="utf-8")
    assert chosen.about in text
    assert len(judged) == len(claims.CLAIMS) + 1
    for picture in tmp_path.glob("images/reproduction/*.png"):
        assert f"](images/reproduction/{picture.name})" in text


def test_a_plan_that_is_not_finished_is_shown_as_far_as_it_is(few: None, tmp_path: Path) -> None:
    chosen = tiny("table6")
    done = chosen.model_copy(update={"cells": chosen.cells[:1], "layout": None, "paper": {}})  # undefended
    bench.bench(done, tmp_path / "other" / "a", share=tmp_path / "cells")
    bench.bench(chosen, tmp_path / "table6", share=tmp_path / "cells", time_limit=0)
    reproduction.write(tmp_path, tmp_path / "account.md")
    text = (tmp_path / "account.md").read_text(encoding="utf-8")
    assert "14 more cells are not recorded yet" in text
    assert "not recorded yet: table6" in text


def test_the_account_in_the_docs_is_that_of_the_recorded_results(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    reproduction.write(root / "results", tmp_path / "reproduction.md")
    written, committed = (
        (folder / "reproduction.md").read_text(encoding="utf-8") for folder in (tmp_path, root / "docs")
    )
    assert written == committed, "run `queryfoil reproduction results --out docs/reproduction.md`"


def test_an_account_needs_recorded_plans(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected folders of `queryfoil bench`"):
        reproduction.write(tmp_path, tmp_path / "account.md")


SMALL = """
name = "small"
about = "Two networks"
[defaults]
dataset = "fashion-mnist"
attack = "square"
eps = "16/255"
budget = 20
n = 40
[[grid]]
network = ["net"]
defense = ["None", "AT"]
[axis.network]
net = {}
[axis.defense]
None = { model = "fashion-resnet" }
AT = { model = "fashion-resnet-at" }
[layout]
columns = "defense"
users = []
at = [2, 20]
[paper]
"" = { None = "10 / 30", AT = "20 / 20" }
ECE = { None = "1", AT = "2" }
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[plan.Plan, list[summary.CellResult]]:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "small.toml").write_text(SMALL)
    bench.bench(plan.read(folder / "small.toml"), folder / "out")
    return summary.collect(Store(folder / "out"))


def test_a_difference_is_paired_over_the_images(pair: tuple[plan.Plan, list[summary.CellResult]]) -> None:
    none, trained = pair[1]
    left = [np.array([f > 20 for f in table.fooled_at(r.attacked)]) for r in (none, trained)]
    d = sheets.accuracy_difference(trained, none, 20)
    assert d.value == left[1].mean() - left[0].mean() > 0.2
    change = left[1].astype(int) - left[0].astype(int)
    assert d.spread == pytest.approx(2 * change.std(ddof=1) / np.sqrt(40), rel=0.1)
    assert d.sign == 1
    assert sheets.accuracy_difference(none, trained, 20).sign == -1
    assert sheets.accuracy_difference(none, none, 20).value == sheets.accuracy_difference(none, none, 20).sign == 0


@pytest.mark.parametrize("changed", range(3, 12))
def test_images_that_all_change_the_same_way_are_judged_like_a_sign_test(changed: int) -> None:
    differences = np.zeros(200)
    differences[:changed] = 1
    assert (sheets.paired(differences).sign > 0) == (2 * 0.5**changed < 0.05)


def test_the_papers_order_is_compared_pair_by_pair(pair: tuple[plan.Plan, list[summary.CellResult]]) -> None:
    found = sheets.sheet(*pair)
    assert found.columns == ["None", "AT"]
    ece, acc, left = found.lines
    assert acc.order == ""  # the paper's numbers are not given
    assert ece.order.startswith(("holds in", "open in"))
    d = sheets.accuracy_difference(pair[1][0], pair[1][1], 20)
    assert f"turned round in 1: AT above None at 20 by {-100 * d.value:.1f} ± {100 * d.spread:.1f}" in left.order
    values = [100 * np.mean(table.fooled_at(r.attacked) > 20) for r in pair[1]]
    for column, value in zip(found.columns, values, strict=True):
        assert f"/ {value:.1f} ±" in left.values[column].ours
    text = "\n".join(sheets.markdown(found))
    assert "*10 / 30*" in text


def test_claims_are_judged_by_what_is_recorded(pair: tuple[plan.Plan, list[summary.CellResult]]) -> None:
    base = pair[1][0].cell
    on_top = "On top of adversarial training, AAA adds defense and lowers the ECE"
    names = {"AT": "AT", "AT-AAA-linear": "None", "AT-AAA-linear, fitted": "None"}  # as if AAA on top of AT left less
    cells = []
    for network in ("x", "y"):
        for defense, column in names.items():
            for loss in ("logits-margin", "probability-margin", "cross-entropy"):
                r = next(r for r in pair[1] if r.cell.place["defense"] == column)
                place = {"network": network, "defense": defense, "loss": loss}
                cells.append(
                    summary.CellResult(base.model_copy(update={"place": place}), r.info, r.attacked, r.clean, r.trace)
                )
    full = plan.read("table8")
    judged = {j.claim: j for j in claims.judge({"table8": (full, cells)}, None)}
    assert judged[on_top].verdict == verdicts.OPEN
    assert "not recorded yet: table8: WideResNet-34" in judged["The attacker's loss does not matter"].measured
    here = full.model_copy(update={"cells": tuple(r.cell for r in cells)})
    judged = {j.claim: j for j in claims.judge({"table8": (here, cells)}, None)}
    assert judged[on_top].verdict == verdicts.PARTLY  # but has a lower ECE
    assert judged["The attacker's loss does not matter"].verdict == verdicts.OPEN  # 40 images cannot tell
    assert judged["AAA does not hurt accuracy"].verdict == verdicts.OPEN


@pytest.mark.parametrize(("aaa", "verdict"), [(0.01, verdicts.HOLDS), (0.9, verdicts.FAILS)])
def test_the_limits_are_judged_by_their_file(aaa: float, verdict: str) -> None:
    rows = [
        {
            "attacker": a,
            "defense": d,
            "accuracy": aaa if d == "AAA-linear" else 0.01,
            "n": 300,
            "wrong": list(range(round(300 * (1 - aaa)) if d == "AAA-linear" else 297)),
        }
        for a in ("white-box", "transfer")
        for d in ("None", "AAA-linear", "AT")
    ]
    assert claims.judge({}, json.loads(json.dumps(rows)))[-1].verdict == verdict


@pytest.mark.parametrize(
    ("value", "spread", "margin", "is_above", "is_near"),
    [
        (0.05, 0.02, 0.0, True, False),
        (0.01, 0.02, 0.0, None, False),
        (-0.05, 0.02, 0.0, False, False),
        (-0.005, 0.004, 1.0, True, True),
        (-0.02, 0.02, 3.0, None, None),
        (0.02, 0.005, 3.0, True, True),
    ],
)
def test_a_comparison_is_shown_refuted_or_open(
    value: float, spread: float, margin: float, is_above: verdicts.Shown, is_near: verdicts.Shown
) -> None:
    d = Difference(value, spread)
    assert verdicts.above(d, margin) is is_above
    if margin:
        assert verdicts.near(d, margin) is is_near


def test_a_share_of_few_images_is_open() -> None:
    assert verdicts.below(0, 200, 1.0) is None
    assert verdicts.below(0, 2000, 1.0) is True
    assert verdicts.below(30, 200, 1.0) is False


def test_cells_of_other_code_are_said(few: None, tmp_path: Path) -> None:
    chosen = tiny("figure5")
    bench.bench(chosen, tmp_path / "figure5")
    reproduction.write(tmp_path, tmp_path / "account.md")
    assert "of other code" not in (tmp_path / "account.md").read_text(encoding="utf-8")
    for path in tmp_path.glob("figure5/cells/*/cell.json"):
        content = json.loads(path.read_text())
        assert "queryfoil.attacks.square" in content["code"]
        content["code"]["queryfoil.attacks.square"] = "another"
        path.write_text(json.dumps(content))
    reproduction.write(tmp_path, tmp_path / "account.md")
    assert "**4 are of other code than now**" in (tmp_path / "account.md").read_text(encoding="utf-8")


def test_two_folders_of_one_plan_are_refused(few: None, tmp_path: Path) -> None:
    for name in ("a", "b"):
        bench.bench(tiny("figure5"), tmp_path / name, share=tmp_path / "cells", time_limit=0)
    with pytest.raises(ValueError, match="figure5 is in several"):
        reproduction.write(tmp_path, tmp_path / "account.md")
