"""The command line: help, errors in a line, exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from queryfoil import Fit, __version__, cli, data, models, oracle, terminal

PLAN = """
name = "one"
about = "One cell"
[[cell]]
label = "undefended"
dataset = "fashion-mnist"
model = "fashion-resnet"
attack = "square"
eps = "16/255"
budget = 3
n = 4
"""


@pytest.fixture
def one(tmp_path: Path) -> Path:
    path = tmp_path / "one.toml"
    path.write_text(PLAN)
    return path


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])


def test_version() -> None:
    assert call("--version").output.strip() == __version__


@pytest.mark.parametrize("command", [[], ["bench"], ["attack"], ["report"], ["train"], ["fit"], ["list"]])
def test_help_explains_itself(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert len(result.output) > 200


def test_list_names_everything() -> None:
    output = call("list").output
    for name in ("square", "aaa", "input_noise", "fashion-resnet", "fashion-mnist", "quick"):
        assert name in output


def test_bench_prints_the_table_and_where_the_report_is(one: Path, tmp_path: Path) -> None:
    result = call("bench", one, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "undefended" in result.output
    assert str(tmp_path / "out" / "report.html") in result.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())[0]["n"] == 4
    again = call("report", tmp_path / "out")
    assert again.output == result.output


def test_a_time_limit_has_its_own_exit_status(one: Path, tmp_path: Path) -> None:
    result = call("bench", one, "--out", tmp_path / "out", "--time-limit", 0)
    assert result.exit_code == terminal.STOPPED
    assert "4 of 4 images are still to be attacked" in result.output
    assert "run the same command" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "quik", "--out", "x"], "did you mean 'quick'"),
        (["bench", "no.toml", "--out", "x"], "expected a plan at no.toml"),
        (["report", "nowhere"], "expected a folder written by `queryfoil bench`"),
        (["train", "fashion-resnt", "--data", "x", "--out", "y"], "did you mean 'fashion-resnet'"),
        (["bench", "quick", "--out", "x", "--device", "tpu9"], "expected a device that torch can use here"),
        (["train", "fashion-resnet", "--data", "nowhere", "--out", "y"], "expected train-images-idx3-ubyte"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_damaged_chunk_is_said(one: Path, tmp_path: Path) -> None:
    call("bench", one, "--out", tmp_path / "out")
    chunk = next(tmp_path.glob("out/cells/*/chunk-*.parquet"))
    chunk.write_bytes(b"broken")
    result = call("bench", one, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "damaged" in result.stderr
    assert chunk.name in result.stderr


def test_fit_reads_logits_and_writes_a_fit(tmp_path: Path) -> None:
    held_out = data.load("fashion-mnist", "calibration")[:300]
    logits = oracle.answers(models.load("fashion-resnet"), held_out.images, held_out.ids, held_out.ids, micro_batch=150)
    np.savez(tmp_path / "logits.npz", logits=logits.numpy(), labels=held_out.labels.numpy())
    result = call("fit", tmp_path / "logits.npz", "--out", tmp_path / "fit.json", "--objective", "greedy", "--tau", 2)
    assert result.exit_code == 0, result.output
    assert Fit.load(tmp_path / "fit.json").tau == 2
    lowest = call(
        "fit",
        tmp_path / "logits.npz",
        "--out",
        tmp_path / "lowest.json",
        "--objective",
        "greedy",
        "--tau",
        2,
        "--rule",
        "lowest",
    )
    assert lowest.exit_code == 0, lowest.output
    assert Fit.load(tmp_path / "lowest.json").rule == "lowest"
    assert Fit.load(tmp_path / "lowest.json").ece <= Fit.load(tmp_path / "fit.json").ece
    np.savez(tmp_path / "wrong.npz", logit=logits.numpy(), labels=held_out.labels.numpy())
    assert "did you mean 'logit'" in call("fit", tmp_path / "wrong.npz", "--out", tmp_path / "fit.json").stderr


def test_nothing_but_the_table_is_printed_when_not_on_a_terminal(one: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "queryfoil.cli", "bench", str(one), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"})
    assert result.stderr == ""
    assert "\x1b" not in result.stdout


def test_progress_is_shown_on_a_terminal(one: Path, tmp_path: Path) -> None:
    on_terminal = [sys.executable, "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"]
    command = [*on_terminal, sys.executable, "-m", "queryfoil.cli", "bench", str(one), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=120)
    assert "queries/s" in result.stdout
