"""From a cell of a plan to a job that can run: data, network, fitted defenses, attack, and the hash of it all."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from queryfoil import data, provenance
from queryfoil.attacks import modules, settings
from queryfoil.checks import lookup
from queryfoil.chunks import Job
from queryfoil.data import DATASETS, Images
from queryfoil.defenses import DEFENSES, tau_of
from queryfoil.models.checkpoints import PUBLISHED
from queryfoil.models.victim import Victim, classes_of
from queryfoil.models.zoo import on_device
from queryfoil.oracle import Model, answers
from queryfoil.plan import Cell, Defense, Plan, digest
from queryfoil.run import Attack, check
from queryfoil.task import random_targets

Folders = str | Path | Mapping[str, str | Path]
"""The folder of the data set, or the folder of each by its name."""

Found = tuple[dict[str, Any] | None, ...]
"""For each defense of a stack, what `fit` found."""


class Source(NamedTuple):
    """A data set: the images to attack, all that nothing is fitted on, and their hashes."""

    attacked: Images
    unseen: Images
    attacked_hash: str
    unseen_hash: str


class Stack(NamedTuple):
    """A network and the defenses around it. `name` is a hash of all that decides its answers."""

    name: str
    network: Victim  # undefended
    model: Any  # as it is served
    fits: tuple[Any, ...]  # for each defense, what `fit` found, as its `from_fit` takes it; None for one not fitted

    @property
    def fitted(self) -> Found:
        """What `fit` found, as it is recorded."""
        return tuple(None if fit is None else vars(fit) for fit in self.fits)


@dataclass(frozen=True)
class Prepared(Job):
    """A cell with all that it needs in memory."""

    cell: Cell
    network: Victim  # undefended
    unseen: Images  # all that nothing was fitted on: accuracy and calibration are measured here
    fits: tuple[Any, ...]  # as in `Stack`
    fitted: Found
    images_hash: str  # of all images that the cell's are the first of
    shown: str  # names of the files with the scores of the unseen images: as served, and undefended
    undefended: str
    code: dict[str, str]  # modules that decide the result, and their hashes


class Preparing(Protocol):
    """What makes cells ready to run."""

    def prepare(self, cell: Cell) -> Prepared: ...


class Supplies:
    """What cells are made from. Each data set, network and stack of defenses is loaded once, however many share it.

    `computed_on` is the kind of device that results will be computed on, where that is another one than `device`.
    """

    def __init__(self, sources: Mapping[str, str | Path | None], device: str, computed_on: str | None = None) -> None:
        self.sources, self.device, self.computed_on = sources, device, computed_on or device
        self.source = functools.cache(self._source)
        self._networks: dict[str, Victim] = {}
        self._stacks: dict[str, Stack] = {}
        self._answered: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = {}

    def prepare(self, cell: Cell) -> Prepared:
        """Load data and network, fit and stack the defenses, and name the cell by all that decides its result."""
        source = self.source(cell.dataset)
        if len(source.attacked) < cell.n:
            raise ValueError(f"{cell.label}: expected n <= {len(source.attacked)} attack images, but got n = {cell.n}")
        images = source.attacked[: cell.n]
        stack = self.stack(cell)
        plain = self.stack(cell.model_copy(update={"defenses": ()}))
        attack = cell.build(tau_of(stack.model))
        check(attack, cell.norm, cell.targeted, cell.loss)  # again, as the threshold may be half of tau
        classes = classes_of(stack.network, images[:2], cell.seed)
        targets = random_targets(images.labels, images.ids, classes, cell.seed) if cell.targeted else None
        task = cell.task(images, targets)
        task.check_classes(classes)
        key = key_of(cell, attack, stack, source.attacked_hash, self.computed_on)
        shown, undefended = (self._scores(s, source, cell) for s in (stack, plain))
        return Prepared(
            cell.label, key, attack, stack.model, task, cell.budget,
            cell, stack.network, source.unseen, stack.fits, stack.fitted, source.attacked_hash, shown, undefended,
            code_of(stack, attack),
        )  # fmt: skip

    def stack(self, cell: Cell) -> Stack:
        """The cell's network behind its defenses."""
        asked = digest([cell.model_settings(), cell.dataset, cell.defense_settings(), cell.seed])
        if asked not in self._stacks:

            def find(model: Model, defense: Defense) -> Any:
                return DEFENSES[defense.name].fit(*self._held_out(model, cell), **defense.arguments)

            self._stacks[asked] = stack_of(cell, self._network(cell), find, self.computed_on)
        return self._stacks[asked]

    def _network(self, cell: Cell) -> Victim:
        asked = digest(cell.model_settings())
        if asked not in self._networks:
            self._networks[asked] = cell.victim(self.device)
        return self._networks[asked]

    def _held_out(self, model: Model, cell: Cell) -> tuple[Tensor, Tensor]:
        """A model's scores of the calibration images, and their labels; it is asked once for all that is fitted."""
        asked = (id(model), cell.dataset, cell.seed)
        if asked not in self._answered:
            self._answered[asked] = self._calibration(model, cell)
        return self._answered[asked]

    def _calibration(self, model: Model, cell: Cell) -> tuple[Tensor, Tensor]:
        # part by part: the calibration images of ImageNet are 3 GB, their scores 20 MB
        parts = [
            (clean_answers(model, part.to(self.device), cell.seed), part.labels.to(self.device))
            for part in data.batches(cell.dataset, "calibration", self.sources.get(cell.dataset))
        ]
        scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return scores, labels

    def _scores(self, stack: Stack, source: Source, cell: Cell) -> str:
        """Name of the file with the scores of a stack on all unseen images."""
        seed = None if getattr(stack.model, "deterministic", True) else cell.seed
        return digest([stack.name, source.unseen_hash, seed])

    def _source(self, dataset: str) -> Source:
        folder = self.sources.get(dataset)
        attacked = unseen = data.load(dataset, "attack", folder)
        if folder is not None and dataset in data.SLICES:
            unseen = _without(_full(dataset, folder, attacked), data.load(dataset, "calibration"))
        hashes = [provenance.tensors(part.images, part.labels, part.ids) for part in (attacked, unseen)]
        there = on_device(attacked, self.device)  # one copy, of which all cells have a part
        return Source(there, there if unseen is attacked else on_device(unseen, self.device), *hashes)


