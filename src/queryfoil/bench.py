"""Running a plan: cells in chunks that are written as they finish, so that a killed run continues."""

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from queryfoil import data, models, provenance, table
from queryfoil.attacks import settings
from queryfoil.data import Images
from queryfoil.defenses import DEFENSES, tau_of
from queryfoil.defenses.aaa import AAA
from queryfoil.defenses.calibration import fit
from queryfoil.models import MODELS
from queryfoil.oracle import answers
from queryfoil.plan import Cell, Plan, digest
from queryfoil.run import confirm, run
from queryfoil.store import CellStore, Store
from queryfoil.task import Task, random_targets

CHUNK = 250


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
class Prepared:
    """A cell with all that it needs in memory."""

    cell: Cell
    key: str
    network: nn.Module  # undefended
    model: nn.Module  # defended
    attack: Any
    images: Images  # to be attacked
    unseen: Images  # all that nothing was fitted on: accuracy and calibration are measured here
    fitted: tuple[dict[str, Any] | None, ...]  # for each defense, what `fit` found
    classes: int

    @property
    def clean(self) -> str:
        """Name of the file with the scores of the unseen images: it tells which images they are."""
        return f"clean-{provenance.tensors(self.unseen.images, self.unseen.labels, self.unseen.ids)}"

    def task(self, rows: slice) -> Task:
        """The task on some of the images."""
        part = self.images[rows]
        targets = None
        if self.cell.targeted:
            targets = random_targets(part.labels, part.ids, self.classes, self.cell.seed)
        return Task.create(
            part.images,
            part.labels,
            part.ids,
            targets,
            self.cell.norm,
            self.cell.eps,
            self.cell.loss or "margin",
            self.cell.seed,
        )


