"""A log of queries as Parquet files: who asked when, about the same image or one like it, what was shown. No images."""

import itertools
import json
import re
import secrets
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from queryfoil import __version__, files
from queryfoil.checks import require_positive, require_whole
from queryfoil.deploy.fingerprint import Fingerprint, Levels, levels
from queryfoil.deploy.margins import shown_margins

SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("client", pa.string()),
        ("image", pa.uint64()),
        ("coarse", pa.list_(pa.uint32())),
        ("top", pa.int32()),
        ("margin", pa.float32()),
    ]
)
META = b"queryfoil"  # of a file: the version that wrote it, and which key it was written with
NAMES = "queries-*.parquet"
NAME = re.compile(r"queries-(\d{8}T\d{6}\.\d{6})-\w+\.parquet")
TIME = "%Y%m%dT%H%M%S.%f"
KEY = "key"  # file with the secret of the images' hashes
STEP = 0.25  # width of a bucket of the shown margin, in units of logits
BLOCK = 32  # images that are hashed at once: a quarter of the time
HELD = 10  # times `rows` that are held while files cannot be written
RETRY = 10.0  # seconds until it is tried again


class _Answer(NamedTuple):
    """What is logged of one answer, with images that are still to be hashed."""

    time: int  # microseconds since 1970
    client: str
    top: NDArray[np.int64]
    margin: NDArray[np.float64]
    images: Levels


class _Part(NamedTuple):
    """Rows of one answer."""

    time: int
    client: str
    top: NDArray[np.int64]
    margin: NDArray[np.float64]
    image: list[int]
    coarse: NDArray[np.uint32]  # (N, k)


