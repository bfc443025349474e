"""The short attacks that `check` runs: the paper's, of attackers who expect a defense, of labels, and controls."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from queryfoil.attacks import build, settings
from queryfoil.defenses import tau_of
from queryfoil.flags.record import Record
from queryfoil.oracle import Model, answers
from queryfoil.run import Attack, Result, confirm, run
from queryfoil.task import Task

Report = Callable[[str, int, int, int], None]
"""Called with the attack, the queries that are spent or never needed, of how many, and those spent."""


@dataclass(frozen=True)
class Short:
    """One short attack. times: of eps, infinity for a ball without bound. defended: False for one on the raw model."""

    label: str
    attack: str = "square"
    accept: str = "greedy"
    loss: str | None = None
    hyper: dict[str, Any] = field(default_factory=dict)
    times: float = 1.0
    later: int = 0  # added to the seed
    defended: bool = True


GREEDY = Short("greedy Square")


def suite(norm: str, raw: bool, classes: int) -> list[Short]:
    """The attacks for a norm; without a raw model those on it are left out, with two classes what needs a third."""
    borders = [
        Short("border walk", "border_walk"),
        Short("border walk, labels", "border_walk", hyper={"reading": "label"}),
    ]
    found = [
        GREEDY,
        Short("Square with op", accept="op", hyper={"threshold": 3.0}),
        Short("Square that turns round", accept="reverse", hyper={"patience": 5, "p_init": 0.3}),
        Short("Square that drifts, cross-entropy", accept="drift", loss="cross_entropy", hyper={"p_init": 0.8}),
        Short("Square on the class sum", accept="drift", hyper={"reading": "logit_sum", "p_init": 0.8}),
        Short("Square without scale", hyper={"reading": "scale_free", "p_init": 0.3}),
        Short("SignHunter", "signhunter"),
        Short("blind Square", "blind_square", hyper={"p_init": 0.8}),
        *(borders if norm == "linf" else [Short("SurFree", "surfree")]),
        Short("greedy Square, seed + 1", later=1),
        Short("greedy Square, seed + 2", later=2),
        Short("greedy Square, 2 eps", times=2),
        Short("greedy Square, 4 eps", times=4),
        Short("greedy Square, no bound", times=float("inf")),
        Short("greedy Square, undefended", defended=False),
    ]
    return [
        one for one in found if (one.defended or raw) and not (classes < 3 and one.hyper.get("reading") == "scale_free")
    ]  # fmt: skip


def radius(short: Short, norm: str, eps: float, values: int) -> float:
    """The radius of its ball: at most the one that holds every image of so many values.

    >>> radius(Short("", times=4), "linf", 0.5, 784), radius(Short("", times=float("inf")), "l2", 0.5, 784)
    (1.0, 28.0)
    """
    return float(min(eps * short.times, 1.0 if norm == "linf" else values**0.5))


def record(
    short: Short, model: Model, defense: str, task: Task, budget: int, progress: Callable[[int, int], None]
) -> Record:
    """Run one of them on a model; the task is that of the check, whose radius and seed it changes."""
    attack = build(short.attack, short.accept, norm=task.norm, tau=tau_of(model), **short.hyper)
    own = on(short, task, attack)
    counting, ledger = Counting(model), Ledger(own.ids)
    result = run(attack, counting, own, budget, progress=progress, observe=ledger)
    asked = counting.asked
    confirmed = confirm(model, own, result)
    return Record(
        label=short.label, model="", defense=defense, dataset="", attack=short.attack, hyper=settings(attack),
        accept=short.accept, loss=None if attack.loss is None else own.loss, norm=task.norm, eps=own.eps,
        targeted=False, seed=own.seed, budget=budget,
        ids=own.ids.cpu().numpy(), queries=result.queries.cpu().numpy(), fooled_at=result.fooled_at.cpu().numpy(),
        deterministic=bool(getattr(model, "deterministic", True)), confirmed=confirmed.cpu().numpy(),
        adversarial=_levels(result.adversarial).cpu().numpy(), clean=_levels(own.images).cpu().numpy(),
        ledger=(ledger.seen.numpy(), ledger.repeated.numpy()), asked=asked,
        saved=_saved(model, own, result).cpu().numpy(),
    )  # fmt: skip


def on(short: Short, task: Task, attack: Attack[Any]) -> Task:
    """The task of the check as that of one of them: with its loss, radius and seed."""
    eps = radius(short, task.norm, task.eps, task.images[0].numel())
    loss, seed = short.loss or attack.loss or "margin", (task.seed + short.later) % 2**63
    return replace(task, eps=eps, loss=loss, seed=seed)  # whose images were checked, and warned about, once


class Counting:
    """A model that counts the images it is given."""

    def __init__(self, model: Model) -> None:
        self.model, self.asked = model, 0
        self.output = getattr(model, "output", "logits")

    def __call__(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.model(x)


class Ledger:
    """An observer that counts the queries of each image, and those that were sent before."""

    def __init__(self, ids: Tensor) -> None:
        self.place = {int(i): row for row, i in enumerate(ids)}
        self.seen, self.repeated = torch.zeros(2, len(ids), dtype=torch.int64)
        self.sent: list[set[int]] = [set() for _ in self.place]

    def __call__(self, ids: Tensor, queries: Tensor, images: Tensor, scores: Tensor) -> None:
        levels = _levels(images).cpu().numpy()
        for i, image in zip(ids.tolist(), levels, strict=True):
            row, content = self.place[i], hash(image.tobytes())
            self.seen[row] += 1
            self.repeated[row] += content in self.sent[row]
            self.sent[row].add(content)


def _levels(x: Tensor) -> Tensor:
    """The bytes of 8-bit images."""
    return (x * 255).round().to(torch.uint8)


def _saved(model: Model, task: Task, result: Result) -> Tensor:
    """Whether each success still is one as bytes, in the draw in which it was one (N,); True where there is none."""
    kept = torch.ones_like(task.ids, dtype=torch.bool)
    rows = ((result.fooled_at > 1) & (result.fooled_at <= result.budget)).nonzero().squeeze(1)
    if len(rows):
        x = _levels(result.adversarial[rows]).float() / 255
        some = task.rows(rows)
        kept[rows] = some.margin(answers(model, x, some.ids, result.fooled_at[rows], task.seed)) <= 0
    return kept
