"""Sign-OPT: from the nearest of some random points on the boundary, turn by turn to where it is nearer.

Cheng et al., "Sign-OPT: a query-efficient hard-label adversarial attack" (ICLR 2020). `signopt` has its iteration;
here is the attack of its own: random directions for a start, of which the nearest to fool is bisected. L2.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.hopskipjump import bisect, check_grain, straight, wide
from queryfoil.attacks.signopt import SignOpt
from queryfoil.checks import require_positive, require_whole
from queryfoil.oracle import LabelOracle
from queryfoil.run import Attack
from queryfoil.task import Task, length

START = 0  # name of the draw; its step is the number of the direction
WIDTH = 1e-4  # of the bisections of the start, as a share of the distance
# differs from the release: 1e-5 in L2 there, which 8 bits hide


class State(NamedTuple):
    x: Tensor  # (N, C, H, W) images just across the boundary
    alpha: Tensor  # (N,) step of the direction
    beta: Tensor  # (N,) size of a turn


@dataclass(frozen=True)
class SignOPT(Attack[State]):
    """Sign-OPT, L2: minimum-norm, from labels alone, untargeted.

    starts: random directions tried first, and more only where none of them fools. turns: of each estimate. alpha, beta:
    first step, and size of a turn, > 0. grain: as in HopSkipJump, the root mean square of a turn, at least.
    """

    starts: int = 10
    turns: int = 200
    alpha: float = 0.2
    beta: float = 1e-3
    grain: float = 1 / 255

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    loss: ClassVar[str | None] = None
    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_whole("starts", self.starts)
        require_whole("turns", self.turns)
        require_positive("alpha", self.alpha)
        require_positive("beta", self.beta)
        check_grain(self.grain)

    def init(self, task: Task, query: LabelOracle) -> State:
        x, near = task.images, torch.full_like(task.images[:, 0, 0, 0], torch.inf)
        for trial in itertools.count():
            todo = query.live & ((trial < self.starts) | near.isinf())
            if not bool(todo.any()):
                break
            x, near = self._nearer(task, query, x, near, trial, todo)
        ones = torch.ones_like(near)
        return State(x, self.alpha * ones, self.beta * ones)

    def step(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        refinement = SignOpt(self.turns, self.grain)
        return State(*refinement.iterate(task, query, state.x, state.alpha, state.beta, t, query.live.clone()))

    def _nearer(
        self, task: Task, query: LabelOracle, x: Tensor, near: Tensor, trial: int, where: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The nearest images so far and their distances (N,), after one more direction for the rows `where` (N,)."""
        noise = rng.normal(task.seed, task.ids, trial, START, x[0].numel()).view_as(x)
        end = (task.images + noise).clamp(0, 1)
        # differs from the release, which asks at the whole length first: one query where the direction is no nearer
        start = straight(task, end, (near / length(end - task.images)).clamp_max(1))
        found = where & task.reached(query(start, where))
        if bool(found.any()):
            y = bisect(task, query, found, lambda share: straight(task, start, share), WIDTH)
            x = torch.where(wide(found), y, x)
            near = torch.where(found, length(y - task.images), near)
        return x, near
