"""Plans as grids of named choices, at two scales."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from queryfoil import cli, grid, plan
from queryfoil.models.checkpoints import PUBLISHED

OWN = """
name = "own"
about = "A grid"
[defaults]
dataset = "fashion-mnist"
attack = "square"
eps = "16/255"
budget = 9
n = 5
[[grid]]
network = ["a", "b"]
curve = ["none", "sine"]
seed = [0, 7]
[[cell]]
label = "alone"
model = "fashion-resnet"
[axis.network]
a = { names = { own = "fashion-resnet" }, hyper = { p_init = 0.1 } }
b = { names = { own = "fashion-wrn" }, n = 3 }
[axis.curve]
none = { model = "{own}" }
sine = { model = "{own}", defenses = [{ name = "aaa", curve = "sine", tau = 2.0 }], hyper = { horizon = 500 } }
"""


def read(tmp_path: Path, text: str, scale: str | None = None) -> plan.Plan:
    (tmp_path / "own.toml").write_text(text)
    return plan.read(tmp_path / "own.toml", scale)


def test_a_grid_has_a_cell_for_each_combination(tmp_path: Path) -> None:
    found = read(tmp_path, OWN)
    assert [cell.label for cell in found.cells] == [
        "alone",
        "a, none, seed 0",
        "a, none, seed 7",
        "a, sine, seed 0",
        "a, sine, seed 7",
        "b, none, seed 0",
        "b, none, seed 7",
        "b, sine, seed 0",
        "b, sine, seed 7",
    ]
    cell = found.cells[4]
    assert (cell.model, cell.seed, cell.n, cell.hyper) == ("fashion-resnet", 7, 5, {"p_init": 0.1, "horizon": 500})
    assert cell.place == {"network": "a", "curve": "sine", "seed": "7"}
    assert (found.cells[6].model, found.cells[6].n) == ("fashion-wrn", 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('["none", "sine"]', '["none", "cosine"]'), "unknown curve 'cosine': expected one of none, sine"),
        (("{own}", "{mine}"), "unknown name in this cell 'mine'"),
        (("[[grid]]", "[[grid]]\ncolour = [1]"), "unknown axis 'colour'"),
        (('["none", "sine"]', '"none"'), "expected a list of names for the axis curve, but got 'none'"),
        (("seed = [0, 7]", "seed = [0, -1]"), "seed: Input should be greater than or equal to 0"),
        (("[[grid]]", "[grid]"), "expected tables"),
    ],
)
def test_a_wrong_grid_is_refused_with_a_reason(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, OWN.replace(*change, 1))


def test_a_scale_without_effect_or_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the plan has no scales, so scale='paper' would have no effect"):
        read(tmp_path, OWN, "paper")
    with pytest.raises(ValueError, match="unknown scale 'large': expected one of paper, small"):
        read(tmp_path, OWN + "[scale]\n", "large")
    assert read(tmp_path, OWN + "[scale]\n").scale == "small"


def scaled() -> list[str]:
    return [name for name in plan.shipped() if plan.read(name).scale]


@pytest.mark.parametrize("name", scaled())
def test_the_scales_of_a_plan_differ_in_names_and_sizes_alone(name: str) -> None:
    small, paper = (plan.read(name, scale) for scale in grid.scales())
    assert [c.label for c in small.cells] == [c.label for c in paper.cells]

    def others(cell: plan.Cell) -> Any:
        sizes = {"model", "dataset", "n", "hyper"} | ({"eps"} if cell.norm == "linf" else set())
        return cell.model_dump(exclude=sizes)

    assert list(map(others, small.cells)) == list(map(others, paper.cells))
    for cell in paper.cells:
        assert cell.model.partition("=")[0] in PUBLISHED
        assert cell.n == {"cifar10": 9000, "imagenet": 1000}[cell.dataset]


@pytest.mark.parametrize("name", scaled())
def test_the_papers_numbers_stand_in_rows_and_columns_that_the_plan_has(name: str) -> None:
    found = plan.read(name)
    assert found.layout is not None
    columns = {cell.place[found.layout.columns] for cell in found.cells if found.layout.columns in cell.place}
    for row, entries in found.paper.items():
        assert set(entries) <= columns, row
        for text in entries.values():
            assert len(text.split("/")) in (1, len(found.layout.at))
    assert found.layout.ours in (None, *columns)


def test_the_scale_paper_lists_all_that_is_missing_before_anything_runs(tmp_path: Path) -> None:
    arguments = ["bench", "table3", "--scale", "paper", "--checkpoints", "weights", "--out", str(tmp_path / "out")]
    result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, arguments)
    assert result.exit_code == 2
    for text in (
        "--data cifar10=FOLDER",
        "the weights of Standard at weights/Standard.pt, but there are none (CIFAR-10, undefended WRN-28-10; Robust",
        "the weights of PNI-W at weights/PNI-W.pth.tar",
        "`queryfoil train cifar10-trs` writes TRS.safetensors",
    ):
        assert text in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[axis.odd]\nx = 5\n", "expected tables for x, but got 5"),
        ("[scale]\nsmall = 5\n", "expected tables for axis, but got 5"),
        ('[layout]\ncolumns = "colour"\n', "unknown axis of the layout 'colour'"),
        ('[layout]\ncolumns = "curve"\nat = [10]\n', "expected at <= the budget of every cell, but got 10"),
        ('[layout]\ncolumns = "curve"\nours = "linear"\nat = [9]\n', "unknown column of the layout 'linear'"),
        ('[layout]\ncolumns = "curve"\nat = [9]\n', "expected one cell for each row and column of the layout"),
        (
            '[layout]\ncolumns = "curve"\nrows = ["network"]\nover = "seed"\nat = [9]\n'
            '[paper]\na = { none = "39,38" }\n',
            "expected the paper's numbers as '39.38' or '39.38 / 0.09', but got '39,38'",
        ),
        ('[paper]\na = { none = "39" }\n', "the paper's numbers are shown by a layout"),
    ],
)
def test_a_wrong_layout_is_refused_before_anything_runs(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, OWN + more)


def test_a_name_that_means_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown name in this cell 'own'"):
        read(tmp_path, OWN.replace('own = "fashion-resnet"', 'own = "{own}"'))
