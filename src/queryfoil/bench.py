"""Running a plan: cell by cell, each in chunks, so that a killed run continues."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from queryfoil import data, provenance, table
from queryfoil.attacks import settings
from queryfoil.checks import lookup
from queryfoil.chunks import CHUNK, Chunks, Job, Outcome, Progress, space
from queryfoil.data import DATASETS, Images
from queryfoil.defenses import DEFENSES, tau_of
from queryfoil.models.victim import Victim, classes_of
from queryfoil.oracle import Model, answers
from queryfoil.plan import Cell, Plan, digest
from queryfoil.run import run
from queryfoil.store import CellStore, Store
from queryfoil.task import Task, random_targets

Folders = str | Path | Mapping[str, str | Path]
"""The folder of the data set, or the folder of each by its name."""


@dataclass(frozen=True)
class Prepared(Job):
    """A cell with all that it needs in memory."""

    cell: Cell
    network: Victim  # undefended
    unseen: Images  # all that nothing was fitted on: accuracy and calibration are measured here
    fitted: tuple[dict[str, Any] | None, ...]  # for each defense, what `fit` found

    @property
    def clean(self) -> str:
        """Name of the file with the scores of the unseen images: it tells which images they are."""
        return f"clean-{provenance.tensors(self.unseen.images, self.unseen.labels, self.unseen.ids)}"


def bench(
    plan: Plan,
    out: str | Path,
    data_folder: Folders | None = None,
    device: str = "cpu",
    time_limit: float | None = None,
    chunk: int = CHUNK,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Run what is missing of a plan in folder `out`; `report.write` then makes the report of it.

    `data_folder` is the folder of the plan's data set, or a mapping from names of data sets to folders. Of a data set
    that ships in part, accuracy and calibration are then measured on all test images that nothing was fitted on,
    instead of the shipped ones; of any other, on all images of the attack split. `time_limit` in seconds stops at the
    end of a chunk. Everything is checked and prepared before the first query. The chunk size does not change a result.
    """
    folder = Store(out)
    folder.check(plan)
    sources = _sources(plan, data_folder)
    images = functools.cache(_images)  # each data set is read once and held once, however many cells attack it
    prepared = [prepare(cell, sources[cell.dataset], device, images) for cell in plan.cells]
    stores = [folder.cell(p.key) for p in prepared]
    chunks = Chunks(prepared, stores, chunk, time_limit, report)
    folder.claim(plan, {p.label: p.key for p in prepared})
    with space(out):
        for number, (p, s) in enumerate(zip(prepared, stores, strict=True)):
            s.write_json(_describe(p))
            if not chunks.attack(number, p):
                break
            _measure(p, s)
            _trace(p, s)
    return chunks.outcome


def folders(given: Iterable[str]) -> Folders | None:
    """The folders of data sets from texts: one FOLDER, or NAME=FOLDER for each.

    >>> folders(["cifar10=/data/cifar", "imagenet=/data/imagenet"])
    {'cifar10': '/data/cifar', 'imagenet': '/data/imagenet'}
    """
    texts = list(given)
    if len(texts) == 1 and ("=" not in texts[0] or Path(texts[0]).exists()):
        return texts[0]
    found: dict[str, str | Path] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not folder or name in found:
            raise ValueError(f"expected one folder, or NAME=FOLDER for each data set once, but got {text!r}")
        found[name] = folder
    return found or None


def _sources(plan: Plan, given: Folders | None) -> dict[str, str | Path | None]:
    """The folder of each data set of a plan, None for what ships; ValueError for a missing or needless one."""
    names = list(dict.fromkeys(cell.dataset for cell in plan.cells))
    if given is not None and not isinstance(given, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"the plan has several data sets ({', '.join(names)}): name each one's folder, NAME=FOLDER"
            )
        given = {names[0]: given}
    for name in given or {}:
        lookup(dict.fromkeys(names), name, "data set of the plan")
    if missing := [name for name in names if name not in data.SLICES and name not in (given or {})]:
        raise ValueError(
            f"expected {DATASETS[missing[0]].holds}, for {missing[0]}, which does not ship with the library, but got "
            f"none; pass it by --data {missing[0]}=FOLDER"
        )
    return {name: (given or {}).get(name) for name in names}


