"""`queryfoil attack`: models and images of one's own, lossless files, resuming."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

import queryfoil as qf
from helpers import Linear, images, labels_of, levels
from queryfoil import attacking, chunks, cli, pictures, terminal
from test_victim import write_onnx

N = 12
OPTIONS: dict[str, Any] = {"attack": "square", "eps": "16/255", "budget": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `Linear` in a module and as an ONNX file, images, and images in a NumPy file."""
    root = tmp_path_factory.mktemp("mine")
    write_onnx(root / "linear.onnx")
    tests = str(Path(__file__).parent)
    (root / "linear_model.py").write_text(
        f"import sys\nsys.path.append({tests!r})\nfrom helpers import Linear\ndef net(): return Linear()\n"
    )
    x = images(N)
    labels = labels_of(Linear(), x)
    labels[0] = (labels[0] + 1) % 10
    lines = ["file,label,target"]
    for number, label in enumerate(labels.tolist()):
        pictures.write_picture(root / f"images/{number}.png", levels(x[number]).byte().numpy())
        lines.append(f"{number}.png,{label},{(label + 3) % 10}")
    (root / "images/labels.csv").write_text("\n".join(lines))
    np.savez(root / "images.npz", images=levels(x).byte().numpy(), labels=labels.numpy())
    return root


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])


def run(out: Path, chunk: int = 250, **changed: Any) -> dict[str, Any]:
    request = attacking.request(**{"model": "linear.onnx", "images": "images", **OPTIONS, **changed})
    outcome, rows = attacking.attack(request, out, chunk=chunk)
    assert outcome.left == 0
    written: dict[str, Any] = json.loads((out / "summary.json").read_text())[0]
    assert json.loads(json.dumps(rows)) == [written]
    return written


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["attack", *(str(a) for a in arguments)])


def table(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / "images.parquet").to_pylist()
    return found


def test_the_command_is_the_library_s_attack(folder: Path, tmp_path: Path) -> None:
    row = run(tmp_path)
    given = pictures.read("images").images
    result = qf.attack(Linear(), given.images, given.labels, "square", eps=16 / 255, budget=40)
    assert [r["queries"] for r in table(tmp_path)] == result.queries.tolist()
    assert row["accuracy"] == {"40": result.accuracy()}
    assert row["clean_accuracy"] == result.accuracy(1) == (N - 1) / N
    assert row["average_queries"] == {"40": result.average_queries()}
    assert row["queries_total"] == int(result.queries.sum())


def test_every_kind_of_model_and_of_images_gives_the_same_result(folder: Path, tmp_path: Path) -> None:
    rows, tables = [], []
    for number, (model, source) in enumerate(
        [("linear.onnx", "images"), ("linear_model:net", "images"), ("linear.onnx", "images.npz")]
    ):
        rows.append(run(tmp_path / str(number), model=model, images=source))
        tables.append(
            [{k: v for k, v in r.items() if k not in ("cell", "file")} for r in table(tmp_path / str(number))]
        )
    assert tables[0] == tables[1] == tables[2]
    assert list(rows[1]["model_hashes"]) == ["source", "code", "weights"]
    assert [r["file"] for r in table(tmp_path / "1")] == [f"{i}.png" for i in range(N)]
    assert [r["file"] for r in table(tmp_path / "2")] == [None] * N


def test_adversarial_images_are_lossless_and_can_be_attacked_again(folder: Path, tmp_path: Path) -> None:
    row = run(tmp_path / "out")
    rows = table(tmp_path / "out")
    fooled = [r for r in rows if r["adversarial"] is not None]
    assert 0 < len(fooled) == row["adversarial_files"] == row["reached_again"] < N
    assert {p.name for p in (tmp_path / "out/adversarial").glob("*.png")} == {r["adversarial_file"] for r in fooled}
    for r in fooled:
        values = pictures.read_picture(tmp_path / "out/adversarial" / r["adversarial_file"])
        assert values.tobytes() == r["adversarial"]
        answer = Linear()(torch.from_numpy(values)[None] / 255)[0]
        assert answer.argmax() == r["shown"]
        clean = pictures.read_picture(folder / "images" / r["file"])
        assert np.abs(values.astype(int) - clean.astype(int)).max() <= 16
    assert [(r["shown"], r["adversarial_file"]) for r in rows if r["adversarial"] is None] == [(None, None)] * (
        N - len(fooled)
    )
    again = run(tmp_path / "again", images=str(tmp_path / "out/adversarial"), budget=1)
    assert again["n"] == len(fooled)
    assert again["clean_accuracy"] == 0
    assert attacking.about_pictures(again) == "none, as no image was fooled by the attack"


