"""The query log: what it keeps, what it does not, and when files are written."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from queryfoil.deploy.querylog import BLOCK, KEY, SCHEMA, QueryLog

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 1, 5, 5)).astype(np.float32) / 255
SCORES = np.array([[3.0, 0.0, 1.1], [0.0, 0.3, 0.0], [0.0, 0.0, 9.0], [1.0, 0.0, 0.0]], np.float32)


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("queries-*.parquet"))])


def test_a_row_says_who_asked_about_which_image_and_what_was_shown(tmp_path: Path) -> None:
    log = QueryLog(tmp_path)
    log.add("lab", IMAGES, SCORES, "logits")
    log.add("shop", IMAGES[:1] + 1e-4, np.log(np.exp(SCORES[:1]) / np.exp(SCORES[:1]).sum()), "log_probs")
    assert not list(tmp_path.glob("*.parquet"))
    log.close()
    rows = read(tmp_path)
    assert rows.schema.equals(SCHEMA)
    assert rows.column("client").to_pylist() == ["lab"] * 4 + ["shop"]
    assert rows.column("top").to_pylist() == [0, 1, 2, 0, 0]
    assert rows.column("margin").to_pylist() == [1.75, 0.25, 9.0, 1.0, 1.75]  # 1.9, 0.3, 9, 1: the ends below
    hashes = rows.column("image").to_pylist()
    assert hashes[0] == hashes[4]  # the same image in 8 bits
    assert len(set(hashes[:4])) == 4


def test_near_duplicates_share_a_signature_and_no_image_is_left_behind(tmp_path: Path) -> None:
    squares = np.random.default_rng(1).random((1, 1, 7, 7)).astype(np.float32)
    log, image = QueryLog(tmp_path), np.kron(squares, np.ones((4, 4), np.float32))
    for x in (image, np.minimum(image + 2 / 255, 1), image[:, :, ::-1]):
        log.add("lab", x, SCORES[:1], "logits")
    assert [one.images.dtype for one in log._fresh] == [np.uint8] * 3
    log.add("lab", np.repeat(IMAGES[:1], BLOCK, axis=0), np.repeat(SCORES[:1], BLOCK, axis=0), "logits")
    assert log._fresh == []
    log.close()
    first, near, other = (set(row) for row in read(tmp_path).column("coarse").to_pylist()[:3])
    assert len(first & near) >= len(first) / 2
    assert len(first & other) < len(first) / 4


def test_hashes_are_those_of_the_folder_alone(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        log = QueryLog(folder)
        log.add("lab", IMAGES[:1], SCORES[:1], "logits")
        log.close()
        found.append(read(folder).column("image").to_pylist()[-1])
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert (tmp_path / "a" / KEY).stat().st_mode & 0o077 == 0


def test_files_are_written_by_rows_and_by_time_and_the_oldest_go(tmp_path: Path) -> None:
    log = QueryLog(tmp_path, rows=4, keep=2)
    for _ in range(5):
        log.add("lab", IMAGES, SCORES, "logits")
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    timed = QueryLog(tmp_path / "timed", seconds=1e-9)
    timed.add("lab", IMAGES[:1], SCORES[:1], "logits")
    assert len(read(tmp_path / "timed")) == 1


def test_threads_lose_no_row(tmp_path: Path) -> None:
    log = QueryLog(tmp_path, rows=7)
    threads = [
        threading.Thread(target=lambda: [log.add("lab", IMAGES, SCORES, "logits") for _ in range(25)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(read(tmp_path)) == 400


def test_what_cannot_be_written_is_held_and_what_is_too_much_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = QueryLog(tmp_path / "log", rows=4)
    log.add("lab", IMAGES[:3], SCORES[:3], "logits")
    shutil.rmtree(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"")  # a file where the folder was
    with pytest.raises(OSError, match="exists"):
        log.add("lost", IMAGES, SCORES, "logits")
    for _ in range(10):
        log.add("lab", IMAGES, SCORES, "logits")  # held, and not tried each time
    with pytest.raises(OSError, match="exists"):
        log.add("lost", IMAGES, SCORES, "logits")
    (tmp_path / "log").unlink()
    monkeypatch.setattr(log, "_due", 0.0)  # ten seconds later
    log.add("lab", IMAGES[:1], SCORES[:1], "logits")
    assert read(tmp_path / "log").column("client").to_pylist() == ["lab"] * 44


def test_only_what_can_be_logged_is(tmp_path: Path) -> None:
    log = QueryLog(tmp_path)
    for images, scores in (
        (IMAGES, SCORES[:2]),
        (IMAGES, SCORES[:, :1]),
        (IMAGES * 255, SCORES),
        (IMAGES, np.full_like(SCORES, np.inf)),
    ):
        with pytest.raises(ValueError, match="expected"):
            log.add("lab", images, scores, "logits")
    log.add("lab", IMAGES[:0], SCORES[:0], "logits")
    log.close()
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("bad", [{"rows": 0}, {"seconds": 0}, {"keep": 0.5}])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"expected {next(iter(bad))}"):
        QueryLog(tmp_path / "log", **bad)  # type: ignore[arg-type]
