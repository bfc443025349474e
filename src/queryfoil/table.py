"""Rows of results, one an image, as Arrow tables: what chunk files and images.parquet hold."""

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from queryfoil.metrics import NEVER
from queryfoil.run import Result
from queryfoil.task import Task

SCORES = pa.list_(pa.float32())

ATTACKED = pa.schema(
    [
        ("id", pa.int64()),
        ("label", pa.int64()),
        ("target", pa.int64()),  # null if untargeted
        ("clean_scores", SCORES),  # the defended model's answer to query 1
        ("queries", pa.int64()),
        ("fooled_at", pa.int64()),  # null if never
        ("confirmed", pa.float64()),  # share of fresh queries that the success survives; null if it can't fail
        ("adversarial", pa.binary()),  # bytes C x H x W as the model saw them; null unless fooled by it, and kept
    ]
)
CLEAN = pa.schema([("id", pa.int64()), ("label", pa.int64()), ("scores", SCORES)])
SCORES_FILE = "scores"  # the file with this table
TRACE = pa.schema(
    [
        ("path", pa.string()),  # whose attack: "undefended" or "defended"
        ("id", pa.int64()),
        ("query", pa.int64()),
        ("true_margin", pa.float64()),  # of the undefended network
        ("shown_margin", pa.float64()),  # of the defended model
    ]
)


def attacked(task: Task, result: Result, confirmed: Tensor | None, images: bool = True) -> pa.Table:
    """The table of one attack; `confirmed` (N,) in [0, 1] for randomized defenses, NaN where not fooled.

    Without `images`, the adversarial ones are left out.
    """
    fooled_at = result.fooled_at.cpu().numpy()
    levels = (result.adversarial * 255).round().to(torch.uint8).cpu().numpy()
    kept = (fooled_at > 1) & (fooled_at < NEVER) & images
    again = None if confirmed is None else confirmed.cpu().numpy()
    columns = {
        "id": task.ids.cpu().numpy(),
        "label": task.labels.cpu().numpy(),
        "target": pa.nulls(len(fooled_at), pa.int64()) if task.targets is None else task.targets.cpu().numpy(),
        "clean_scores": scores_column(result.clean_scores),
        "queries": result.queries.cpu().numpy(),
        "fooled_at": pa.array(fooled_at, mask=fooled_at == NEVER),
        "confirmed": pa.nulls(len(fooled_at), pa.float64()) if again is None else pa.array(again, mask=np.isnan(again)),
        "adversarial": pa.array(
            [row.tobytes() if keep else None for row, keep in zip(levels, kept, strict=True)],
            pa.binary(),
        ),
    }
    return pa.table(columns, schema=ATTACKED)


def scores_column(scores: Tensor) -> pa.Array:
    """Scores (N, K) as a list column."""
    values = scores.float().cpu().contiguous()
    offsets = pa.array(np.arange(0, values.numel() + 1, values.shape[1], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.flatten().numpy()))


def scores(table: pa.Table, column: str) -> NDArray[np.float32]:
    """A list column back as an array (N, K)."""
    chunk = table.column(column).combine_chunks()
    return np.asarray(chunk.flatten().to_numpy(zero_copy_only=False)).reshape(len(table), -1)


def fooled_at(table: pa.Table) -> NDArray[np.int64]:
    """The column with NEVER for null, as the metrics take it."""
    filled = table.column("fooled_at").fill_null(NEVER)
    return np.asarray(filled.to_numpy(), dtype=np.int64)


def trace_file(n: int) -> str:
    """The file with the losses along attacks on some of the first n images: which ones, depends on n."""
    return f"trace-{n}"


def traced(trace: pa.Table | None) -> list[int]:
    """The ids of the images of a trace, in its order."""
    return [] if trace is None else list(dict.fromkeys(trace.column("id").to_pylist()))
