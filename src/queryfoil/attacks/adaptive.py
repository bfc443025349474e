"""An attack by somebody who expects a defense: with a tactic, a reading of the scores, and neighbours to average.

Any attack that sees scores can be led like this. The attack itself is the same; what differs is which proposals it
accepts (`tactics`), what it makes of the answers (`readings`), and that each answer may be a mean over neighbours.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.readings import Reading
from queryfoil.attacks.tactics import Tactic
from queryfoil.checks import require, require_whole
from queryfoil.oracle import Oracle
from queryfoil.run import Attack, check
from queryfoil.task import Task

CHANCE = 1 << 24  # names of the draws, far from those of attacks
NEIGHBOUR = 1 << 25


@dataclass(frozen=True)
class Adaptive(Attack[Any]):
    """Another attack, led by an attacker who expects a defense.

    tactic: which proposals are accepted, for an attack with an acceptance rule. reading: what is made of the scores.
    neighbours: how many answers are averaged for each question: the image itself and neighbours with normal noise of
    standard deviation `radius`, on the [0, 1] scale, brought back into the ball. Each of them is a query, and counts.
    """

    attack: Attack[Any]
    tactic: Tactic | None = None
    reading: Reading | None = None
    neighbours: int = 1
    radius: float = 0.0

    norms: ClassVar[tuple[str, ...]] = ()  # these two, and targetable, are the attack's
    loss: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        name = type(self.attack).__name__
        require_whole("neighbours", self.neighbours)
        require("radius", self.radius, "in [0, 1]", lambda v: 0 <= v <= 1)
        if (self.neighbours > 1) != (self.radius > 0):
            raise ValueError(
                f"neighbours > 1 and radius > 0 go together, but got neighbours={self.neighbours} and "
                f"radius={self.radius:g}; set both, or neither"
            )
        if self.attack.loss is None:
            raise ValueError(f"{name} sees labels alone, so no tactic or reading would have an effect; leave them out")
        if self.tactic is not None and not hasattr(self.attack, "accept"):
            raise ValueError(f"{name} has no acceptance rule, so a tactic would have no effect; leave it out")
        if not self.attack.rowwise:
            raise ValueError(f"{name} learns from all images at once, and takes no tactic or reading; leave them out")
        for shared in ("norms", "loss", "targetable"):
            object.__setattr__(self, shared, getattr(self.attack, shared))

    def check_task(self, task: Task) -> None:
        check(self.attack, task.norm, task.targets is not None, task.loss)
        self.attack.check_task(task)

    def init(self, task: Task, query: Oracle) -> Any:
        door = Door(query, self)
        if self.neighbours > 1:
            door.ask_around(task.images)
        return self._led(task, -1).init(task, door)

    def step(self, task: Task, query: Oracle, state: Any, t: int) -> Any:
        return self._led(task, t).step(task, Door(query, self), state, t)

    def _led(self, task: Task, t: int) -> Attack[Any]:
        """The attack with its tactic in place of its acceptance rule, for one move."""
        if self.tactic is None:
            return self.attack
        led: Attack[Any] = replace(self.attack, accept=Drawn(self.tactic, task, t))  # type: ignore[type-var]
        return led


@dataclass(frozen=True)
class Drawn:
    """A tactic as an acceptance rule, with the draws of a task's images at an iteration."""

    tactic: Tactic
    task: Task
    t: int

    def start(self, losses: Tensor) -> Tensor:
        return self.tactic.start(losses)

    def __call__(self, current: Tensor, proposed: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        chance = rng.uniform(self.task.seed, self.task.ids, self.t + 1, CHANCE).squeeze(1)
        return self.tactic.decide(current, proposed, memory, chance)


class Door:
    """An oracle behind which the answers are read, and averaged over neighbours."""

    def __init__(self, oracle: Oracle, how: Adaptive) -> None:
        self.oracle, self.how = oracle, how
        self.scores = self._read(oracle.scores)

    @property
    def live(self) -> Tensor:
        """Rows that can still be asked (N,)."""
        return self.oracle.live

    def __call__(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Scores (N, K) as the attacker reads them; `where` (N,) leaves out rows, which keep their last ones."""
        asked = self.live if where is None else self.live & where
        read = self._read(self.oracle(x, where))
        self.scores = torch.where(asked[:, None], read, self.scores)
        if self.how.neighbours > 1:
            self.ask_around(x, asked)
        return self.scores

    def ask_around(self, x: Tensor, where: Tensor | None = None) -> None:
        """Average the last answers with those to neighbours of x, which have just been asked about."""
        task, asked = self.oracle.task, self.live.clone() if where is None else where
        total, count = self.scores.double(), torch.ones_like(self.scores[:, :1], dtype=torch.float64)
        for _ in range(1, self.how.neighbours):
            todo = asked & self.live
            number = self.oracle.queries[self.oracle.rows]
            noise = rng.normal(task.seed, task.ids, number, NEIGHBOUR, x[0].numel()).view_as(x)
            read = self._read(self.oracle(task.project(x + self.how.radius * noise), todo))
            total = torch.where(todo[:, None], total + read, total)
            count = torch.where(todo[:, None], count + 1, count)
        self.scores = (total / count).to(self.scores.dtype)

    def _read(self, scores: Tensor) -> Tensor:
        return scores if self.how.reading is None else self.how.reading(scores)