def test_a_killed_command_continues_to_the_same_result(folder: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", budget=100, eps="3/255")
    command = [sys.executable, "-m", "queryfoil.cli", "attack", "linear.onnx", "--images", "images", "--eps", "3/255"]
    command += ["--budget", "100", "--chunk", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/cells/*/chunk-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/cells/*/chunk-*.parquet")}
    assert done
    assert not (tmp_path / "out/summary.json").exists()
    row = run(tmp_path / "out", chunk=2, budget=100, eps="3/255")
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert {**row, "seconds": 0} == {**whole, "seconds": 0}
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_an_interrupted_attack_keeps_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    attack, calls = chunks.run, []

    def interrupted(*arguments: Any, **others: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attack(*arguments, **others)

    monkeypatch.setattr(chunks, "run", interrupted)
    arguments = ["linear.onnx", "--images", "images", "--eps", "16/255", "--budget", 40, "--chunk", 5]
    result = call(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "run the same command to continue" in result.stderr
    monkeypatch.setattr(chunks, "run", attack)
    assert len(list(tmp_path.glob("out/cells/*/chunk-*.parquet"))) == 2
    assert {**whole, "seconds": 0} == {**run(tmp_path / "out", chunk=5), "seconds": 0}


def test_a_time_limit_stops_before_any_picture_is_written(tmp_path: Path) -> None:
    result = call("linear.onnx", "--images", "images", "--out", tmp_path / "out", "--time-limit", 0)
    assert result.exit_code == terminal.STOPPED
    assert f"{N} of {N} images are still to be attacked" in result.output
    assert not (tmp_path / "out/adversarial").exists()


def test_a_finished_folder_is_not_attacked_again_and_stale_pictures_go(tmp_path: Path) -> None:
    row = run(tmp_path)
    (tmp_path / "adversarial/999999.png").write_bytes(b"of other weights")
    (tmp_path / "adversarial/.000001.png.abc").write_bytes(b"half written")
    picture = next((tmp_path / "adversarial").glob("0*.png"))
    picture.write_bytes(b"damaged")
    assert run(tmp_path) == row
    assert len(list((tmp_path / "adversarial").iterdir())) == row["adversarial_files"] + 1
    assert pictures.read_picture(picture).shape == (1, 8, 8)


def test_a_folder_of_other_settings_or_files_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "out")
    with pytest.raises(ValueError, match=r"results of another attack .* they differ in budget, seed; choose another"):
        run(tmp_path / "out", budget=41, seed=1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.txt").write_text("sun")
    with pytest.raises(ValueError, match="to be new, empty or of `queryfoil attack`, but it holds other files"):
        run(tmp_path / "photos")
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path / "out")])
    assert "expected a folder written by `queryfoil bench`" in result.stderr


def test_results_follow_the_bytes_of_model_and_images(folder: Path, tmp_path: Path) -> None:
    key = run(tmp_path / "a")["cell"]
    for copy in ("linear.onnx", "images.npz"):
        (tmp_path / copy).write_bytes((folder / copy).read_bytes())
    assert run(tmp_path / "b", images=str(tmp_path / "images.npz"))["cell"] == key
    (tmp_path / "linear.onnx.data").write_bytes(b"other weights")
    assert run(tmp_path / "c", model=str(tmp_path / "linear.onnx"))["cell"] != key
    assert run(tmp_path / "d", n=N - 1)["cell"] != key


def test_targets_come_with_the_images_or_are_drawn(tmp_path: Path) -> None:
    given = run(tmp_path / "a", targeted=True, eps="80/255", budget=100)
    drawn = run(tmp_path / "b", targeted=True, eps="80/255", budget=100, images="images.npz")
    rows = table(tmp_path / "a")
    assert all(r["target"] == (r["label"] + 3) % 10 for r in rows)
    assert all(r["shown"] in (r["target"], None) for r in rows)
    assert any(r["shown"] is not None for r in rows)
    assert (tmp_path / "a/adversarial/labels.csv").read_text().startswith("file,label,target\n")
    assert all(r["target"] != r["label"] for r in table(tmp_path / "b"))
    assert given["targeted"]
    assert drawn["targeted"]


def test_a_protected_model(folder: Path, tmp_path: Path) -> None:
    given = images(60, seed=1)
    found = qf.fit(Linear()(given).detach(), labels_of(Linear(), given), objective="greedy", tau=2.0)
    found.save(tmp_path / "fit.json")
    row = run(tmp_path / "out", defense="aaa", fit=tmp_path / "fit.json")
    assert row["label"] == "linear.onnx behind aaa"
    assert row["defenses"][0]["fitted"]["tau"] == 2.0
    x = pictures.read("images").images
    expected = qf.attack(qf.AAA.from_fit(Linear(), found), x.images, x.labels, eps=16 / 255, budget=40)
    assert row["accuracy"] == {"40": expected.accuracy()}
    other = json.loads((tmp_path / "fit.json").read_text()) | {"classes": 7}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"expected a fit of 10 classes, as the model has, but .* has 7"):
        run(tmp_path / "new", defense="aaa", fit=tmp_path / "other.json")