def _images(dataset: str, folder: str | Path | None) -> tuple[Images, Images]:
    """The images to attack, and all that nothing is fitted on."""
    attacked = data.load(dataset, "attack", folder)
    if folder is None or dataset not in data.SLICES:
        return attacked, attacked
    return attacked, _without(_full(dataset, folder, attacked), data.load(dataset, "calibration"))


def prepare(
    cell: Cell,
    data_folder: str | Path | None,
    device: str,
    read: Callable[[str, str | Path | None], tuple[Images, Images]] = _images,
) -> Prepared:
    """Load data and network, fit and stack the defenses, and name the cell by all that decides its result.

    `read` gives the images to attack and the unseen ones of a data set and its folder.
    """
    images, unseen = read(cell.dataset, data_folder)
    if len(images) < cell.n:
        raise ValueError(f"{cell.label}: expected n <= {len(images)} attack images, but got n = {cell.n}")
    images = images[: cell.n]
    network = cell.victim(device)
    classes = classes_of(network, images[:2].to(device), cell.seed)
    model, fitted = _defend(network, cell, data_folder, device)
    attack = cell.build(tau_of(model))
    modules = ["queryfoil.run", "queryfoil.table", "queryfoil.models.victim", type(attack).__module__]
    modules += [DEFENSES[d.name].__module__ for d in cell.defenses]
    key = digest(
        {
            "settings": cell.settings(),
            "fitted": fitted,
            "code": provenance.code(modules),
            "model": network.identity,
            "images": provenance.tensors(images.images, images.labels, images.ids),
            "versions": {k: v for k, v in provenance.versions().items() if k != "python"},
            "device": torch.device(device).type,
        }
    )
    images, unseen = images.to(device), unseen.to(device)
    targets = None
    if cell.targeted:
        targets = random_targets(images.labels, images.ids, classes, cell.seed)
    task = cell.task(images, targets)
    task.check_classes(classes)
    return Prepared(cell.label, key, attack, model, task, cell.budget, cell, network, unseen, fitted)


def _defend(
    network: nn.Module, cell: Cell, data_folder: str | Path | None, device: str
) -> tuple[nn.Module, tuple[dict[str, Any] | None, ...]]:
    model = network
    fitted: list[dict[str, Any] | None] = []
    for defense in cell.defenses:
        if defense.fit:
            # part by part: the calibration images of ImageNet are 3 GB, their scores 20 MB
            held_out = [
                (_clean_answers(model, part.to(device), cell.seed), part.labels.to(device))
                for part in data.batches(cell.dataset, "calibration", data_folder)
            ]
            scores, labels = (torch.cat(parts) for parts in zip(*held_out, strict=True))
            kind = DEFENSES[defense.name]
            found = kind.fit(scores, labels, **defense.arguments)
            model = kind.from_fit(model, found)
            fitted.append(vars(found))
        else:
            model = DEFENSES[defense.name](model, **defense.arguments)
            fitted.append(None)
    return model.eval(), tuple(fitted)


def _clean_answers(model: Model, images: Images, seed: int) -> Tensor:
    return answers(model, images.images, images.ids, torch.zeros_like(images.ids), seed)


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
    attacker does not see comes from an uncounted replay of its queries. Empty for attacks that are no greedy
    search, which have no current point that goes down.
    """
    if s.read("trace", table.TRACE) is not None:
        return
    if settings(p.attack).get("accept") != "greedy":
        s.write("trace", table.TRACE.empty_table())
        return
    fooled_at = table.fooled_at(s.attacked())
    task = replace(p.task.rows(slice(int(fooled_at.argmax()), int(fooled_at.argmax()) + 1)), loss="margin")
    paths: dict[str, Model] = {"undefended": p.network} | ({"defended": p.model} if p.cell.defenses else {})
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


def _images_sent(p: Prepared, model: Model, task: Task) -> Tensor:
    """All queries of the cell's attack on another model, one after the other."""
    sent: list[Tensor] = []
    run(p.attack, model, task, p.budget, observe=lambda ids, queries, images, scores: sent.append(images))
    return torch.cat(sent)


def _expand(values: Tensor | None, n: int) -> Tensor | None:
    return None if values is None else values.expand(n)
