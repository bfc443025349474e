"""Plans, chunks, resuming, damaged files: the same result whatever happens in between."""

import errno
import json
import os
import re
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

from queryfoil import bench, files, plan, prepare, store, summary, table
from queryfoil.chunks import Progress
from queryfoil.report import page

SMALL = """
name = "small"
about = "A few images"
report_at = [5]
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
attack = "square"
eps = "16/255"
budget = 12
n = 24
[[cell]]
label = "undefended"
[[cell]]
label = "AAA"
defenses = [{ name = "aaa", tau = 2.3, temperature = 1.1 }]
[[cell]]
label = "noise behind AAA"
targeted = true
defenses = [{ name = "input_noise", std = 0.05 }, { name = "aaa", curve = "sine", tau = 2.0 }]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def finished(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert bench.bench(plan.read(small), out).left == 0
    page.write(out)
    return out


def without_times(folder: Path) -> Any:
    rows = summary.rows(*summary.collect(store.Store(folder)))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def columns(folder: Path) -> dict[str, list[Any]]:
    return summary.images(summary.collect(store.Store(folder))[1]).to_pydict()


def test_a_run_in_small_chunks_gives_the_same_bits(small: Path, finished: Path, tmp_path: Path) -> None:
    bench.bench(plan.read(small), tmp_path, chunk=7)
    assert without_times(tmp_path) == without_times(finished)
    assert columns(tmp_path) == columns(finished)


def test_a_killed_run_continues_to_the_same_summary(small: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "queryfoil.cli", "bench", str(small), "--out", str(out), "--chunk", "3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("cells/*/chunk-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(out.glob("cells/*/chunk-*.parquet")))
    assert 0 < done < 24
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert without_times(out) == without_times(finished)


def test_a_time_limit_stops_at_a_chunk_and_says_what_is_left(small: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = bench.bench(plan.read(small), out, chunk=8, time_limit=0)
    assert (outcome.left, outcome.total) == (72, 72)
    with pytest.raises(ValueError, match="3 of 3 cells"):
        page.write(out)
    assert bench.bench(plan.read(small), out, chunk=8).left == 0
    assert without_times(out) == without_times(finished)


def test_finished_chunks_are_not_computed_again(small: Path, finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.glob("cells/*/*.parquet")}
    progress: list[Progress] = []
    bench.bench(plan.read(small), finished, report=progress.append)
    assert {p: p.stat().st_mtime_ns for p in finished.glob("cells/*/*.parquet")} == before
    assert progress == []


def test_more_images_continue_a_run_and_fewer_need_none(small: Path, finished: Path, tmp_path: Path) -> None:
    few = plan.read(small)
    few = few.model_copy(update={"cells": tuple(c.model_copy(update={"n": 10}) for c in few.cells)})
    bench.bench(few, tmp_path / "few", share=tmp_path / "shared")
    assert {row["n"] for row in without_times(tmp_path / "few")} == {10}
    progress: list[Progress] = []
    bench.bench(plan.read(small), tmp_path / "all", chunk=12, report=progress.append, share=tmp_path / "shared")
    assert progress[-1].queries < sum(row["queries_total"] for row in without_times(finished))
    assert without_times(tmp_path / "all") == without_times(finished)
    assert columns(tmp_path / "all") == columns(finished)
    before = without_times(tmp_path / "few")
    progress.clear()
    bench.bench(few, tmp_path / "few", report=progress.append, share=tmp_path / "shared")
    assert progress == []
    assert without_times(tmp_path / "few") == before


def test_a_damaged_chunk_of_a_shared_cell_is_replaced(small: Path, finished: Path, tmp_path: Path) -> None:
    few = plan.read(small).model_copy(update={"cells": plan.read(small).cells[:1]})
    bench.bench(few.model_copy(update={"cells": (few.cells[0].model_copy(update={"n": 10}),)}), tmp_path, chunk=10)
    (tmp_path / "plan.json").unlink()
    bench.bench(few, tmp_path, chunk=24)
    first = next(tmp_path.glob("cells/*/chunk-000000-000010.parquet"))
    first.write_bytes(b"no table")
    outcome = bench.bench(few, tmp_path, chunk=4)
    assert outcome.damaged == (first,)
    assert not first.exists()
    assert bench.bench(few, tmp_path).damaged == ()
    assert without_times(tmp_path) == without_times(finished)[:1]


def test_images_can_be_left_out_of_what_is_stored(small: Path, finished: Path, tmp_path: Path) -> None:
    bench.bench(plan.read(small), tmp_path, keep_images=False)
    assert without_times(tmp_path) == without_times(finished)
    assert not any(columns(tmp_path)["adversarial"])
    assert any(columns(finished)["adversarial"])


def test_every_result_names_what_computed_it(finished: Path) -> None:
    for row in without_times(finished):
        assert [v["torch"] for v in row["versions"]] == [str(torch.__version__)]
        assert re.fullmatch(r"([0-9a-f]{40}\+?)?", row["versions"][0]["commit"])


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "other cell"])
def test_a_damaged_chunk_is_computed_again_and_said(small: Path, finished: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    bench.bench(plan.read(small), out, chunk=12)
    chunks = sorted(out.glob("cells/*/chunk-*.parquet"))
    content = chunks[0].read_bytes()
    middle = len(content) // 3
    changed = {
        "cut": content[:middle],
        "flip": content[:60] + bytes([content[60] ^ 255]) + content[61:],  # in the first page
        "empty": b"",
        "text": b"not a table",
        "other cell": next(p for p in chunks if p.parent != chunks[0].parent).read_bytes(),
    }[damage]
    chunks[0].write_bytes(changed)
    outcome = bench.bench(plan.read(small), out, chunk=12)
    assert outcome.damaged == (chunks[0],)
    assert without_times(out) == without_times(finished)


def test_a_folder_of_another_plan_is_refused(small: Path, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(SMALL.replace("budget = 12", "budget = 13"))
    with pytest.raises(ValueError, match="holds results of another plan"):
        bench.bench(plan.read(other), finished)


def test_a_folder_with_other_files_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("photos")
    with pytest.raises(ValueError, match="holds other files"):
        bench.bench(plan.read(small), tmp_path)


def test_no_space_left_keeps_what_is_finished(
    small: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def full(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match=r"no space left for .*every finished chunk is kept"):
        bench.bench(plan.read(small), tmp_path, chunk=8)
    assert len(list(tmp_path.glob("cells/*/chunk-*.parquet"))) >= 1
    assert not list(tmp_path.glob("cells/*/.chunk*"))
    monkeypatch.undo()
    bench.bench(plan.read(small), tmp_path, chunk=8)
    assert without_times(tmp_path) == without_times(finished)


def test_the_summary_agrees_with_the_images(finished: Path) -> None:
    rows = json.loads((finished / "summary.json").read_text())
    images = pq.read_table(finished / "images.parquet")
    for row in rows:
        part = images.filter(np.asarray(images.column("cell")) == row["cell"])
        fooled = table.fooled_at(part)
        assert len(part) == row["n"] == 24
        assert row["clean_accuracy"] == np.mean(fooled > 1)
        assert row["accuracy"] == {"5": np.mean(fooled > 5), "12": np.mean(fooled > 12)}
        assert row["queries_total"] == sum(part.column("queries").to_pylist())
        low, high = row["accuracy_interval"]["12"]
        assert low <= row["accuracy"]["12"] <= high


def test_only_the_randomized_cell_is_confirmed_and_changes_labels(finished: Path) -> None:
    rows = {row["label"]: row for row in json.loads((finished / "summary.json").read_text())}
    assert rows["undefended"]["confirmed"] is None
    assert rows["AAA"]["confirmed"] is None
    assert rows["AAA"]["labels_changed"] == 0
    assert rows["noise behind AAA"]["labels_changed"] > 0


def test_recorded_images_fool_the_defended_model_again(small: Path, finished: Path) -> None:
    cell = plan.read(small).cells[1]
    prepared = prepare.prepare(cell, None, "cpu")
    rows = store.Store(finished).cell(prepared.key).attacked()
    assert len(rows) == cell.n
    fooled = [r for r in rows.to_pylist() if r["adversarial"] is not None]
    assert fooled
    for row in fooled:
        image = np.frombuffer(row["adversarial"], np.uint8).reshape(1, 1, 28, 28).astype(np.float32) / 255
        answer = prepared.model(prepared.task.images.new_tensor(image))[0]
        assert int(answer.argmax()) != row["label"]


def test_the_key_of_a_cell_follows_what_decides_its_result(small: Path) -> None:
    cell = plan.read(small).cells[1]
    key = prepare.prepare(cell, None, "cpu").key
    assert prepare.prepare(cell.model_copy(update={"label": "other name"}), None, "cpu").key == key
    for change in ({"n": 23}, {"trace": 1}, {"hyper": {"p_init": 0.05}}):  # what says the same, or adds images
        assert prepare.prepare(cell.model_copy(update=change), None, "cpu").key == key
    for change in (
        {"seed": 1},
        {"budget": 13},
        {"loss": "cross_entropy"},
        {"hyper": {"p_init": 0.1}},
        {"eps": 8 / 255},
    ):
        assert prepare.prepare(cell.model_copy(update=change), None, "cpu").key != key


def test_a_report_needs_a_bench_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="queryfoil bench"):
        page.write(tmp_path)


def test_collect_reads_the_cells_in_the_order_of_the_plan(finished: Path) -> None:
    _, results = summary.collect(store.Store(finished))
    assert [r.label for r in results] == ["undefended", "AAA", "noise behind AAA"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('attack = "square"', 'attack = "sqare"'), "unknown attack 'sqare'.*did you mean 'square'"),
        (('model = "fashion-resnet"', 'model = "resnet"'), "unknown model 'resnet'"),
        (('eps = "16/255"', "eps = 0"), "eps: Input should be greater than 0"),
        (("budget = 12", "budget = 0"), "budget: Input should be greater than or equal to 1"),
        (("n = 24", "n = 24\nfrobnicate = 1"), "frobnicate: Extra inputs are not permitted"),
        (("std = 0.05", "sd = 0.05"), "unknown argument of input_noise 'sd'.*did you mean 'std'"),
        (("std = 0.05", "fit = true"), "only aaa, terraces, temperature can be fitted"),
        (
            ('"input_noise", std = 0.05', '"terraces"'),
            "terraces needs group, borders, shares, which a fit finds; set fit",
        ),
        (("temperature = 1.1", "temperature = 1.1, fit = true"), "fit finds the temperature"),
        (('label = "AAA"', 'label = "undefended"'), "a different label for each cell"),
        (("n = 24", 'n = 24\nnorm = "l1"'), "unknown norm 'l1': expected one of l2, linf"),
        (("n = 24", "n = 24\nhyper = { p = 0.1 }"), "does not take these hyper-parameters"),
        (('name = "small"', "name = "), "not valid TOML"),
    ],
)
def test_a_wrong_plan_is_refused_with_a_reason(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(*change, 1))
    with pytest.raises(ValueError, match=message):
        plan.read(path)


def test_too_many_images_are_refused_before_a_query(small: Path, tmp_path: Path) -> None:
    wrong = plan.read(small).model_copy(update={"cells": (plan.read(small).cells[0].model_copy(update={"n": 1001}),)})
    with pytest.raises(ValueError, match="n <= 1000"):
        bench.bench(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_rises_to_the_total(small: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    bench.bench(plan.read(small), tmp_path, chunk=10, report=seen.append)
    units = [p.units for p in seen]
    assert units == sorted(units)
    assert seen[-1].units == seen[-1].total == 3 * 24 * 12
    assert 0 < seen[-1].queries <= seen[-1].total


def test_results_of_other_code_are_not_looked_at(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = plan.read(small)
    one = one.model_copy(update={"cells": one.cells[:1]})
    bench.bench(one, tmp_path)
    old = summary.rows(*summary.collect(store.Store(tmp_path)))[0]
    monkeypatch.setattr(prepare.provenance, "code", lambda modules: "changed")
    bench.bench(one, tmp_path, chunk=24, time_limit=0)
    with pytest.raises(ValueError, match="not finished"):
        summary.collect(store.Store(tmp_path))
    bench.bench(one, tmp_path)
    new = summary.rows(*summary.collect(store.Store(tmp_path)))[0]
    assert new["cell"] != old["cell"]
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_a_damaged_plan_file_is_named(small: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"digest": ')
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
        page.write(tmp_path)


def test_a_lost_plan_file_and_half_written_ones_are_no_obstacle(small: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.bench(plan.read(small), out, chunk=12)
    (out / "plan.json").unlink()
    (out / ".plan.json.abc").write_text("{")
    half = next(out.glob("cells/*")) / ".chunk-000000-000012.parquet.abc"
    half.write_bytes(b"PAR1")
    for path in (half, out / ".plan.json.abc"):
        os.utime(path, (0, 0))  # a new one may be another run's
    young = half.with_name(".chunk-000012-000024.parquet.abc")
    young.write_bytes(b"PAR1")
    progress: list[Progress] = []
    bench.bench(plan.read(small), out, chunk=12, report=progress.append)
    assert progress == []
    assert not half.exists()
    assert not (out / ".plan.json.abc").exists()
    assert young.exists()
    assert without_times(out) == without_times(finished)


@pytest.mark.parametrize("content", ["[]", "5", "{}", '{"digest": '])
def test_a_damaged_plan_or_cell_file_says_what_to_do(small: Path, tmp_path: Path, content: str) -> None:
    one = plan.read(small).model_copy(update={"cells": plan.read(small).cells[:1]})
    bench.bench(one, tmp_path)
    cell = next(tmp_path.glob("cells/*/cell.json"))
    for path in (cell, tmp_path / "plan.json"):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged .*; remove it and run again"):
            page.write(tmp_path)
        path.unlink()
        bench.bench(one, tmp_path)
        assert summary.collect(store.Store(tmp_path))[1]


def test_no_flipped_bit_of_a_chunk_blocks_or_changes_a_result(small: Path, finished: Path, tmp_path: Path) -> None:
    path = next(finished.glob("cells/*/chunk-*.parquet"))
    content, key = path.read_bytes(), path.parent.name
    cell = store.CellStore(tmp_path, key)
    right = store.CellStore(path.parent, key).read(path.stem, table.ATTACKED)
    assert right is not None
    for position in range(0, 8 * len(content), max(8 * len(content) // 400, 1)):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        (tmp_path / path.name).write_bytes(changed)
        found = cell.read(path.stem, table.ATTACKED)
        assert found is None or found.equals(right)


def test_a_folder_with_other_test_images_is_refused(small: Path, tmp_path: Path) -> None:
    for name, shape in (("images-idx3", (2000, 28, 28)), ("labels-idx1", (2000,))):
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(header + bytes(int(np.prod(shape))))
    with pytest.raises(ValueError, match="not those that the shipped ones come from"):
        bench.bench(plan.read(small), tmp_path / "out", data_folder=tmp_path)


def test_targets_depend_on_nothing_but_seed_and_id(small: Path) -> None:
    cell = plan.read(small).cells[2]
    long, short = (prepare.prepare(cell.model_copy(update={"n": n}), None, "cpu") for n in (24, 2))
    targets = long.task.targets
    assert targets is not None
    assert (targets[:2] == short.task.targets).all()
    assert (targets != long.task.labels).all()
    assert int(targets.max()) <= 9


MANY = """
name = "many"
about = "A defense that ties images together, and one that is fitted"
report_at = [3]
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
attack = "square"
eps = "16/255"
budget = 4
n = 6
[[cell]]
label = "tied together"
defenses = [{ name = "dent", loss = "shot", steps = 1 }]
[[cell]]
label = "apart"
defenses = [{ name = "dent", steps = 1 }]
[[cell]]
label = "fitted"
defenses = [{ name = "temperature", fit = true, by = "ece" }, { name = "aaa", tau = 2.0 }]
"""


def test_a_defense_that_ties_images_together_runs_on_all_at_once_and_any_may_be_fitted(tmp_path: Path) -> None:
    (tmp_path / "many.toml").write_text(MANY)
    chosen, out = plan.read(tmp_path / "many.toml"), tmp_path / "out"
    assert bench.bench(chosen, out, chunk=2).left == 0
    page.write(out)
    assert re.search(r"temperature\(by=ece, temperature=[\d.]+\)", (out / "report.html").read_text(encoding="utf-8"))
    results = {result.cell.label: result for result in summary.collect(store.Store(out))[1]}
    chunks = {label: len(list(out.glob(f"cells/{r.info['cell']}/chunk-*"))) for label, r in results.items()}
    assert chunks == {"tied together": 1, "apart": 3, "fitted": 3}
    row = next(row for row in summary.rows(*summary.collect(store.Store(out))) if row["label"] == "fitted")
    found = row["defenses"][0]["fitted"]
    assert found["by"] == "ece"
    assert found["n"] == 1000
    assert 0.5 < found["temperature"] < 3
    assert row["labels_changed"] == 0


def test_two_cells_of_one_hash_are_attacked_once(small: Path, tmp_path: Path) -> None:
    one = plan.read(small).cells[0]
    twice = plan.read(small).model_copy(update={"cells": (one, one.model_copy(update={"label": "again"}))})
    seen: list[Progress] = []
    assert bench.bench(twice, tmp_path, report=seen.append).left == 0
    rows = without_times(tmp_path)
    assert rows[0]["cell"] == rows[1]["cell"]
    assert seen[-1].queries == rows[0]["queries_total"]


def test_the_time_of_fewer_images_is_their_part(small: Path, finished: Path, tmp_path: Path) -> None:
    cell = store.Store(finished).cell(next((finished / "cells").iterdir()).name)
    whole, part = cell.attacked(), cell.attacked(5)
    queries = [sum(t.column("queries").to_pylist()) for t in (part, whole)]
    assert store.seconds(part) == pytest.approx(store.seconds(whole) * queries[0] / queries[1], abs=2e-3)


def test_a_plan_without_its_shared_folder_says_so(small: Path, tmp_path: Path) -> None:
    bench.bench(plan.read(small), tmp_path / "out", share=tmp_path / "shared", time_limit=0)
    (tmp_path / "shared").rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"expected the cells of .*out in .*shared, but there is no such folder"
    ):
        page.write(tmp_path / "out")