def test_settings_of_a_defense(tmp_path: Path) -> None:
    row = run(tmp_path / "out", defense="aaa", defense_hyper={"tau": 2.0, "curve": "sine"})
    x = pictures.read("images").images
    expected = qf.attack(qf.AAA(Linear(), tau=2.0, curve="sine"), x.images, x.labels, eps=16 / 255, budget=40)
    assert row["accuracy"] == {"40": expected.accuracy()}
    assert row["defenses"] == [{"name": "aaa", "tau": 2.0, "curve": "sine", "fitted": None}]
    rounded = run(tmp_path / "other", defense="bit_depth", defense_hyper={"bits": 1})
    assert rounded["accuracy"] != row["accuracy"]


def test_a_randomized_model_is_not_asked_again_but_confirmed(tmp_path: Path) -> None:
    row = run(tmp_path, defense="input_noise")
    assert row["reached_again"] is None
    assert row["confirmed"] is not None
    assert "not asked about again, as the model is randomized" in attacking.about_pictures(row)
    assert {r["shown"] for r in table(tmp_path)} == {None}


def test_a_model_that_changes_its_mind_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("fickle")
    calls = []

    def fickle(x: torch.Tensor) -> torch.Tensor:
        """Another class from the fourth call on, but for the last one."""
        calls.append(x)
        return torch.eye(2)[torch.full((len(x),), int(len(calls) == 4))]

    module.net = lambda: fickle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fickle", module)
    np.savez(tmp_path / "one.npz", images=np.full((1, 1, 8, 8), 128, np.uint8), labels=[0])
    with pytest.warns(UserWarning, match="1 of 1 recorded successes do not reach the goal when asked again"):
        row = run(tmp_path / "out", model="fickle:net", images=str(tmp_path / "one.npz"))
    assert (row["adversarial_files"], row["reached_again"]) == (1, 0)
    assert row["model_hashes"] == {}


def test_the_command_prints_what_it_found(tmp_path: Path) -> None:
    arguments = ["linear_model:net", "--images", "images", "--eps", "16/255", "--budget", 40, "--set", "p_init=0.2"]
    result = call(*arguments, "--out", tmp_path / "out", "--n", 6)
    assert result.exit_code == 0, result.output
    for text in ("linear_model:net", "clean accuracy", "accuracy at 40", "n = 6", "p_init 0.2", "PNG files, read back"):
        assert text in result.output
    assert "ECE" not in result.output
    assert result.stderr == ""


