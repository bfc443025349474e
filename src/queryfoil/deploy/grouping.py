"""Reading a query log, and finding the near-duplicates in it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from queryfoil.deploy.fingerprint import KEPT
from queryfoil.deploy.querylog import META, NAME, NAMES, SCHEMA, TIME

SHARE = 0.5  # of a signature that has to be a group's for an image to belong to it: Blacklight's
SLOTS = 25  # at most 2 ** so many windows are remembered, in 128 MiB
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: spreads numbers over a table

Step = Callable[[str, int, int], None]
"""Told what is done, and how much of how much."""


@dataclass(frozen=True)
class Queries:
    """The rows of a log in the order of time, N of them."""

    folder: Path
    time: NDArray[np.datetime64]  # (N,), UTC
    client: NDArray[np.int32]  # (N,), positions in `clients`
    clients: list[str]
    image: NDArray[np.uint64]  # (N,), the same for the same image
    top: NDArray[np.int32]  # (N,)
    margin: NDArray[np.float32]  # (N,), lower ends of buckets
    group: NDArray[np.int32]  # (N,), the same for near-duplicates
    files: int
    damaged: tuple[str, ...]  # names of files that could not be read
    keys: int  # secrets that the hashes were made with; queries are compared within one

    def __len__(self) -> int:
        return len(self.time)


class Groups:
    """Near-duplicates, found query by query.

    A query joins the group in which half of its signature or more was last seen, whoever asked; else it begins its own.
    So a group follows a search away from the image that it began with. Of windows that share a place in the table, the
    latest stays. rows: how many queries will come, about.

    >>> same, other = np.arange(24, dtype=np.uint32), np.arange(24, 48, dtype=np.uint32)
    >>> Groups(3).add([same, other, same]).tolist()
    [0, 1, 0]
    """

    def __init__(self, rows: int) -> None:
        bits = min(max((2 * KEPT * rows).bit_length(), 10), SLOTS)
        self._owner = np.full(1 << bits, -1, np.int32)
        self._shift = np.uint64(64 - bits)
        self._seen = 0

    def add(self, signatures: list[NDArray[np.uint32]]) -> NDArray[np.int32]:
        """The group (N,) of each of these signatures, named by the number of the query that it began with."""
        if not signatures:
            return np.empty(0, np.int32)
        numbers = np.concatenate(signatures).astype(np.uint64) + np.uint64(1)
        slots = (numbers * SPREAD >> self._shift).astype(np.int64)
        found = np.arange(self._seen, self._seen + len(signatures), dtype=np.int32)
        end = 0
        for row, signature in enumerate(signatures):
            start, end = end, end + len(signature)
            slot = slots[start:end]
            owners = self._owner[slot].tolist()
            owners.sort()
            count = len(owners)
            for middle in {owners[(count - 1) // 2], owners[count // 2]}:  # an owner of half or more is there
                if middle >= 0 and owners.count(middle) >= SHARE * count:
                    found[row] = middle
            self._owner[slot] = found[row]
        self._seen += len(signatures)
        return found


def read(folder: str | Path, since: datetime | None = None, step: Step = lambda *_: None) -> Queries:
    """The log in a folder from a time on (UTC if it has no zone), file by file, and its near-duplicates.

    FileNotFoundError without a folder; ValueError without a log, or if it has no row.
    """
    where = Path(folder)
    if not where.is_dir():
        raise FileNotFoundError(2, "expected the folder of a query log, but there is none", str(where))
    paths = sorted(where.glob(NAMES))
    if not paths:
        raise ValueError(
            f"expected a query log in {where}, files {NAMES}, but there is none; `queryfoil serve --query-log DIR` "
            "writes one, with its first file after 10,000 images or at the first query after a minute"
        )
    start = None if since is None else (since if since.tzinfo else since.replace(tzinfo=UTC)).astimezone(UTC)
    clients: dict[str, int] = {}
    columns: list[list[NDArray[Any]]] = [[], [], [], [], [], []]
    damaged, keys, groups = [], set(), None
    total, done = _rows(paths), 0
    for path in paths:
        if start is not None and _written(path) < start:
            continue
        try:
            rows, key = _read(path)
        except FileNotFoundError:  # too old by now, and removed by its server
            continue
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            damaged.append(path.name)
            continue
        keys.add(key)
        if start is not None:
            rows = rows.filter(pc.greater_equal(rows["time"], pa.scalar(start, SCHEMA.field("time").type)))
        groups = groups or Groups(total)
        names = rows["client"].combine_chunks().dictionary_encode()
        places = [clients.setdefault(name, len(clients)) for name in names.dictionary.to_pylist()]
        found = [
            rows["time"].to_numpy(),
            np.array(places, np.int32)[names.indices.to_numpy()] if len(rows) else np.empty(0, np.int32),
            *(rows[name].to_numpy() for name in ("image", "top", "margin")),
            groups.add([*_lists(rows["coarse"])]),
        ]
        for column, part in zip(columns, found, strict=True):
            column.append(part)
        done += len(rows)
        step("comparing", done, total)
    if len(damaged) == len(paths):
        raise ValueError(f"none of the {len(paths)} files {NAMES} in {where} can be read as one of a query log")
    if not done:
        raise ValueError(f"the query log in {where} has no row" + (f" from {start:%Y-%m-%d %H:%M} on" if start else ""))
    order = np.argsort(np.concatenate(columns[0]), kind="stable")
    moment, client, image, top, margin, group = (np.concatenate(column)[order] for column in columns)
    return Queries(
        folder=where, time=moment, client=client, clients=list(clients), image=image, top=top, margin=margin,
        group=group, files=len(paths) - len(damaged), damaged=tuple(damaged), keys=len(keys),
    )  # fmt: skip


def _rows(paths: list[Path]) -> int:
    """How many rows there are, about: files that cannot be read count as none."""
    total = 0
    for path in paths:
        try:
            total += pq.read_metadata(path).num_rows
        except (OSError, ValueError, pa.ArrowException):
            continue
    return total


def _written(path: Path) -> datetime:
    """When a file was written, by its name; a name that does not tell is as of now."""
    found = NAME.fullmatch(path.name)
    return datetime.strptime(found[1], TIME).replace(tzinfo=UTC) if found else datetime.now(UTC)


def _read(path: Path) -> tuple[pa.Table, str]:
    """The rows of a file, and which key it was written with."""
    table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
    key = str(json.loads((table.schema.metadata or {})[META])["key"])
    rows = table.replace_schema_metadata().cast(SCHEMA)
    if any(column.null_count for column in rows.columns):
        raise ValueError("a value is missing")
    signatures = rows["coarse"].combine_chunks()
    if signatures.flatten().null_count or 0 in pc.unique(pc.list_value_length(signatures)).to_pylist():
        raise ValueError("a signature is empty, or a number in it is missing")
    if not np.isfinite(rows["margin"].to_numpy()).all():
        raise ValueError("a margin is not finite")
    return rows, key


def _lists(column: pa.ChunkedArray) -> Iterator[NDArray[np.uint32]]:
    """The lists of a column, one after the other."""
    lists = column.combine_chunks()
    ends = np.cumsum(lists.value_lengths().to_numpy())
    yield from np.split(lists.flatten().to_numpy(), ends[:-1]) if len(ends) else ()
