"""Attacking images in chunks that are written as they finish, so that a killed run continues."""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from queryfoil import table
from queryfoil.oracle import Model
from queryfoil.run import Attack, confirm, run
from queryfoil.store import CellStore
from queryfoil.task import Task

CHUNK = 250
SMALL = 4096  # values of an image that is small: more of these fit in a call of the model


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `units` are queries that are spent or will never be needed, of `total`."""

    label: str
    units: int
    total: int
    queries: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended: how many images are still to be attacked, and which files had to be computed again."""

    left: int
    total: int
    damaged: tuple[Path, ...]


@dataclass(frozen=True)
class Job:
    """One attack on all images of a task, ready to run."""

    label: str
    key: str  # hash of all that decides the result
    attack: Attack[Any]
    model: Model  # as it is served, defenses included
    task: Task
    budget: int

    def __len__(self) -> int:
        return len(self.task.ids)


class Chunks:
    """The chunks of some jobs that are not on disk yet, a damaged one among them.

    `size` is in images, and does not change a result. `time_limit` is in seconds from now. Without `keep_images`, the
    adversarial images are not stored.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        stores: Sequence[CellStore],
        size: int,
        time_limit: float | None,
        report: Callable[[Progress], None],
        keep_images: bool = True,
    ) -> None:
        if size < 1:
            raise ValueError(f"expected a chunk of at least 1 image, but got {size}")
        self.end, self.size = None if time_limit is None else time.perf_counter() + time_limit, size
        self.stores, self.report, self.keep_images = stores, report, keep_images
        self.jobs = jobs
        self.todo = [self._left(job, store) for job, store in zip(jobs, stores, strict=True)]  # images of each job
        self.images, self.queries = sum(map(len, jobs)), 0
        self.total = sum(len(job) * job.budget for job in jobs)

    def attack(self, number: int, job: Job) -> bool:
        """Attack what is missing of the job with this number; False if the time is up before that is done."""
        for rows in self.missing(number):
            if self.time_is_up:
                return False
            part = replace(job, task=job.task.rows(rows))
            found, seconds = attacked(part, self.keep_images, self._within(job))
            self.keep(number, rows, found, seconds)
            self.report(Progress(job.label, self.units, self.total, self.queries))
        self.todo[number] = 0
        return True

    def missing(self, number: int) -> Iterator[slice]:
        """The images of the job with this number that are to be attacked by now, as others may share the folder."""
        return _missing(self.jobs[number], self.stores[number], self.size)

    def keep(
        self, number: int, rows: slice, found: pa.Table, seconds: float, versions: dict[str, str] | None = None
    ) -> None:
        """Write the result of these images of the job with this number; `versions` of what computed it, if not here."""
        self.stores[number].write_chunk(rows, found, seconds, versions)
        self.todo[number] -= len(found)
        self.queries += sum(found.column("queries").to_pylist())

    @property
    def time_is_up(self) -> bool:
        """Whether no further chunk may begin."""
        return self.end is not None and time.perf_counter() > self.end

    @property
    def units(self) -> int:
        """Queries that are spent or will never be needed."""
        return self.total - sum(n * job.budget for n, job in zip(self.todo, self.jobs, strict=True))

    def _left(self, job: Job, store: CellStore) -> int:
        return sum(rows.stop - rows.start for rows in _missing(job, store, self.size))

    @property
    def outcome(self) -> Outcome:
        """How the run stands."""
        return Outcome(sum(self.todo), self.images, tuple(path for store in self.stores for path in store.damaged))

    def _within(self, job: Job) -> Callable[[int, int], None]:
        """What `run` calls: queries of this chunk that are spent, and those that are settled."""

        def progress(spent: int, settled: int) -> None:
            self.report(Progress(job.label, self.units + settled, self.total, self.queries + spent))

        return progress


def attacked(job: Job, keep_images: bool, progress: Callable[[int, int], None] | None = None) -> tuple[pa.Table, float]:
    """Attack all images of a job: their table, and the seconds that it took; `progress` is as `run` takes it."""
    micro_batch = 256 if job.task.images[0].numel() <= SMALL else 128
    result = run(job.attack, job.model, job.task, job.budget, micro_batch, progress)
    confirmed = None if getattr(job.model, "deterministic", True) else confirm(job.model, job.task, result)
    return table.attacked(job.task, result, confirmed, keep_images), result.seconds


@contextmanager
def space(out: str | Path) -> Iterator[None]:
    """Say what to do when there is no space left."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"no space left for {out}; every finished chunk is kept, so make room and run the same command again",
            ) from None
        raise


def _missing(job: Job, store: CellStore, size: int) -> Iterator[slice]:
    """The images that no chunk on disk holds, in pieces of at most `size`; what ties images together runs on all."""
    todo = np.setdiff1d(np.arange(len(job)), store.positions(job.task.ids.cpu().numpy()))
    if not len(todo):
        return
    if not (job.attack.rowwise and getattr(job.model, "rowwise", True)):
        yield slice(0, len(job))
        return
    for run_ in np.split(todo, np.flatnonzero(np.diff(todo) > 1) + 1):
        for start in range(int(run_[0]), int(run_[-1]) + 1, size):
            yield slice(start, min(start + size, int(run_[-1]) + 1))
