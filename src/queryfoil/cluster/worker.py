"""A worker's side of a plan on a Ray cluster: it makes a cell's model from what the driver says, once, and uses it."""

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch

from queryfoil import measuring, provenance
from queryfoil.chunks import Job, attacked
from queryfoil.cluster.packed import Packed
from queryfoil.data import Images
from queryfoil.models.victim import Input, Victim, victim
from queryfoil.oracle import Model
from queryfoil.plan import Cell
from queryfoil.prepare import code_of, key_of, stack_of
from queryfoil.run import Attack
from queryfoil.task import Task

EVERY = 0.5  # seconds between two words about progress
SAME_FILES = "put the same files and modules on every node, at the same paths (from {})"


@dataclass(frozen=True)
class Spec:
    """All that decides a cell but its images, as data: a worker makes the model itself, and compares what it made."""

    key: str
    label: str = field(compare=False)
    cell: Cell = field(compare=False)
    attack: Attack[Any] = field(compare=False)
    fits: tuple[Any, ...] = field(compare=False)  # what the driver has found: no worker fits anything
    images_hash: str = field(compare=False)
    identity: dict[str, str] = field(compare=False)  # of the network
    code: dict[str, str] = field(compare=False)
    library: dict[str, str] = field(compare=False)
    computes_on: str = field(compare=False)
    folder: Path = field(compare=False)  # in which the driver runs: paths and modules are looked for from there


class Done(NamedTuple):
    """The result of an order: its table, the seconds that it took, and the versions of what computed it."""

    rows: pa.Table
    seconds: float
    versions: dict[str, str]


class Made(NamedTuple):
    """A cell's model, as it is served and undefended, and the device where it is."""

    model: Model
    network: Victim
    device: str


class Order(Protocol):
    """What a worker can be asked to do with a cell's model."""

    def __call__(self, spec: Spec, made: Made, progress: Callable[[int, int], None]) -> tuple[pa.Table, float]: ...


@dataclass(frozen=True)
class AttackImages:
    """Attack these images."""

    task: Packed[Task]
    keep_images: bool

    def __call__(self, spec: Spec, made: Made, progress: Callable[[int, int], None]) -> tuple[pa.Table, float]:
        return attacked(_job(spec, made, self.task), self.keep_images, progress)


@dataclass(frozen=True)
class ScoreImages:
    """Ask the model, or the undefended network, about these images, uncounted."""

    images: Packed[Images]
    undefended: bool

    def __call__(self, spec: Spec, made: Made, progress: Callable[[int, int], None]) -> tuple[pa.Table, float]:
        model = made.network if self.undefended else made.model
        return measuring.scores(model, self.images.unpack(made.device), spec.cell.seed), 0.0


@dataclass(frozen=True)
class TraceImages:
    """Record the losses along attacks on these images."""

    task: Packed[Task]

    def __call__(self, spec: Spec, made: Made, progress: Callable[[int, int], None]) -> tuple[pa.Table, float]:
        return measuring.trace(_job(spec, made, self.task), made.network, bool(spec.cell.defenses)), 0.0


def do(spec: Spec, order: Order, piece: int, board: Any) -> Done:
    """Carry out an order, and tell the board about progress; ValueError if this node's code or files are others."""
    import ray

    check_library(spec)
    found = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    device = device_of(spec.computes_on, found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    torch.set_num_threads(1)  # as many tasks run as there are CPUs
    rows, seconds = order(spec, make(spec, device), _to_board(board, piece))
    return Done(rows, seconds, provenance.versions())


def library() -> dict[str, str]:
    """What has to be the same on every node: the library's version and code, and torch's version without its build."""
    versions = provenance.versions()
    return {
        "queryfoil": versions["queryfoil"],
        "its code": provenance.code([__name__]),
        "torch": versions["torch"].partition("+")[0],
    }


def check_library(spec: Spec) -> None:
    """ValueError unless this node's library is the driver's."""
    here = library()
    if differ := [
        f"{name} {theirs}, not {here[name]}" for name, theirs in spec.library.items() if here[name] != theirs
    ]:
        raise ValueError(
            f"expected the driver's code on node {socket.gethostname()}: {'; '.join(differ)}; install the same "
            "queryfoil and torch on every node, as results of different code are never mixed"
        )


def device_of(kind: str, assigned: Sequence[str], visible: str | None) -> str:
    """How torch names the GPU that Ray has assigned to a task; `visible` is CUDA_VISIBLE_DEVICES of the process.

    Ray is told to leave that variable alone, as a process cannot change its GPU by it once it has used one.

    >>> device_of("cuda", ["5"], "4,5"), device_of("cuda", ["1"], None), device_of("cpu", [], None)
    ('cuda:1', 'cuda:1', 'cpu')
    """
    if kind == "cpu":
        return "cpu"
    if not assigned:
        raise ValueError(f"expected Ray to assign a GPU on node {socket.gethostname()}, but it has assigned none")
    seen = [part.strip() for part in visible.split(",")] if visible else []
    number = seen.index(assigned[0]) if assigned[0] in seen else assigned[0]
    return f"cuda:{number}"


@functools.lru_cache(maxsize=2)  # the cell at hand and the next: a plan may have many
def make(spec: Spec, device: str) -> Made:
    """The model of a cell, on a device; ValueError unless it is the driver's, by the cell's hash."""
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"Ray has assigned a GPU ({device}) on node {socket.gethostname()}, but torch sees none there; install a "
            "build of torch for it"
        )
    identity = json.dumps(spec.identity, sort_keys=True)
    network = _network(spec.cell.model, spec.cell.output, spec.cell.input, spec.folder, device, identity)
    fits = iter([fit for fit in spec.fits if fit is not None])
    stack = stack_of(spec.cell, network, lambda model, defense: next(fits), spec.computes_on)
    if key_of(spec.cell, spec.attack, stack, spec.images_hash, spec.computes_on) != spec.key:
        parts = [("model", spec.identity, network.identity), ("code", spec.code, code_of(stack, spec.attack))]
        differ = [
            f"{kind} ({name})"
            for kind, theirs, ours in parts
            for name in sorted({*theirs, *ours})
            if theirs.get(name) != ours.get(name)
        ]
        raise ValueError(
            f"expected the driver's model on node {socket.gethostname()}, but it has another: {', '.join(differ)} "
            f"differs; {SAME_FILES.format(spec.folder)}"
        )
    return Made(stack.model, network, device)


@functools.lru_cache(maxsize=2)
def _network(model: str, output: str | None, input: Input, folder: Path, device: str, identity: str) -> Victim:
    """The network that all cells with these settings share; `identity` tells apart what a file has held."""
    try:
        with contextlib.chdir(folder) if folder.is_dir() else contextlib.nullcontext():
            return victim(model, device, output, input)
    except (ValueError, OSError) as error:
        raise ValueError(f"node {socket.gethostname()}: {error}; {SAME_FILES.format(folder)}") from error


def _job(spec: Spec, made: Made, task: Packed[Task]) -> Job:
    return Job(spec.label, spec.key, spec.attack, made.model, task.unpack(made.device), spec.cell.budget)


def _to_board(board: Any, piece: int) -> Callable[[int, int], None]:
    last = time.monotonic()

    def progress(spent: int, settled: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= EVERY:
            last = now
            board.note.remote(piece, spent, settled)

    return progress
