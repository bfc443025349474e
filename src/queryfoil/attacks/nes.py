"""NES: gradient descent on an estimate from random pairs of probes.

Ilyas et al., "Black-box Adversarial Attacks with Limited Queries and Information" (ICML 2018). The
probes' steps have expected length 1 times `probe`, far below a level of an 8-bit image in each value; that the
service floors to 8 bits turns them into probes of signs.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.checks import require_positive, require_whole
from queryfoil.oracle import Oracle
from queryfoil.run import Attack
from queryfoil.task import Task, length


class State(NamedTuple):
    x: Tensor  # (N, C, H, W) current images


@dataclass(frozen=True)
class NES(Attack[State]):
    """NES, L-inf and L2: descent along the mean of finite differences in random directions.

    probe: expected L2 length of a probe's step, > 0, on the [0, 1] scale. lr: change of each value (L-inf) or
    length (L2) of a step of descent. pairs: antithetic pairs of probes for each of these.
    """

    probe: float = 0.01
    lr: float = 2 / 255
    pairs: int = 20

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    loss: ClassVar[str] = "cross_entropy"
    l2: ClassVar[dict[str, Any]] = {"lr": 64 / 255, "pairs": 4}

    def __post_init__(self) -> None:
        for name in ("probe", "lr"):
            require_positive(name, getattr(self, name))
        require_whole("pairs", self.pairs)

    def init(self, task: Task, query: Oracle) -> State:
        return State(task.images)

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        size = state.x[0].numel()
        gradient, reached = torch.zeros_like(state.x), torch.zeros_like(query.live)
        for pair in range(self.pairs):
            u = rng.normal(task.seed, task.ids, t, pair, size).view(state.x.shape) / math.sqrt(size)
            losses = []
            for sign in (1, -1):
                scores = query(state.x + sign * self.probe * u)
                reached |= task.margin(scores) <= 0
                losses.append(task.objective(scores))
            gradient += (losses[0] - losses[1])[:, None, None, None] * u
        confirm(query, state.x, reached & (t > 0))  # the first image is the clean one, which was asked
        return State(task.project(state.x - self.lr * steepest(gradient, task.norm)))


def confirm(query: Oracle, x: Tensor, reached: Tensor) -> None:
    """Ask about the images themselves, where a probe reached the goal without being in the ball.

    # differs from the release, which looks at every new image without counting it
    """
    query(x, reached)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of length 1 in a norm that goes furthest along the gradient (N, C, H, W)."""
    if norm == "linf":
        return gradient.sign()
    return gradient / length(gradient).clamp_min(1e-12)[:, None, None, None]