def prepare(cell: Cell, folder: str | Path | None = None, device: str = "cpu") -> Prepared:
    """One cell, ready to run; `folder` is that of its data set."""
    return Supplies({cell.dataset: folder}, device).prepare(cell)


def stack_of(cell: Cell, network: Victim, find: Callable[[Model, Defense], Any], device: str) -> Stack:
    """A network behind the cell's defenses; `find` gives what a fitted one takes, on what it will be put around.

    `device` is what results will be computed on.
    """
    model: Any = network
    fits: list[Any] = []
    for defense in cell.defenses:
        kind = DEFENSES[defense.name]
        fits.append(find(model, defense) if defense.fit else None)
        model = kind.from_fit(model, fits[-1]) if defense.fit else kind(model, **defense.arguments)
    stack = Stack("", network, model.eval(), tuple(fits))
    layers = zip(cell.defense_settings(), stack.fitted, strict=True)
    decides = {
        "model": network.identity,
        "input": {k: v for k, v in cell.model_settings().items() if k != "model"},
        "defenses": [[layer, _decisive(layer["name"], found)] for layer, found in layers],
    }
    defenses = [DEFENSES[d.name].__module__ for d in cell.defenses]
    return stack._replace(name=name_of(decides, ["queryfoil.models.victim", *defenses], device))


def key_of(cell: Cell, attack: Attack[Any], stack: Stack, images_hash: str, device: str) -> str:
    """The hash of all that decides the cell's result."""
    tied = not (attack.rowwise and getattr(stack.model, "rowwise", True))
    return name_of(
        {
            **cell.attack_settings(),
            "attack": [cell.attack, settings(attack)],
            "n": cell.n if tied else None,  # no image's result depends on how many others there are
            "stack": stack.name,
            "images": images_hash,
        },
        sorted(modules(attack)),
        device,
    )


def code_of(stack: Stack, attack: Attack[Any]) -> dict[str, str]:
    """The modules whose code decides a cell, with the hash of each and all that it imports."""
    layers = stack.model.modules() if isinstance(stack.model, nn.Module) else []
    names = {*modules(attack), *(type(layer).__module__ for layer in layers)}
    return {name: provenance.code([name]) for name in sorted(names) if name.startswith("queryfoil.")}


def name_of(decides: dict[str, Any], modules: Iterable[str], device: str) -> str:
    """Hash of what decides a result: values, the library's code in these modules, and the kind of device.

    Versions of torch, threads and instruction set, on which last bits depend, are written beside each result instead.
    """
    return digest({**decides, "code": provenance.code(modules), "device": torch.device(device).type})


def clean_answers(model: Model, images: Images, seed: int) -> Tensor:
    """Scores of images, uncounted; randomized defenses draw as for a query number 0."""
    return answers(model, images.images, images.ids, torch.zeros_like(images.ids), seed)


def sources(plan: Plan, given: Folders | None) -> dict[str, str | Path | None]:
    """The folder of each data set of a plan, None for what ships; ValueError for a needless one, or that lists all that
    is missing, published weights too."""
    names = list(dict.fromkeys(cell.dataset for cell in plan.cells))
    if given is not None and not isinstance(given, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"the plan has several data sets ({', '.join(names)}): name each one's folder, NAME=FOLDER"
            )
        given = {names[0]: given}
    for name in given or {}:
        lookup(dict.fromkeys(names), name, "data set of the plan")
    missing = [
        f"expected {DATASETS[name].holds}, for {name}, which does not ship with the library, but got none; pass it by "
        f"--data {name}=FOLDER"
        for name in names
        if name not in data.SLICES and name not in (given or {})
    ]
    missing += [
        f"expected {DATASETS[name].holds}, for {name}, in {folder}, but there is no such folder or file"
        for name, folder in (given or {}).items()
        if not Path(folder).exists()
    ]
    for spec in dict.fromkeys(cell.model for cell in plan.cells if "=" in cell.model):
        name, _, path = spec.partition("=")
        if not any(Path(path + end).expanduser().is_file() for end in ("", ".0")):
            published = PUBLISHED[name]
            missing.append(
                f"expected the weights of {name} at {path}, but there are none ({published.about}; {published.where})"
            )
    if missing:
        raise ValueError("\n".join(missing))
    return {name: (given or {}).get(name) for name in names}


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


def _decisive(name: str, found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What `fit` found and the defense takes, to four digits: another machine finds the same, but for last bits."""
    if found is None:
        return None
    taken = inspect.signature(DEFENSES[name]).parameters
    return {k: _to_four_digits(v) for k, v in found.items() if k in taken}


def _to_four_digits(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_four_digits(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


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
