"""Plans on data sets that do not ship, with models of one's own."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import queryfoil as qf
from helpers import Linear
from queryfoil import bench, cli, plan, prepare, store, summary
from queryfoil.attacks import build
from queryfoil.oracle import answers
from queryfoil.run import run
from test_cifar import write

CELLS = """
name = "own"
about = "A model of one's own on CIFAR-10"
report_at = [5]
[defaults]
dataset = "cifar10"
model = "tiny_models:colour"
attack = "square"
eps = "16/255"
budget = 12
n = 40
[[cell]]
label = "undefended"
[[cell]]
label = "AAA"
defenses = [{ name = "aaa", fit = true, tau = 0.5 }]
"""
GREY = """
[[cell]]
label = "clothes"
dataset = "fashion-mnist"
model = "fashion-resnet"
n = 4
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with a model of 3 x 32 x 32, and 600 images as fake CIFAR-10."""
    module = type(sys)("tiny_models")
    module.colour = lambda: Linear((3, 32, 32))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiny_models", module)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cifar", "bin", n=600)


def read(text: str) -> plan.Plan:
    Path("own.toml").write_text(text)
    return plan.read("own.toml")


def rows(folder: Path) -> list[dict[str, Any]]:
    return summary.rows(*summary.collect(store.Store(folder)))


def test_a_plan_on_a_folder_with_a_model_of_ones_own(tmp_path: Path) -> None:
    assert bench.bench(read(CELLS), tmp_path / "out", tmp_path / "cifar").left == 0
    undefended, aaa = rows(tmp_path / "out")
    attack = qf.data.load("cifar10", "attack", tmp_path / "cifar")
    model = Linear((3, 32, 32))
    right = (answers(model, attack.images, attack.ids, attack.ids * 0).argmax(1) == attack.labels).double()
    assert undefended["unseen_n"] == aaa["unseen_n"] == 540
    assert undefended["unseen_accuracy"] == pytest.approx(right.mean().item())
    assert undefended["clean_accuracy"] == pytest.approx(right[:40].mean().item())
    task = read(CELLS).cells[0].task(attack[:40], None)
    result = run(build("square"), model, task, 12)
    assert undefended["queries_total"] == int(result.queries.sum())
    assert aaa["labels_changed"] == 0
    fitted = aaa["defenses"][0]["fitted"]
    assert (fitted["n"], fitted["classes"]) == (60, 10)
    held_out = qf.data.load("cifar10", "calibration", tmp_path / "cifar")
    scores = answers(model, held_out.images, held_out.ids, held_out.ids * 0)
    assert fitted["temperature"] == qf.fit(scores, held_out.labels, objective="greedy", tau=0.5).temperature
    assert (undefended["model"], undefended["dataset"]) == ("tiny_models:colour", "cifar10")


def test_each_data_set_is_read_once_for_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, read_splits = qf.data.load, []

    def counted(name: str, split: str, folder: Any = None) -> qf.data.Images:
        read_splits.append(split)
        return load(name, split, folder)

    monkeypatch.setattr(prepare.data, "load", counted)
    bench.bench(read(CELLS), tmp_path / "out", tmp_path / "cifar", time_limit=0)
    assert read_splits == ["attack", "calibration"]


def test_a_plan_of_two_data_sets_names_their_folders(tmp_path: Path) -> None:
    command = ["bench", "own.toml", "--out", "out", "--data", "cifar10=cifar"]
    read(CELLS + GREY)
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("out/summary.json").read_text())
    assert [row["dataset"] for row in found] == ["cifar10", "cifar10", "fashion-mnist"]
    assert [row["unseen_n"] for row in found] == [540, 540, 1000]


@pytest.mark.parametrize(
    ("more", "arguments", "message"),
    [
        ("", [], "for cifar10, which does not ship with the library, but got none; pass it by --data cifar10=FOLDER"),
        ("", ["--data", "nowhere"], "for cifar10, in nowhere, but there is no such folder or file"),
        ("", ["--data", "cifar=cifar"], "unknown data set of the plan 'cifar'"),
        ("", ["--data", "fashion-mnist=x", "--data", "cifar10=cifar"], "unknown data set of the plan 'fashion-mnist'"),
        ("", ["--data", "cifar10="], "expected one folder, or NAME=FOLDER for each data set once, but got 'cifar10='"),
        ("", ["--data", "cifar", "--data", "cifar"], "NAME=FOLDER for each data set once, but got 'cifar'"),
        (GREY, ["--data", "cifar"], "the plan has several data sets (cifar10, fashion-mnist): name each one's folder"),
        (GREY, [], "pass it by --data cifar10=FOLDER"),
    ],
)
def test_folders_are_checked_before_anything_runs(more: str, arguments: list[str], message: str) -> None:
    read(CELLS + more)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["bench", "own.toml", "--out", "out", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not Path("out").exists()


def test_a_folder_whose_name_has_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "cifar").rename(tmp_path / "a=b")
    assert prepare.folders(["a=b"]) == "a=b"
    assert prepare.folders([]) is None


def test_the_key_of_a_cell_follows_the_model_and_its_input(tmp_path: Path) -> None:
    cell = read(CELLS).cells[0]

    def key(**changed: Any) -> str:
        return prepare.prepare(plan.Cell(**{**cell.model_dump(), **changed}), tmp_path / "cifar", "cpu").key

    assert key() == key(label="other")
    before = key()
    assert len({before, key(mean=[0.5], std=[0.5]), key(mean=[0.5], std=[0.25]), key(output="log_probs")}) == 4
    sys.modules["tiny_models"].colour = lambda: Linear((3, 32, 32), seed=1)  # type: ignore[attr-defined]
    assert key() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('model = "tiny_models:colour"', 'model = "colour"'), "unknown model 'colour'"),
        (("n = 40", "n = 40\nmean = 0.5"), "expected mean and std together"),
        (("n = 40", "n = 40\nmean = 0.5\nstd = 0"), "expected std > 0"),
        (("n = 40", "n = 40\nsize = 0"), "size: Input should be greater than or equal to 1"),
        (('model = "tiny_models:colour"', 'model = "fashion-resnet"\nsize = 28'), "has its normalization inside"),
    ],
)
def test_a_wrong_model_is_refused_as_the_plan_is_read(change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(CELLS.replace(*change))


def test_a_model_that_cannot_answer_the_images_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"answers such images, but the model raised RuntimeError on images \(2, 3, 32, 32\)"
    ):
        bench.bench(read(CELLS.replace("tiny_models:colour", "fashion-resnet")), tmp_path / "out", tmp_path / "cifar")
    assert not (tmp_path / "out").exists()
