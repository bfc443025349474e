"""Bandits: gradient descent along a prior that each pair of probes corrects.

Ilyas, Engstrom and Madry, "Prior Convictions: Black-Box Adversarial Attacks with Bandits and Priors" (ICLR
2019). The prior carries what was learned from step to step (time); with tiles it has fewer values than the
image (data).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from queryfoil import rng
from queryfoil.attacks.nes import confirm, steepest
from queryfoil.checks import require_positive, require_whole
from queryfoil.oracle import Oracle
from queryfoil.run import Attack
from queryfoil.task import Task

EXPLORE = 0  # name of the draw


class State(NamedTuple):
    x: Tensor  # (N, C, H, W) current images
    prior: Tensor  # (N, C, tile, tile) or (N, C, H, W), the estimated direction of ascent of the loss


@dataclass(frozen=True)
class Bandits(Attack[State]):
    """Bandits, L-inf and L2: descent along a prior, corrected by one pair of probes a step.

    probe: L2 length of a probe's step. lr: change of each value (L-inf) or length (L2) of a step of descent.
    prior_lr: of the prior (100 as in the scripts; the paper's table prints 0.01). exploration: size of the
    random direction that is tried. tile: side of the prior, which is stretched to the image; 0 is no tiling.
    """

    probe: float = 0.1
    lr: float = 0.01
    prior_lr: float = 100.0
    exploration: float = 1.0
    tile: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    loss: ClassVar[str] = "cross_entropy"
    l2: ClassVar[dict[str, Any]] = {"probe": 0.01, "lr": 0.5, "prior_lr": 0.1, "exploration": 0.01}

    def __post_init__(self) -> None:
        for name in ("probe", "lr", "prior_lr", "exploration"):
            require_positive(name, getattr(self, name))
        require_whole("tile", self.tile, least=0)

    def init(self, task: Task, query: Oracle) -> State:
        n, c, h, w = task.images.shape
        return State(task.images, task.images.new_zeros(n, c, self.tile or h, self.tile or w))

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        prior, size = state.prior, state.prior[0].numel()
        noise = rng.normal(task.seed, task.ids, t, EXPLORE, size).view(prior.shape)
        noise *= self.exploration / math.sqrt(size)
        reached = torch.zeros_like(query.live)
        losses = []
        for sign in (1, -1):
            direction = self._stretched(task, prior + sign * noise)
            scores = query(state.x - self.probe * steepest(direction, "l2"))  # where the loss falls, by the prior
            reached |= task.margin(scores) <= 0
            losses.append(task.objective(scores))
        confirm(query, state.x, reached & (t > 0))  # the first image is the clean one, which was asked
        slope = (losses[1] - losses[0]) / (self.probe * self.exploration)
        prior = self._corrected(prior, slope[:, None, None, None] * noise, task.norm)
        x = task.project(state.x - self.lr * steepest(self._stretched(task, prior), task.norm))
        return State(x, prior)

    def _corrected(self, prior: Tensor, gradient: Tensor, norm: str) -> Tensor:
        """One step of the prior: exponentiated gradient in [-1, 1] for L-inf, plain for L2."""
        if norm == "l2":
            return prior + self.prior_lr * gradient
        odds = (1 - prior) / (1 + prior) * (-2 * self.prior_lr * gradient).clamp(-80, 80).exp()
        return 2 / (1 + odds) - 1

    def _stretched(self, task: Task, prior: Tensor) -> Tensor:
        return interpolate(prior, size=task.images.shape[2:]) if self.tile else prior