def bench(
    plan: Plan,
    out: str | Path,
    data_folder: str | Path | None = None,
    device: str = "cpu",
    time_limit: float | None = None,
    chunk: int = CHUNK,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Run what is missing of a plan in folder `out`; `report.write` then makes the report of it.

    `data_folder` holds the full data set: accuracy and calibration are then measured on all test images
    that nothing was fitted on, instead of the shipped ones. `time_limit` in seconds stops at the end
    of a chunk. Everything is checked and prepared before the first query. The chunk size does
    not change a result.
    """
    if chunk < 1:
        raise ValueError(f"expected a chunk of at least 1 image, but got {chunk}")
    folder = Store(out)
    folder.check(plan)
    prepared = [prepare(cell, data_folder, device) for cell in plan.cells]
    folder.claim(plan, {p.cell.label: p.key for p in prepared})
    started = time.perf_counter()
    stores = [folder.cell(p.key) for p in prepared]
    todo = [list(_missing(p, s, chunk)) for p, s in zip(prepared, stores, strict=True)]
    counter = _Counter(prepared, todo, report)
    try:
        for p, s, chunks in zip(prepared, stores, todo, strict=True):
            s.write_json(_describe(p))
            for rows in chunks:
                if time_limit is not None and time.perf_counter() - started > time_limit:
                    return Outcome(counter.left, counter.images, _damaged(stores))
                _attack(p, s, rows, counter)
            _measure(p, s)
            _trace(p, s)
        return Outcome(0, counter.images, _damaged(stores))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"no space left for {out}; every finished chunk is kept, so make room and run the same command again",
            ) from None
        raise


def prepare(cell: Cell, data_folder: str | Path | None, device: str) -> Prepared:
    """Load data and network, fit and stack the defenses, and name the cell by all that decides its result."""
    images = data.load(cell.dataset, "attack")
    if len(images) < cell.n:
        raise ValueError(f"{cell.label}: expected n <= {len(images)} attack images, but got n = {cell.n}")
    calibration = data.load(cell.dataset, "calibration")
    unseen = images if data_folder is None else _without(_full(cell.dataset, data_folder, images), calibration)
    images = images[: cell.n]
    network = models.load(cell.model, device)
    model, fitted = _defend(network, cell, calibration, device)
    attack = cell.build(tau_of(model))
    modules = ["queryfoil.run", "queryfoil.table", type(attack).__module__, MODELS[cell.model].__module__]
    modules += [DEFENSES[d.name].__module__ for d in cell.defenses]
    key = digest(
        {
            "settings": cell.settings(),
            "fitted": fitted,
            "code": provenance.code(modules),
            "weights": provenance.weights(network),
            "images": provenance.tensors(images.images, images.labels, images.ids),
            "versions": {k: v for k, v in provenance.versions().items() if k != "python"},
            "device": torch.device(device).type,
        }
    )
    some = _to(images[:2], device)
    classes = _clean_answers(network, some, cell.seed).shape[1]
    prepared = Prepared(cell, key, network, model, attack, _to(images, device), _to(unseen, device), fitted, classes)
    prepared.task(slice(0, cell.n))  # checks all that a task checks, before any query
    return prepared


def _defend(
    network: nn.Module, cell: Cell, calibration: Images, device: str
) -> tuple[nn.Module, tuple[dict[str, Any] | None, ...]]:
    model = network
    fitted: list[dict[str, Any] | None] = []
    for defense in cell.defenses:
        if defense.fit:
            scores = _clean_answers(model, _to(calibration, device), cell.seed)
            found = fit(scores, calibration.labels.to(device), **defense.arguments)
            model = AAA.from_fit(model, found)
            fitted.append(vars(found))
        else:
            model = DEFENSES[defense.name](model, **defense.arguments)
            fitted.append(None)
    return model.eval(), tuple(fitted)


def _clean_answers(model: nn.Module, images: Images, seed: int) -> Tensor:
    return answers(model, images.images, images.ids, torch.zeros_like(images.ids), seed)


def _to(images: Images, device: str) -> Images:
    return Images(*(t.to(device) for t in (images.images, images.labels, images.ids)))


def _full(dataset: str, folder: str | Path, shipped: Images) -> Images:
    """The full test split; ValueError unless it holds the shipped images at their ids."""
    full = data.load(dataset, "test", folder)
    if len(full) <= int(shipped.ids.max()) or not torch.equal(full[shipped.ids].images, shipped.images):
        raise ValueError(
            f"expected the test images of {dataset} in {folder}, but they are not those that the shipped ones come from"
        )
    return full


def _without(images: Images, others: Images) -> Images:
    return images[~torch.isin(images.ids, others.ids)]


def _describe(p: Prepared) -> dict[str, Any]:
    return {
        "cell": p.key,
        "clean": p.clean,
        "settings": p.cell.settings(),
        "fitted": p.fitted,
        "hyper": settings(p.attack),
        "deterministic": bool(getattr(p.model, "deterministic", True)),
        "versions": provenance.versions(),
    }


def _chunk_name(rows: slice) -> str:
    return f"chunk-{rows.start:06d}-{rows.stop:06d}"


def _missing(p: Prepared, s: CellStore, chunk: int) -> Iterator[slice]:
    """The chunks that are not on disk; a damaged one is among them."""
    ids = p.images.ids.cpu().numpy()
    chunk = chunk if p.attack.rowwise else p.cell.n  # what learns from all images at once runs on all at once
    for start in range(0, p.cell.n, chunk):
        rows = slice(start, min(start + chunk, p.cell.n))
        found = s.read(_chunk_name(rows), table.ATTACKED)
        if found is None or not np.array_equal(found.column("id").to_numpy(), ids[rows]):
            yield rows


def _attack(p: Prepared, s: CellStore, rows: slice, counter: "_Counter") -> None:
    task = p.task(rows)
    result = run(p.attack, p.model, task, p.cell.budget, progress=counter.within(p))
    confirmed = None if getattr(p.model, "deterministic", True) else confirm(p.model, task, result)
    s.write(_chunk_name(rows), table.attacked(task, result, confirmed), result.seconds)
    counter.finish(p, rows, int(result.queries.sum()))


def _measure(p: Prepared, s: CellStore) -> None:
    """Scores before and after the defenses on all images that nothing was fitted on."""
    if s.read(p.clean, table.CLEAN) is not None:
        return
    ids = p.unseen.ids.cpu().numpy()
    columns = [table.scores_column(_clean_answers(m, p.unseen, p.cell.seed)) for m in (p.model, p.network)]
    s.write(p.clean, pa.table([ids, p.unseen.labels.cpu().numpy(), *columns], schema=table.CLEAN))


def _trace(p: Prepared, s: CellStore) -> None:
    """Both losses along an attack on the undefended network, and along one on the defended model.

    On one image: the first that survives the cell's attack, or the last to fall. The margin that the
    attacker does not see comes from an uncounted replay of its queries.
    """
    if s.read("trace", table.TRACE) is not None:
        return
    fooled_at = table.fooled_at(s.attacked())
    task = replace(p.task(slice(int(fooled_at.argmax()), int(fooled_at.argmax()) + 1)), loss="margin")
    paths = {"undefended": p.network, "defended": p.model} if p.cell.defenses else {"undefended": p.network}
    parts = []
    for path, attacked_model in paths.items():
        x = _images_sent(p, attacked_model, task)
        ids, queries = task.ids.expand(len(x)), torch.arange(1, len(x) + 1, device=x.device)
        along = replace(task, labels=task.labels.expand(len(x)), targets=_expand(task.targets, len(x)))
        true, shown = (
            along.margin(answers(m, x, ids, queries, task.seed)).double().cpu().numpy() for m in (p.network, p.model)
        )
        columns = [[path] * len(x), ids.cpu().numpy(), queries.cpu().numpy(), true, shown]
        parts.append(pa.table(columns, schema=table.TRACE))
    s.write("trace", pa.concat_tables(parts))


def _images_sent(p: Prepared, model: nn.Module, task: Task) -> Tensor:
    """All queries of the cell's attack on another model, one after the other."""
    sent: list[Tensor] = []
    run(p.attack, model, task, p.cell.budget, observe=lambda ids, queries, images, scores: sent.append(images))
    return torch.cat(sent)


def _expand(values: Tensor | None, n: int) -> Tensor | None:
    return None if values is None else values.expand(n)


def _damaged(stores: list[CellStore]) -> tuple[Path, ...]:
    return tuple(path for s in stores for path in s.damaged)


class _Counter:
    """Turns what chunks report into `Progress`."""

    def __init__(self, prepared: list[Prepared], todo: list[list[slice]], report: Callable[[Progress], None]) -> None:
        self.report = report
        self.images = sum(p.cell.n for p in prepared)
        self.total = sum(p.cell.n * p.cell.budget for p in prepared)
        missing = [(p, rows.stop - rows.start) for p, chunks in zip(prepared, todo, strict=True) for rows in chunks]
        self.left = sum(n for _, n in missing)
        self.units = self.total - sum(n * p.cell.budget for p, n in missing)
        self.queries = 0

    def within(self, p: Prepared) -> Callable[[int, int], None]:
        """What `run` calls: queries of this chunk that are spent, and those that are settled."""

        def progress(spent: int, settled: int) -> None:
            self.report(Progress(p.cell.label, self.units + settled, self.total, self.queries + spent))

        return progress

    def finish(self, p: Prepared, rows: slice, spent: int) -> None:
        n = rows.stop - rows.start
        self.left -= n
        self.units += n * p.cell.budget
        self.queries += spent
        self.report(Progress(p.cell.label, self.units, self.total, self.queries))
