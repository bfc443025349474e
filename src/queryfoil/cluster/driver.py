"""The driver's side of a plan on a Ray cluster: what is to be done next, and what becomes of its result."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from queryfoil import measuring, table
from queryfoil.chunks import Chunks, Progress
from queryfoil.cluster import Ray, worker
from queryfoil.cluster.connection import connected
from queryfoil.cluster.packed import pack
from queryfoil.cluster.pool import Piece, Pool
from queryfoil.prepare import Prepared
from queryfoil.store import CellStore, Store

SCORED = 1024  # images that a task asks about: whole micro-batches, so that each image has the neighbours it would have


def run(engine: Ray, prepared: Sequence[Prepared], stores: Sequence[CellStore], folder: Store, chunks: Chunks) -> None:
    """Have a cluster do what is missing of all cells, and write each result as it comes.

    Whatever ends it, a result that came is kept, and no task is left. ClusterError if workers die again and again on
    the same task; what a task raises is raised here.
    """
    library = worker.library()
    specs = [spec(p, engine.computes_on("cpu"), library) for p in prepared]
    work = Work(prepared, stores, folder, chunks)
    if (piece := work.next()) is None:
        return
    work.ready.append(piece)
    with connected(engine) as ray, Pool(ray, engine, specs) as pool:
        while True:
            while pool.has_room and (piece := work.next()) is not None:
                pool.start(piece)
            if not pool.running:
                return
            for piece, done in pool.finished():
                piece.keep(done)
            _report(pool, prepared, chunks)


def _report(pool: Pool, prepared: Sequence[Prepared], chunks: Chunks) -> None:
    """Tell how far all is, by what the workers have noted of the chunks at hand; the name is of the first of these."""
    spent, settled = (sum(column) for column in zip((0, 0), *pool.noted(), strict=True))
    attacked = [piece.cell for piece in pool.running if isinstance(piece.order, worker.AttackImages)]
    label = prepared[min(attacked, default=len(prepared) - 1)].label
    chunks.report(Progress(label, chunks.units + settled, chunks.total, chunks.queries + spent))


class Work:
    """The pieces of work in the order of the plan; what follows a cell's attack comes when all its chunks are there."""

    def __init__(
        self, prepared: Sequence[Prepared], stores: Sequence[CellStore], folder: Store, chunks: Chunks
    ) -> None:
        self.prepared, self.stores, self.folder, self.chunks = prepared, stores, folder, chunks
        self.waiting = [0] * len(prepared)  # chunks of each cell that are under way
        self.asked: set[str] = set()  # scores that were asked for: several cells may share them
        self.ready: deque[Piece] = deque()
        self.pieces = self._in_order()

    def next(self) -> Piece | None:
        """The next piece; None if there is none, or not yet."""
        return self.ready.popleft() if self.ready else next(self.pieces, None)

    def _in_order(self) -> Iterator[Piece]:
        for number, (p, store) in enumerate(zip(self.prepared, self.stores, strict=True)):
            store.write_json(measuring.describe(p))
            missing = list(self.chunks.missing(number))
            self.waiting[number] = len(missing)
            for rows in missing:
                if self.chunks.time_is_up:
                    return
                order = worker.AttackImages(pack(p.task.rows(rows)), self.chunks.keep_images)
                yield Piece(number, order, partial(self._keep_chunk, number, rows))
            if not missing:
                yield from self._after_attack(number)

    def _keep_chunk(self, number: int, rows: slice, done: worker.Done) -> None:
        self.chunks.keep(number, rows, done.rows, done.seconds, done.versions)
        self.waiting[number] -= 1
        if not self.waiting[number]:
            self.ready += self._after_attack(number)

    def _after_attack(self, number: int) -> Iterator[Piece]:
        self.chunks.todo[number] = 0
        p = self.prepared[number]
        for name, undefended in ((p.shown, False), (p.undefended, True)):
            kept = self.folder.scores(name)
            if name not in self.asked and kept.read(table.SCORES_FILE, table.CLEAN) is None:
                self.asked.add(name)
                parts = [p.unseen[start : start + SCORED] for start in range(0, len(p.unseen), SCORED)]
                orders = (worker.ScoreImages(pack(part), undefended) for part in parts)
                yield from _table(number, orders, len(parts), partial(kept.write, table.SCORES_FILE))
        positions = measuring.to_trace(p, self.stores[number])
        traced = (worker.TraceImages(pack(p.task.rows(slice(i, i + 1)))) for i in positions)
        write = partial(self.stores[number].write, table.trace_file(p.cell.n))
        yield from _table(number, traced, len(positions), write)


def _table(number: int, orders: Iterator[worker.Order], count: int, write: Callable[..., None]) -> Iterator[Piece]:
    """Pieces whose results are the parts of one table, which is written when the last one has come."""
    parts: dict[int, worker.Done] = {}

    def keep(position: int, done: worker.Done) -> None:
        parts[position] = done
        if len(parts) == count:
            write(pa.concat_tables([parts[i].rows for i in range(count)]), versions=done.versions)

    for position, order in enumerate(orders):
        yield Piece(number, order, partial(keep, position))


def spec(p: Prepared, computes_on: str, library: dict[str, str]) -> worker.Spec:
    return worker.Spec(
        p.key, p.label, p.cell, p.attack, p.fits, p.images_hash, p.network.identity, p.code, library, computes_on,
        Path.cwd(),
    )  # fmt: skip
