"""A plan on a Ray cluster: the bits of one process, whatever dies in between; what is missing or wrong is told."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from queryfoil import bench, cli, plan, prepare
from queryfoil.chunks import Progress
from queryfoil.cluster import Ray, connection, driver, engine, worker
from queryfoil.cluster.packed import pack
from queryfoil.oracle import ModelError
from queryfoil.task import Task

SMALL = """
name = "small"
about = "A few images"
report_at = [5]
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
attack = "square"
eps = "2/255"
budget = 100
n = 16
[[cell]]
label = "undefended"
trace = 1
[[cell]]
label = "noise behind AAA"
targeted = true
defenses = [{ name = "input_noise", std = 0.05 }, { name = "aaa", fit = true }]
"""
CHUNK = 8
OWN = """
[[cell]]
label = "own"
"""
MODEL = """
import torch
def classifier():
    def model(x):
        if len(x) > 2:
            raise RuntimeError("too many images")
        return torch.eye(10)[: len(x)]
    return model
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def finished(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert bench.bench(plan.read(small), out, chunk=CHUNK).left == 0
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster on this machine, as the library starts it, but smaller and with a GPU that is not there."""
    ray = pytest.importorskip("ray")
    with connection.loopback():
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        ray.init(address="local", num_cpus=2, num_gpus=1, object_store_memory=100 * 2**20, **quiet)
        yield
        ray.shutdown()


def tables(out: Path) -> dict[str, Any]:
    """All tables of a run by their place; which images lie in one chunk decides that as well."""
    paths = [path for path in out.rglob("*.parquet") if path.name != "images.parquet"]
    return {str(path.relative_to(out)): pq.read_table(path, partitioning=None).to_pydict() for path in paths}


def test_a_cluster_gives_the_bits_of_one_process(small: Path, finished: Path, tmp_path: Path, cluster: None) -> None:
    told: list[Progress] = []
    assert bench.bench(plan.read(small), tmp_path, chunk=CHUNK, engine=Ray(), report=told.append).left == 0
    assert repr(tables(tmp_path)) == repr(tables(finished))  # as text, nan is nan
    names = [Path(name).name for name in tables(tmp_path)]
    chunks = ["chunk-000000-000008.parquet", "chunk-000008-000016.parquet"]
    assert sorted(names) == sorted([*chunks, *chunks, *["scores.parquet"] * 2, "trace-16.parquet"])
    assert told[-1].units == told[-1].total == 2 * 16 * 100
    assert any(0 < now.units < now.total and now.units % (8 * 100) for now in told), "no progress within a chunk"


def test_a_killed_worker_changes_nothing(small: Path, finished: Path, tmp_path: Path, cluster: None) -> None:
    killed: list[int] = []

    def kill(now: Progress) -> None:
        if now.queries and not killed:
            workers = [p for p in psutil.Process().children(recursive=True) if "ray::do" in " ".join(p.cmdline())]
            for process in workers[:1]:
                process.kill()
                killed.append(process.pid)

    asked = plan.read(small)
    noise = asked.model_copy(update={"cells": asked.cells[1:]})
    assert bench.bench(noise, tmp_path, chunk=CHUNK, engine=Ray(), report=kill).left == 0
    assert killed
    found, expected = tables(tmp_path), tables(finished)
    assert {Path(name).name for name in found} >= {"chunk-000000-000008.parquet", "chunk-000008-000016.parquet"}
    assert repr(found) == repr({name: expected[name] for name in found})


def test_what_a_task_raises_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: None) -> None:
    (tmp_path / "own_shop.py").write_text(MODEL)  # workers run elsewhere, and find it all the same
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.toml"
    path.write_text(SMALL.partition("[[cell]]")[0].replace("fashion-resnet", "own_shop:classifier") + OWN)
    with pytest.raises(ModelError, match="too many images"):
        bench.bench(plan.read(path), tmp_path / "out", engine=Ray())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of the cluster would be there")
def test_a_task_takes_the_gpu_that_ray_has_assigned(small: Path, tmp_path: Path, cluster: None) -> None:
    with pytest.raises(ValueError, match=r"Ray has assigned a GPU \(cuda:0\) .* but torch sees none there"):
        bench.bench(plan.read(small), tmp_path, engine=Ray(gpus_per_task=1))


def test_no_time_starts_nothing(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    outcome = bench.bench(plan.read(small), tmp_path, time_limit=0, engine=Ray())
    assert outcome.left == outcome.total == 32


def test_a_missing_ray_is_told(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'queryfoil\[bench,ray\]'"):
        bench.bench(plan.read(small), tmp_path / "out", engine=Ray())
    assert not (tmp_path / "out").exists()


def test_the_command_line_loads_no_ray() -> None:
    subprocess.run([sys.executable, "-c", "import queryfoil.cli, sys; assert 'ray' not in sys.modules"], check=True)


def spec(small: Path) -> worker.Spec:
    cell = plan.read(small).cells[0]
    return driver.spec(prepare.prepare(cell), "cpu", worker.library())


def test_a_node_with_other_code_is_refused(small: Path) -> None:
    asked = spec(small)
    worker.check_library(asked)
    with pytest.raises(
        ValueError, match=r"expected the driver's code on node .*: its code 0, not [0-9a-f]{16}; install"
    ):
        worker.check_library(replace(asked, library={**asked.library, "its code": "0"}))


def test_a_node_with_another_model_is_refused(small: Path) -> None:
    asked = spec(small)
    assert worker.make(asked, "cpu").device == "cpu"
    other = replace(asked, key="0" * 16, identity={**asked.identity, "weights": "0"})
    with pytest.raises(ValueError, match=r"but it has another: model \(weights\) differs; put the same files"):
        worker.make(other, "cpu")


def test_packed_images_come_out_bit_for_bit() -> None:
    eighths = torch.arange(256).reshape(4, 1, 8, 8) / 255
    task = Task.create(eighths, torch.arange(4))
    for images, kind in ((eighths, "uint8"), (eighths * 0.999, "float32")):
        packed = pack(replace(task.rows(slice(1, 3)), images=images[1:3]))
        assert packed.values["images"].dtype == kind
        assert torch.equal(packed.unpack("cpu").images, images[1:3])
        assert packed.unpack("cpu").ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("process", "auto", None), "--address would have no effect in one process; add --engine ray"),
        (("process", None, 1.0), "--gpus-per-task would have no effect"),
        (("rai", None, None), "unknown engine 'rai': expected one of process, ray; did you mean 'ray'"),
        (("ray", " ", None), "expected the address of a Ray cluster"),
        (("ray", None, 2.0), "expected gpus_per_task from 0 to 1"),
    ],
)
def test_what_would_have_no_effect_is_refused(given: tuple[str, str | None, float | None], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        engine(*given)


def test_a_device_that_no_task_uses_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the device cpu for tasks without a GPU, but got cuda"):
        Ray().computes_on("cuda")


def test_the_command_line_tells_it_too(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "quick", "--out", str(tmp_path / "out"), "--address", "auto"])
    assert result.exit_code == 2
    assert "--address would have no effect" in result.output


def started(small: Path, out: Path) -> tuple["subprocess.Popen[str]", list[psutil.Process], str]:
    """The command with a cluster of its own when its first chunk is there, all its processes and its folder."""
    command = [sys.executable, "-m", "queryfoil.cli", "bench", str(small), "--out", str(out), "--engine", "ray"]
    process = subprocess.Popen([*command, "--chunk", "2"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*/chunk-*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    others = psutil.Process(process.pid).children(recursive=True)
    found = [re.search(r"/\S*/queryfoil-ray-\w+", " ".join(other.cmdline())) for other in others]
    return process, others, next(match[0] for match in found if match)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind_and_nobody_else_can_reach_it(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "long.toml").write_text(SMALL.replace("n = 16", "n = 400").replace("budget = 100", "budget = 1000"))
    process, others, folder = started(tmp_path / "long.toml", tmp_path / "out")
    listening = [c for p in others for c in p.connections() if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert listening
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "interrupted; what was finished is kept" in errors
    assert not psutil.wait_procs(others, timeout=30)[1]
    assert not Path(folder).exists()


@pytest.mark.slow
def test_one_process_continues_what_a_killed_driver_has_begun(small: Path, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    process, others, folder = started(small, out)
    process.kill()
    process.communicate(timeout=60)
    assert not psutil.wait_procs(others, timeout=180)[1], "the cluster outlives its driver"
    shutil.rmtree(folder)
    written = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/chunk-*.parquet")}
    assert 0 < len(written) < 16
    assert bench.bench(plan.read(small), out, chunk=2).left == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    for run in (out, finished):
        assert len(list(run.glob("cells/*"))) == 2
    assert rows(out) == rows(finished)


def rows(out: Path) -> dict[str, list[str]]:
    """The rows of each cell and file of scores, whatever chunks they lie in."""
    found: dict[str, list[str]] = {}
    for path in sorted(out.glob("*/*/*.parquet")):
        found.setdefault(path.parent.name, []).extend(map(repr, pq.read_table(path, partitioning=None).to_pylist()))
    return found
