"""Running an audit: the line to the model, what it says of itself, and the benchmark behind both."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from queryfoil import bench, provenance
from queryfoil.attacks import modules, settings
from queryfoil.chunks import Outcome, Progress
from queryfoil.data import Images
from queryfoil.deploy.audit import LEDGER, Audit
from queryfoil.deploy.endpoint import EndpointError
from queryfoil.deploy.ledger import Ledger
from queryfoil.deploy.remote import Own, Remote, Served, line
from queryfoil.deploy.sameness import IMAGES, Record, Watch
from queryfoil.models.victim import Victim, victim
from queryfoil.oracle import ModelError
from queryfoil.plan import Cell, digest
from queryfoil.prepare import Prepared, name_of
from queryfoil.store import Store

RECORD = "audit.json"
CHUNK = 32


def run(
    audit: Audit,
    *,
    token: str | None = None,
    authorities: Path | None = None,
    time_limit: float | None = None,
    chunk: int = CHUNK,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Run what is missing of an audit; `report.page.write` then makes the report of its folder.

    EndpointError where the endpoint does not answer, SpentError (one of them) where the images are spent, and
    ChangedError (one too) where it is not the model any more that it was; what was finished is kept. Asks for no
    confirmation: whoever calls this says that the endpoint is his.
    """
    Store(audit.out).check(audit.plan)
    with Ledger(audit.out / LEDGER, audit.most) as ledger:
        try:
            if audit.address is None:
                network, told = _own(audit, ledger)
                return _attacked(audit, ledger, network, told, time_limit, chunk, report)
            with closing(line(audit.address, token, audit.limits.timeout, authorities)) as there:
                network, told = _served(audit, ledger, there)
                return _attacked(audit, ledger, network, told, time_limit, chunk, report)
        except ModelError as error:
            if isinstance(error.__cause__, EndpointError):
                raise error.__cause__ from None
            raise


def _own(audit: Audit, ledger: Ledger) -> tuple[Victim, dict[str, Any]]:
    """A function as a model that is asked within limits, and hashes of what is known about it."""
    cell = audit.cell
    found = victim(cell.model, "cpu", cell.output, cell.input)
    remote = Remote(Own(found), ledger, audit.limits)
    remote.output, remote.deterministic = found.output, found.deterministic
    network = Victim(remote)
    network.rowwise = found.rowwise
    return network, dict(found.identity)


def _served(audit: Audit, ledger: Ledger, there: Served) -> tuple[Victim, dict[str, Any]]:
    """An endpoint as a model that is asked within limits, and what it says of itself."""
    cell = audit.cell
    remote = Remote(there, ledger, audit.limits)
    told = remote.describe(there)
    shape = tuple(audit.images.images.shape[1:])
    told.check(shape if cell.size is None else (shape[0], cell.size, cell.size))
    if told.datatype == "UINT8" and cell.mean is not None:
        raise ValueError("the endpoint takes images as bytes, which cannot be normalized; leave out --mean and --std")
    if told.kind is None and cell.output is None:
        raise ValueError(
            f"{cell.model} does not say what its scores are; pass --output logits, log_probs or probs"
            + ("" if audit.address is None or audit.address.over_http else " (over gRPC there is no place for it)")
        )
    if None not in (told.kind, cell.output) and told.kind != cell.output:
        raise ValueError(
            f"expected output {told.kind!r}, as the endpoint says it, but got {cell.output!r}; leave it out"
        )
    remote.output = told.kind or str(cell.output)
    return Victim(remote, input=cell.input), told.told


def _attacked(
    audit: Audit,
    ledger: Ledger,
    network: Victim,
    told: dict[str, Any],
    time_limit: float | None,
    chunk: int,
    report: Callable[[Progress], None],
) -> Outcome:
    """Run the benchmark on a model, which is watched."""
    about = {
        "model": audit.cell.model_settings() | {"output": network.output},
        "images": provenance.tensors(audit.images[:IMAGES].images),
        "told": told,
    }
    record = Record(audit.out / RECORD, about)
    watch = Watch(network, audit.images, audit.cell.seed, record)
    first = watch.begin(ledger.images)
    network.identity = record.identity
    network.deterministic &= first.deterministic

    def watched(now: Progress) -> None:
        watch.again(ledger.images)
        report(now)

    supplies = Supplies(network, audit.images, first.scores.shape[2])
    outcome = bench.bench(audit.plan, audit.out, time_limit=time_limit, chunk=chunk, report=watched, supplies=supplies)
    watch.again(ledger.images, always=True)
    return outcome


class Supplies:
    """What the cells of an audit are made from: one model, and images of which all are attacked."""

    def __init__(self, network: Victim, images: Images, classes: int) -> None:
        self.network, self.images, self.classes = network, images, classes
        self.hash = provenance.tensors(images.images, images.labels, images.ids)

    def prepare(self, cell: Cell) -> Prepared:
        """A cell with all that it needs, named by all that decides its result."""
        attack, task = cell.build(), cell.task(self.images, None)
        task.check_classes(self.classes)
        tied = not (attack.rowwise and self.network.rowwise)
        stack = {"model": self.network.identity, "input": cell.model_settings()}
        key = name_of(
            {
                **cell.attack_settings(),
                "attack": [cell.attack, settings(attack)],
                "n": len(self.images) if tied else None,
                "stack": stack,
                "images": self.hash,
            },
            [Victim.__module__, *sorted(modules(attack))],
            "cpu",
        )
        shown = digest([stack, self.hash, cell.seed])
        code = {name: provenance.code([name]) for name in sorted(modules(attack)) if name.startswith("queryfoil.")}
        return Prepared(
            cell.label, key, attack, self.network, task, cell.budget,
            cell, self.network, self.images, (), (), self.hash, shown, shown, code,
        )  # fmt: skip
