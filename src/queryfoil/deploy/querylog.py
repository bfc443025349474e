"""A log of queries as Parquet files: who asked when, about the same image or another, and what was shown. No images."""

import hashlib
import os
import secrets
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from queryfoil import files
from queryfoil.checks import require_positive, require_whole
from queryfoil.deploy.drift import shown_margins

SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("client", pa.string()),
        ("image", pa.string()),
        ("top", pa.int32()),
        ("margin", pa.float32()),
    ]
)
KEY = "key"  # file with the secret of the images' hashes
STEP = 0.25  # width of a bucket of the shown margin, in units of logits


class QueryLog:
    """Rows for each image asked about, buffered, in files `queries-TIME-PROCESS-NUMBER.parquet` of a folder.

    Columns: time; client; image, a hash under a key that lies in the folder, so that the same image is known again, and
    a guess of it cannot be tested without the key; top, the class shown; margin, the lower end of its bucket of
    the shown margin, in steps of 0.25 logits. Nothing of the image or of other scores is kept.

    rows, seconds: when a file is written, at the next query; a process that is killed loses what is not. Where files
    cannot be written, ten times `rows` are held, and then dropped. keep: files of the folder, of
    which the oldest go. Several threads and processes may write to one folder. ValueError for settings out of
    range; OSError where the folder cannot be written.
    """

    def __init__(self, folder: str | Path, *, rows: int = 10_000, seconds: float = 60.0, keep: int = 1000) -> None:
        require_whole("rows", rows)
        require_whole("keep", keep)
        require_positive("seconds", seconds)
        self.folder, self.rows, self.seconds, self.keep = Path(folder), rows, seconds, keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._key = _key(self.folder / KEY)
        self._lock = threading.Lock()
        self._parts: list[pa.RecordBatch] = []
        self._waiting, self._written, self._since = 0, 0, time.monotonic()

    def add(self, client: str, images: NDArray[np.float32], scores: NDArray[np.float32], output: str) -> None:
        """Log images (N, C, H, W) that a client asked about, and the scores (N, K) of kind `output` that were shown."""
        now = datetime.now(UTC)
        hashes = [self._hash(image) for image in images]
        margins = np.floor(shown_margins(scores, output) / STEP) * STEP
        columns = [[now] * len(images), [client] * len(images), hashes, scores.argmax(1), margins]
        part = pa.RecordBatch.from_arrays(
            [pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
        )
        with self._lock:
            self._parts.append(part)
            self._waiting += len(images)
            if self._waiting >= self.rows or time.monotonic() - self._since >= self.seconds:
                self._write()

    def flush(self) -> None:
        """Write what is buffered."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """Write what is buffered, at the end."""
        self.flush()

    def _hash(self, image: NDArray[np.float32]) -> str:
        """Of the image in 8 bits, as the same bytes may come as other numbers."""
        levels = np.rint(np.asarray(image) * 255).astype(np.uint8)
        return hashlib.blake2b(levels.tobytes(), key=self._key, digest_size=16).hexdigest()

    def _write(self) -> None:
        self._since = time.monotonic()
        if not self._parts:
            return
        name = f"queries-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}-{self._written:06d}.parquet"
        try:
            with files.replacing(self.folder / name) as temporary:
                pq.write_table(pa.Table.from_batches(self._parts), temporary, compression="zstd")
        except OSError:
            if self._waiting >= 10 * self.rows:
                self._parts, self._waiting = [], 0
            raise
        self._parts, self._waiting, self._written = [], 0, self._written + 1
        for old in sorted(self.folder.glob("queries-*.parquet"))[: -self.keep]:
            old.unlink(missing_ok=True)


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
