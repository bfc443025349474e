"""Where results lie on disk: one folder a cell, one Parquet file a finished chunk, each written atomically.

DIR/plan.json                 the plan this folder belongs to (attack.json: the attack)
DIR/cells/HASH/cell.json      what was run: settings, fitted parameters
DIR/cells/HASH/chunk-A-B.parquet  images A to B of the cell
DIR/cells/HASH/trace-N.parquet  losses along attacks on some of the first N images
DIR/scores/HASH/scores.parquet  scores of a model on the images that nothing was fitted on

Cells and scores may lie in another folder, which plans share. Each table carries in its metadata the hash, the seconds
that it took, and the versions of what computed it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from queryfoil import files, provenance, table
from queryfoil.plan import Plan


class Owner(Protocol):
    """What a folder belongs to: a plan, or the settings of one attack."""

    @property
    def name(self) -> str: ...

    def digest(self) -> str: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class Store:
    """The output folder of one plan, or of one attack (`kind` "attack").

    `share` is the folder with the cells; None: as the folder says that is there, else the folder itself.
    """

    def __init__(self, folder: str | Path, kind: str = "plan", share: str | Path | None = None) -> None:
        self.folder, self.kind = Path(folder), kind
        self.shared = self._shared() if share is None else Path(share)

    def _shared(self) -> Path:
        path = self.folder / f"{self.kind}.json"
        return self.folder / read_json(path, "share")["share"] if path.is_file() else self.folder

    def check(self, owner: Owner) -> None:
        """ValueError if the folder belongs to another plan (or attack) or holds other things."""
        path, command = self.folder / f"{self.kind}.json", {"plan": "bench"}.get(self.kind, self.kind)
        if path.is_file():
            other = read_json(path, "digest", "cells", self.kind)
            if other["digest"] != owner.digest() and self._holds_results(other["cells"].values()):
                theirs, ours = other[self.kind], owner.model_dump(mode="json")
                differ = [name for name in ours if not isinstance(theirs, dict) or ours[name] != theirs.get(name)]
                raise ValueError(
                    f"{self.folder} holds results of another {self.kind} ({other.get('name')!r}, {other['digest']}), "
                    f"not of {owner.name!r} ({owner.digest()}): they differ in {', '.join(differ)}; "
                    "choose another folder"
                )
        elif self.folder.exists() and not (self.folder.is_dir() and self._all_ours()):
            raise ValueError(
                f"expected {self.folder} to be new, empty or of `queryfoil {command}`, but it holds other files"
            )

    def _holds_results(self, keys: Iterable[str]) -> bool:
        return any(True for key in keys for _ in self.cell(key).folder.glob("*.parquet"))

    def claim(self, owner: Owner, keys: dict[str, str], scores: dict[str, list[str]] | None = None) -> None:
        """Take the folder for a plan, whose cells have these hashes now, by label, and their scores these.

        Results of other hashes (of other code, weights or versions) stay, and are not looked at. What a killed
        run left half written is removed.
        """
        self.check(owner)
        content = {"name": owner.name, "digest": owner.digest(), "cells": keys}
        content[self.kind] = owner.model_dump(mode="json")
        content["share"] = os.path.relpath(self.shared, self.folder)
        if scores is not None:
            content["scores"] = scores
        files.write_text(self.folder / f"{self.kind}.json", json.dumps(content, indent=1) + "\n")
        for half_written in [*self.folder.glob(".*.json.*"), *self.shared.glob("*/*/.*.*")]:
            files.remove_if_old(half_written)  # a new one may be of another run, which shares the folder

    def plan(self) -> tuple[Plan, dict[str, str], dict[str, list[str]]]:
        """The plan that the folder belongs to, and by label the hashes of its cells, and of their scores.

        The latter are two for a cell: of the model as it is served, and undefended.
        """
        path = self.folder / "plan.json"
        if not path.is_file():
            raise FileNotFoundError(f"expected a folder written by `queryfoil bench`, but {path} does not exist")
        content = read_json(path, "plan", "cells", "scores")
        if not self.shared.is_dir():
            raise FileNotFoundError(
                f"expected the cells of {self.folder} in {self.shared}, but there is no such folder"
            )
        try:
            return Plan.model_validate(content["plan"]), dict(content["cells"]), dict(content["scores"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and run again") from None

    def cell(self, key: str) -> "CellStore":
        """The part of the folder for the cell with this hash."""
        return CellStore(self.shared / "cells" / key, key)

    def scores(self, key: str) -> "CellStore":
        """The part of the folder for the scores with this hash."""
        return CellStore(self.shared / "scores" / key, key)

    def _all_ours(self) -> bool:
        """Whether what lies in the folder was written by the command: adversarial images never stand alone."""
        paths = list(self.folder.iterdir())
        names = {path.name for path in paths}
        return all(map(self._ours, paths)) and ("cells" in names or "adversarial" not in names)

    def _ours(self, path: Path) -> bool:
        """What may lie in a folder whose plan.json was lost or not written yet."""
        written = {"plan": ("report.md", "report.html", "figures", "audit.json", "spent.json")}.get(
            self.kind, ("adversarial",)
        )
        return path.name in ("cells", "scores", "summary.json", "images.parquet", *written) or path.name.startswith(
            (f".{self.kind}.json.", ".audit.json.")
        )


class CellStore:
    """The files of one cell. A file that cannot be read, or is not of this cell, counts as absent."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.damaged: list[Path] = []

    def write(self, name: str, rows: pa.Table, seconds: float = 0.0, versions: dict[str, str] | None = None) -> None:
        """Write a table atomically; `seconds` is the time that it took to compute, `versions` of what, if not here."""
        computed_by = json.dumps(versions or provenance.versions())
        meta = {"cell": self.key, "seconds": f"{seconds:.3f}", "versions": computed_by}
        with files.replacing(self.folder / f"{name}.parquet") as temporary:
            pq.write_table(rows.replace_schema_metadata(meta), temporary, compression="zstd", write_page_checksum=True)

    def read(self, name: str, schema: pa.Schema) -> pa.Table | None:
        """The table, or None where there is none; a damaged one is also noted in `damaged`."""
        path = self.folder / f"{name}.parquet"
        if not path.is_file():
            return None
        try:
            rows = pq.read_table(path, page_checksum_verification=True, partitioning=None)
            if rows.schema.equals(schema) and _cell(rows) == self.key and seconds(rows) >= 0:
                return rows
        except (OSError, ValueError, pa.ArrowException):
            pass  # unreadable, or with metadata that are: noted below like a file of another cell
        if path not in self.damaged:
            self.damaged.append(path)
        return None

    def write_chunk(
        self, rows: slice, attacked: pa.Table, seconds: float, versions: dict[str, str] | None = None
    ) -> None:
        """Write the images at these positions of the cell; damaged chunks make room for it."""
        for path in self.damaged:
            if path.name.startswith("chunk-") and self.read(path.stem, table.ATTACKED) is None:  # nobody mended it
                path.unlink(missing_ok=True)
        self.write(f"chunk-{rows.start:06d}-{rows.stop:06d}", attacked, seconds, versions)

    def attacked(self, n: int | None = None) -> pa.Table:
        """The first n images of the cell (or all) that chunks hold, each once, in its order."""
        chunks = list(self._chunks())
        if not chunks:
            return table.ATTACKED.empty_table()
        rows = pa.concat_tables([chunk.replace_schema_metadata() for _, chunk in chunks])
        positions, first = np.unique(np.concatenate([found for found, _ in chunks]), return_index=True)
        taken = rows.take(first if n is None else first[positions < n])
        spent = np.asarray(taken.column("queries")).sum() / max(np.asarray(rows.column("queries")).sum(), 1)
        time = float(spent) * sum(seconds(chunk) for _, chunk in chunks)  # the part that these images took, by queries
        return taken.replace_schema_metadata({"seconds": f"{time:.3f}"})

    def positions(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """At which positions of the cell, whose images have these ids, chunks hold the right image."""
        found = [np.empty(0, np.int64)]
        for positions, chunk in self._chunks():
            inside = positions < len(ids)
            right = chunk.column("id").to_numpy()[inside] == ids[positions[inside]]
            found.append(positions[inside][right])
        return np.unique(np.concatenate(found))

    def versions(self) -> list[dict[str, str]]:
        """What computed the chunks: each combination of versions once."""
        texts = dict.fromkeys((chunk.schema.metadata or {}).get(b"versions", b"{}") for _, chunk in self._chunks())
        return [json.loads(text) for text in texts]

    def _chunks(self) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        """Each readable chunk, with the positions of its images."""
        for path in sorted(self.folder.glob("chunk-*.parquet")):
            chunk = self.read(path.stem, table.ATTACKED)
            if chunk is not None:
                start = int(path.stem.split("-")[1])
                yield np.arange(start, start + len(chunk)), chunk

    def write_json(self, content: dict[str, Any]) -> None:
        """Write cell.json."""
        files.write_text(self.folder / "cell.json", json.dumps(content, indent=1) + "\n")

    def read_json(self) -> dict[str, Any]:
        """Read cell.json."""
        return read_json(self.folder / "cell.json", "cell", "fitted", "hyper", "code")


def seconds(rows: pa.Table) -> float:
    """The time that a stored table took to compute."""
    return float((rows.schema.metadata or {}).get(b"seconds", b"0"))


def _cell(rows: pa.Table) -> str:
    return bytes((rows.schema.metadata or {}).get(b"cell", b"")).decode()


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object with these keys; ValueError that names the file if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run again") from None
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise ValueError(f"{path} is damaged (expected {', '.join(keys)}); remove it and run again")
    return content