class QueryLog:
    """Rows for each image asked about, buffered, in files `queries-TIME-RANDOM.parquet` of a folder.

    Columns: time; client; image, a hash, the same for the same image; coarse, a signature that near-duplicates mostly
    share (see `fingerprint`); top, the class shown; margin, the lower end of its bucket of the shown margin, in steps
    of 0.25 logits. Hashes and signatures are made under the key that lies in the folder, without which no guess of an
    image can be tested; and for a few images at once, which is why the last 32 are held in memory, as bytes.

    rows, seconds: when a file is written, at the next query; a process that is killed loses what is not. keep: files of
    the folder, of which the oldest go. Several threads and processes may write to one folder. ValueError for settings
    out of range; OSError where the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = QueryLog(folder)
    ...     log.add("lab", np.zeros((2, 1, 8, 8), np.float32), np.eye(2, dtype=np.float32), "logits")
    ...     log.close()
    ...     pq.read_table(next(Path(folder).glob(NAMES))).select(["client", "top", "margin"]).to_pylist()
    [{'client': 'lab', 'top': 0, 'margin': 1.0}, {'client': 'lab', 'top': 1, 'margin': 1.0}]
    """

    def __init__(self, folder: str | Path, *, rows: int = 10_000, seconds: float = 60.0, keep: int = 1000) -> None:
        require_whole("rows", rows)
        require_whole("keep", keep)
        require_positive("seconds", seconds)
        self.folder, self.rows, self.seconds, self.keep = Path(folder), rows, seconds, keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fingerprint = Fingerprint(_key(self.folder / KEY))
        self._lock = threading.Lock()
        self._fresh: list[_Answer] = []
        self._parts: list[_Part] = []
        self._waiting, self._due = 0, time.monotonic() + seconds
        self._failure: OSError | None = None

    def add(self, client: str, images: NDArray[np.float32], scores: NDArray[np.float32], output: str) -> None:
        """Log images (N, C, H, W) in [0, 1] that a client asked about, and the scores (N, K) of kind `output` shown.

        OSError when files cannot be written: these images are then not logged. What was held before still is, up to ten
        times `rows`, and is tried again after ten seconds. ValueError for other shapes and values.
        """
        if scores.ndim != 2 or scores.shape[1] < 2 or len(scores) != len(images):
            raise ValueError(
                f"expected scores (N, K) of each image, K >= 2, but got {scores.shape} for {len(images)} images"
            )
        if not len(images):
            return
        margins = np.floor(shown_margins(scores, output) / STEP) * STEP
        if not np.isfinite(margins).all():
            raise ValueError("expected finite scores of the two top classes, but got an infinite one or none")
        answer = _Answer(time.time_ns() // 1000, client, scores.argmax(1), margins, levels(images))
        with self._lock:
            if self._failure is not None and self._waiting >= HELD * self.rows and time.monotonic() < self._due:
                raise self._failure
            self._fresh.append(answer)
            self._waiting += len(images)
            if sum(len(one.images) for one in self._fresh) >= BLOCK:
                self._hash()
            full = self._waiting >= self.rows and self._failure is None
            taken = self._take() if full or time.monotonic() >= self._due else []
        self._write(taken, failed=1)

    def flush(self) -> None:
        """Write what is held; OSError if that fails, and then it is still held."""
        with self._lock:
            taken = self._take()
        self._write(taken)

    def close(self) -> None:
        """Write what is held, at the end."""
        self.flush()

    def _hash(self) -> None:
        """Make parts of the answers that are not hashed yet, and let their images go."""
        for _, same in itertools.groupby(self._fresh, lambda answer: answer.images.shape[1:]):
            answers = list(same)
            x = np.concatenate([answer.images for answer in answers])
            hashes, coarse, end = self._fingerprint.hashes(x), self._fingerprint.coarse(x), 0
            for answer in answers:
                start, end = end, end + len(answer.images)
                self._parts.append(_Part(*answer[:4], hashes[start:end], coarse[start:end]))
        self._fresh = []

    def _take(self) -> list[_Part]:
        self._hash()
        taken, self._parts, self._waiting = self._parts, [], 0
        self._due = time.monotonic() + self.seconds
        return taken

    def _write(self, parts: list[_Part], failed: int = 0) -> None:
        """Write a file; after an OSError hold the parts again, without the last `failed` of them."""
        if not parts:
            return
        name = f"queries-{datetime.now(UTC):{TIME}}-{secrets.token_hex(4)}.parquet"
        try:
            with files.replacing(self.folder / name) as temporary:
                pq.write_table(
                    _table(parts, self._fingerprint.id), temporary, compression="zstd", write_page_checksum=True,
                    use_dictionary=["client"],
                )  # fmt: skip
        except OSError as error:
            held = parts[: len(parts) - failed]
            with self._lock:
                self._failure = error
                self._parts = held + self._parts
                self._waiting += sum(len(part.image) for part in held)
                self._due = time.monotonic() + min(self.seconds, RETRY)
            raise
        self._failure = None
        for old in sorted(self.folder.glob(NAMES))[: -self.keep]:
            old.unlink(missing_ok=True)


def _table(parts: list[_Part], key: str) -> pa.Table:
    """Of the schema, with what a report has to know of the key: whether it is another."""
    counts = [len(part.image) for part in parts]
    sizes = np.repeat([part.coarse.shape[1] for part in parts], counts)
    coarse = pa.ListArray.from_arrays(
        np.concatenate([[0], sizes.cumsum()]).astype(np.int32), np.concatenate([part.coarse.ravel() for part in parts])
    )
    columns = [
        np.repeat(np.array([part.time for part in parts], "datetime64[us]"), counts),
        np.repeat(np.array([part.client for part in parts], object), counts),
        np.array([image for part in parts for image in part.image], np.uint64),
        coarse,
        np.concatenate([part.top for part in parts]),
        np.concatenate([part.margin for part in parts]),
    ]
    arrays = [
        column if column is coarse else pa.array(column, kind.type)
        for column, kind in zip(columns, SCHEMA, strict=True)
    ]
    meta = {META: json.dumps({"version": __version__, "key": key})}
    return pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(meta))


def _key(path: Path) -> bytes:
    """The folder's key, made by whichever process comes first."""
    try:
        with path.open("xb") as file:
            path.chmod(0o600)
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    for _ in range(100):
        found = path.read_bytes()
        if len(found) == 32:
            return found
        time.sleep(0.01)  # another process is about to write it
    raise ValueError(f"expected the 32 bytes of a query log's key in {path}, but got {len(found)}; remove it")
