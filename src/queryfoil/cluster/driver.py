"""The driver's side of a plan on a Ray cluster: what is to be done next, and what becomes of its result."""

import itertools
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from queryfoil import measuring, table
from queryfoil.chunks import Chunks, Progress
from queryfoil.cluster import Ray, worker
from queryfoil.cluster.board import board
from queryfoil.cluster.connection import ClusterError, connected, slots
from queryfoil.cluster.packed import pack
from queryfoil.defenses import DEFENSES
from queryfoil.oracle import ModelError
from queryfoil.prepare import Prepared
from queryfoil.store import CellStore, Store

RETRIES = 3  # of a task whose worker or node dies
SCORED = 1024  # images that a task asks about: whole micro-batches, so that a defense of batches sees the same ones
LOOK = 0.5  # seconds between two looks at progress
COUNT = 5.0  # seconds between two looks at the size of the cluster
NOSET = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}  # see `worker.device_of`


@dataclass(frozen=True)
class Piece:
    """A task: what is asked of a worker for a cell of the plan, and what becomes of the result."""

    cell: int
    order: worker.Order
    keep: Callable[[worker.Done], None]


def run(
    engine: Ray,
    prepared: Sequence[Prepared],
    stores: Sequence[CellStore],
    folder: Store,
    chunks: Chunks,
    describe: Callable[[Prepared], dict[str, Any]],
) -> None:
    """Have a cluster do what is missing of all cells, and write each result as it comes.

    Whatever ends it, a result that came is kept, and no task is left. ClusterError if workers die again and again on
    the same task; what a task raises is raised here, with the cell's label.
    """
    with connected(engine) as ray:
        pool = Pool(ray, engine, prepared)
        try:
            _until_done(pool, Work(prepared, stores, folder, chunks, describe), chunks)
        finally:
            pool.stop()


class Pool:
    """The tasks that are on the cluster: as many as fit, and a few that wait, so that none of them idles or piles up."""

    def __init__(self, ray: Any, engine: Ray, prepared: Sequence[Prepared]) -> None:
        ...