def test_texts_become_the_values_that_they_look_like() -> None:
    found = attacking.hyper(["a=1", "b=1e-3", "c=True", "d=imagenet", "e=x=y", "f="])
    assert found == {"a": 1, "b": 0.001, "c": True, "d": "imagenet", "e": "x=y", "f": ""}
    assert [type(v) for v in found.values()] == [int, float, bool, str, str, str]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--eps", "much"], "expected a number or a fraction such as '16/255', but got 'much'"),
        (["--eps", "0"], "eps: Input should be greater than 0"),
        (["--budget", "0"], "budget: Input should be greater than or equal to 1"),
        (["--n", "0"], "n: Input should be greater than or equal to 1"),
        (["--n", "13"], "expected n <= 12, the number of images, but got n = 13"),
        (["--attack", "sqare"], "did you mean 'square'"),
        (["--norm", "l1"], "unknown norm 'l1'"),
        (["--loss", "hinge"], "unknown loss 'hinge'"),
        (["--accept", "nope"], "unknown acceptance rule 'nope'"),
        (["--set", "p_init"], "expected a hyper-parameter as KEY=VALUE, each key once, but got 'p_init'"),
        (["--set", "horizon=5", "--set", "horizon=6"], "each key once, but got 'horizon=6'"),
        (["--set", "p_int=0.1"], "square does not take these hyper-parameters: p_int"),
        (["--set", "tau=2"], "no part of this attack takes tau, so tau=2 would have no effect"),
        (["--set", "p_init=2.0"], "expected p_init in (0, 1], but got 2.0"),
        (["--set", "p_init=half"], "expected p_init in (0, 1], but got 'half'"),
        (["--defense", "aa"], "did you mean 'aaa'"),
        (["--defense", "aaa"], "fit is missing; pass the file that `queryfoil fit` wrote"),
        (["--defense", "terraces"], "terraces is fitted to a model, but fit is missing"),
        (["--fit", "fit.json"], "fit is for the defense aaa or terraces and would have no effect"),
        (["--defense", "aaa", "--fit", "nowhere.json"], "No such file or directory: nowhere.json"),
        (["--defense", "jpeg", "--defense-set", "qualty=50"], "unknown argument of jpeg 'qualty'"),
        (["--defense", "jpeg", "--defense-set", "quality=500"], "expected quality as an integer from 1 to 95"),
        (["--defense-set", "quality=50"], "settings of a defense would have no effect without one"),
        (["--output", "scores"], "unknown output 'scores'"),
        (["--device", "tpu9"], "expected a device that torch can use here"),
        (["--images", "nowhere"], "expected images at nowhere, but there are none"),
    ],
)
def test_what_is_wrong_is_said_before_a_query_and_a_file(tmp_path: Path, changed: list[str], message: str) -> None:
    result = call("linear.onnx", "--images", "images", "--out", tmp_path / "out", *changed)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": np.zeros((2, 1, 9, 9), np.uint8), "labels": [0, 1]},
            "expected a model that answers such images, but the model raised",
        ),
        (
            {"images": np.zeros((2, 4, 4, 4), np.uint8), "labels": [0, 1]},
            "expected grey or RGB images (1 or 3 channels)",
        ),
        (
            {"images": np.zeros((2, 1, 8, 8), np.uint8), "labels": [0, 10]},
            "expected labels in 0..9, as the model has 10",
        ),
        ({"images": np.zeros((2, 1, 8, 8), np.uint8), "labels": [0.0, 1.0]}, "as an integer for each of the 2 images"),
        ({"images": np.zeros((2, 1, 8, 8), np.uint8), "labels": [0, 1], "ids": [3, 3]}, "expected each id once"),
        (
            {"images": np.full((2, 1, 8, 8), 7, np.float32), "labels": [0, 1]},
            "expected images in [0, 1], but got values",
        ),
    ],
)
def test_images_that_the_model_cannot_take(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "wrong.npz", **arrays)
    result = call("linear_model:net", "--images", tmp_path / "wrong.npz", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_pictures_of_the_user_are_never_touched(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "work/adversarial"
    shutil.copytree(folder / "images", mine)
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    with pytest.raises(ValueError, match="holds other files"):
        run(tmp_path / "work")
    with pytest.raises(ValueError, match=r"holds other files|the images lie there"):
        run(tmp_path / "work", images=str(mine))
    run(tmp_path / "out")
    note = tmp_path / "out/adversarial/shirt.png"
    note.write_bytes(b"mine")
    with pytest.raises(ValueError, match="the images lie there; choose another folder"):
        run(tmp_path / "out", images=str(tmp_path / "out/adversarial"))
    run(tmp_path / "out")
    assert note.read_bytes() == b"mine"
    assert {p.name: p.read_bytes() for p in mine.iterdir()} == before


def test_a_file_in_the_place_of_the_pictures_is_said_before_a_query(folder: Path, tmp_path: Path) -> None:
    run(tmp_path)
    shutil.rmtree(tmp_path / "adversarial")
    (tmp_path / "adversarial").write_text("mine")
    with pytest.raises(ValueError, match="to be a folder or not there yet, but it is a file"):
        run(tmp_path)


def test_a_folder_without_results_can_be_taken_by_other_settings(folder: Path, tmp_path: Path) -> None:
    request = attacking.request(model="linear.onnx", images="images", attack="square", eps="16/255", budget=9)
    attacking.attack(request, tmp_path, time_limit=0)
    assert (tmp_path / "attack.json").is_file()
    assert run(tmp_path, budget=12)["budget"] == 12
    with pytest.raises(ValueError, match="holds results of another attack"):
        run(tmp_path, budget=13)


def test_l2_needs_a_radius(folder: Path) -> None:
    result = CliRunner().invoke(cli.app, ["attack", "linear.onnx", "--images", "images", "--out", "o", "--norm", "l2"])
    assert result.exit_code == 2
    assert "expected --eps, the length that an image may be changed by in L2" in result.stderr
