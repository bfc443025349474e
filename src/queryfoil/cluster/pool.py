"""The tasks that are on a cluster: started, watched, and cancelled in the end."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

from queryfoil.cluster import ClusterError, Ray, worker
from queryfoil.cluster.board import board
from queryfoil.cluster.connection import slots

RETRIES = 3  # of a task whose worker or node dies
LOOK = 0.5  # seconds between two looks at progress
COUNT = 5.0  # seconds between two looks at the size of the cluster
NOSET = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}  # see `worker.device_of`


@dataclass(frozen=True)
class Piece:
    """A task: what is asked of a worker for a cell of the plan, and what becomes of the result."""

    cell: int
    order: worker.Order
    keep: Callable[[worker.Done], None]


class Task(NamedTuple):
    """A piece of work on the cluster, and the number by which the board knows it."""

    piece: Piece
    number: int


class Pool:
    """As many tasks as fit on the cluster at once, and one that waits: by it, a cluster that can grow knows to.

    `specs` are of the cells that tasks are about.
    """

    def __init__(self, ray: Any, engine: Ray, specs: Sequence[worker.Spec]) -> None:
        self.ray, self.engine, self.specs = ray, engine, specs
        self._running: dict[Any, Task] = {}  # by Ray's reference to its result
        self._shipped: dict[int, Any] = {}
        self._started, self._counted, self._slots = 0, 0.0, 0
        settings: dict[str, Any] = {"num_cpus": 1, "num_gpus": engine.gpus_per_task, "max_retries": RETRIES}
        if engine.gpus_per_task:  # a process keeps the models it has made for further tasks, whichever GPU these get
            settings |= {"max_calls": 0, "runtime_env": {"env_vars": NOSET}}
        self._do = ray.remote(**settings)(worker.do)
        self._board = ray.remote(num_cpus=0, max_restarts=-1)(board()).remote()
        self._noted: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reference in self._running:
            self.ray.cancel(reference, force=True)
        self.ray.kill(self._board)

    @property
    def has_room(self) -> bool:
        """Whether to start another task."""
        if time.monotonic() - self._counted > COUNT:
            self._slots, self._counted = slots(self.ray, self.engine), time.monotonic()
        return len(self._running) < self._slots + 1

    @property
    def running(self) -> list[Piece]:
        """What was started and has not finished, the first first."""
        return [task.piece for task in self._running.values()]

    def start(self, piece: Piece) -> None:
        """Start a task."""
        if piece.cell not in self._shipped:
            self._shipped[piece.cell] = self.ray.put(self.specs[piece.cell])
        reference = self._do.remote(self._shipped[piece.cell], piece.order, self._started, self._board)
        self._running[reference] = Task(piece, self._started)
        self._started += 1

    def finished(self) -> Iterator[tuple[Piece, worker.Done]]:
        """What has finished, after at most `LOOK` seconds; ClusterError, or what a task has raised."""
        self.ray.wait(list(self._running), timeout=LOOK)  # until one of them has
        ready, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for reference in ready:
            yield self._running.pop(reference).piece, self._result(reference)

    def noted(self) -> list[tuple[int, int]]:
        """Of each task at hand that has told something: queries spent, and queries spent or never needed."""
        errors = self.ray.exceptions
        numbers = [task.number for task in self._running.values()]
        # no matter if the board is late, or away as its node has died: it comes back, and until then, the last holds
        with contextlib.suppress(errors.GetTimeoutError, errors.RayActorError):
            self._noted = self.ray.get(self._board.read.remote(numbers), timeout=LOOK)
        return [self._noted[number] for number in numbers if number in self._noted]

    def _result(self, reference: Any) -> worker.Done:
        errors = self.ray.exceptions
        try:
            done: worker.Done = self.ray.get(reference)
            return done
        except errors.RayTaskError as error:
            if isinstance(error.cause, errors.RayError) or not isinstance(error.cause, Exception):
                raise ClusterError(f"a task could not start: {error}") from error
            raise error.cause from error
        except errors.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise ClusterError(
                f"a task was lost {RETRIES + 1} times, as its process or node died (memory?): {reason}"
            ) from error
