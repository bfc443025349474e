"""The only loop in the library: an attack, a model, a task, a budget."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from queryfoil import metrics
from queryfoil.checks import lookup
from queryfoil.losses import SPAN
from queryfoil.oracle import LabelOracle, Model, Observer, Oracle, answers
from queryfoil.task import NORMS, Task

State = TypeVar("State", bound=NamedTuple)


class Attack(Protocol[State]):
    """What an attack is: a frozen dataclass of hyper-parameters that inherits this, with two moves.

    `State` is a NamedTuple, of tensors whose rows are images if the attack is `rowwise`. `query` is an
    `Oracle`, after it has been asked about the clean images (`query.scores` are its latest answers); an attack with
    loss None sees labels alone and gets a `LabelOracle`.
    """

    norms: ClassVar[tuple[str, ...]]
    loss: ClassVar[str | None]  # of `losses.LOSSES`, unless the task says another; None: it sees labels alone
    rowwise: ClassVar[bool] = True  # does no image's result depend on the others?
    targetable: ClassVar[bool] = True
    l2: ClassVar[dict[str, Any]] = {}  # hyper-parameters whose default is another one for L2

    def check_task(self, task: Task) -> None:
        """ValueError for a task that these hyper-parameters cannot do, before a query is spent."""
        return

    def init(self, task: Task, query: Any) -> State: ...

    def step(self, task: Task, query: Any, state: State, t: int) -> State: ...


def check(attack: Attack[Any], norm: str, targeted: bool, loss: str | None = None) -> None:
    """ValueError for a norm, goal or loss that the attack does not support."""
    name = type(attack).__name__
    lookup(NORMS, norm, "norm")
    if norm not in attack.norms:
        raise ValueError(f"{name} supports norm {' or '.join(attack.norms)}, but got {norm!r}")
    if targeted and not attack.targetable:
        raise ValueError(f"{name} is untargeted, but got targets; leave them out")
    if loss is not None and attack.loss is None:
        raise ValueError(f"{name} sees labels alone, so loss={loss!r} would have no effect; leave it out")
    used = loss or attack.loss or "margin"
    threshold = getattr(getattr(attack, "accept", None), "threshold", 0.0)
    if threshold >= SPAN.get(used, math.inf):
        raise ValueError(
            f"expected a threshold below {SPAN[used]:g}, by which the loss {used!r} can change at most, but got "
            f"{threshold:g}; take loss='margin', or a smaller threshold"
        )


@dataclass(frozen=True)
class Result:
    """What an attack did to each image, on the device of the images.

    fooled_at: (N,) int64, number of the query that reached the goal; 1 where the clean image is
        already wrong, `metrics.NEVER` (huge) where the budget did not suffice.
    queries: (N,) int64, queries spent. adversarial: (N, C, H, W) float32, the image of that query, as
        the model saw it (8 bits); the clean image where there is none.
    clean_scores: (N, K), answers to the clean images (logarithms of probabilities for output "probs").
    budget: the most queries that an image could have. seconds: time that the run took.
    """

    fooled_at: Tensor
    queries: Tensor
    adversarial: Tensor
    clean_scores: Tensor
    budget: int
    seconds: float

    def accuracy(self, q: int | None = None) -> float:
        """Share of all images not fooled within q queries (default: the budget)."""
        return metrics.accuracy_at(self.fooled_at.cpu(), self._within(q))

    def average_queries(self, q: int | None = None) -> float:
        """Mean queries of initially correct images, survivors counted with q (default: the budget)."""
        return metrics.average_queries(self.fooled_at.cpu(), self._within(q))

    def _within(self, q: int | None) -> int:
        q = self.budget if q is None else q
        if not 1 <= q <= self.budget:
            raise ValueError(f"expected 1 <= q <= {self.budget}, the budget of this run, but got {q}")
        return q


def run(
    attack: Attack[State],
    model: Model,
    task: Task,
    budget: int,
    micro_batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
    observe: Observer | None = None,
) -> Result:
    """Attack every image of the task until it is fooled or has had `budget` queries.

    Query 1 is the clean image. `progress` is called after each step with the queries spent,
    and with those spent or never needed, of images times budget. `observe` sees every query (see
    `oracle.Observer`). Rows that are finished are dropped once they are half of all, which changes no result.
    """
    check(attack, task.norm, task.targets is not None, task.loss if attack.loss is not None else None)
    attack.check_task(task)
    start = time.perf_counter()
    oracle = Oracle(model, task, budget, micro_batch, observe)
    door = LabelOracle(oracle) if attack.loss is None else oracle
    clean_scores = oracle(task.images).clone()
    state: State | None = None
    t = 0
    while bool(oracle.live.any()):
        if attack.rowwise and 2 * int(oracle.live.sum()) <= len(oracle.live):
            kept = oracle.live.nonzero().squeeze(1)
            task = oracle.keep(kept)
            state = None if state is None else type(state)(*(field[kept] for field in state))
        if state is None:
            state = attack.init(task, door)
        else:
            spent = oracle.spent
            state = attack.step(task, door, state, t)
            t += 1
            assert oracle.spent > spent, f"{type(attack).__name__} made no query in a step"
        if progress is not None:
            progress(oracle.spent, oracle.settled)
    return Result(
        oracle.fooled_at, oracle.queries, oracle.adversarial, clean_scores, budget, time.perf_counter() - start
    )


def confirm(model: Model, task: Task, result: Result, repeats: int = 10, micro_batch: int = 128) -> Tensor:
    """Share of `repeats` fresh queries on which each success still fools a randomized model (N,), else NaN.

    Uncounted: what the attacker does after the success is not part of the attack.
    """
    rows = ((result.fooled_at > 1) & (result.fooled_at < metrics.NEVER)).nonzero().squeeze(1)
    shares = torch.full((len(task.ids),), torch.nan, dtype=torch.float64, device=task.images.device)
    if len(rows):
        some = task.rows(rows)
        reached = torch.zeros(len(rows), dtype=torch.float64, device=task.images.device)
        for repeat in range(1, repeats + 1):
            query = torch.full_like(some.ids, result.budget + repeat)
            scores = answers(model, result.adversarial[rows], some.ids, query, task.seed, micro_batch)
            reached += (some.margin(scores) <= 0).double()
        shares[rows] = reached / repeats
    return shares
