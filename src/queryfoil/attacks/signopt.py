"""Sign-OPT's iteration: turn the direction of an image on the boundary to where the boundary is nearer.

Cheng et al., "Sign-OPT: a query-efficient hard-label adversarial attack" (ICLR 2020). The distance of the
boundary is a function of the direction; whether it falls as the direction turns costs one label, and the mean
of such signs over random turns stands for its gradient. L2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.hopskipjump import unit, wide
from queryfoil.oracle import LabelOracle
from queryfoil.task import Task, length

TRIES = 15  # doublings of the step, then quarterings
TURN = 1 << 15  # names of the draws; a turn adds its number
SHRINK = 0.99  # from radius to radius, while they fool
LEAST_ALPHA, LEAST_BETA = 1e-4, 1e-8


@dataclass(frozen=True)
class SignOpt:
    """turns: of each estimate. grain: as in HopSkipJump, the root mean square of a turn, at least."""

    turns: int
    grain: float

    def iterate(
        self, task: Task, query: LabelOracle, x: Tensor, alpha: Tensor, beta: Tensor, t: int, where: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, steps alpha (N,) and sizes of a turn beta (N,) after one iteration of the rows `where` (N,)."""
        start = length(x - task.images).clamp_min(1e-12)
        theta = (x - task.images) / wide(start)
        uphill = self._uphill(task, query, theta, start, beta, t, where)
        tolerance = (beta / 500).maximum(start * 2.0**-22)  # float32 holds no finer radius
        best, radius = theta, start
        todo = where & query.live
        for _ in range(TRIES):  # from the same direction, ever further
            turned = unit(theta - wide(alpha) * uphill)
            found, shorter = _nearer(task, query, turned, radius, tolerance, todo)
            best, radius = torch.where(wide(found), turned, best), torch.where(found, shorter, radius)
            alpha = torch.where(todo, alpha * 2, alpha)  # after the last failure too
            todo = found & query.live
        todo = where & query.live & (radius == start)
        for _ in range(TRIES):
            alpha = torch.where(todo, alpha / 4, alpha)
            turned = unit(theta - wide(alpha) * uphill)
            found, shorter = _nearer(task, query, turned, radius, tolerance, todo)
            best, radius = torch.where(wide(found), turned, best), torch.where(found, shorter, radius)
            todo &= ~found & query.live
        spent = where & (alpha < LEAST_ALPHA)
        alpha = torch.where(spent, 1.0, alpha)
        beta = torch.where(spent, (beta / 10).clamp_min(LEAST_BETA), beta)  # the release ends there; here, the budget
        # differs from the release: where nothing improved the image stays, instead of an unscaled direction
        return torch.where(wide(radius < start), _at(task, best, radius), x), alpha, beta

    def _uphill(
        self, task: Task, query: LabelOracle, theta: Tensor, radius: Tensor, beta: Tensor, t: int, where: Tensor
    ) -> Tensor:
        """Mean over random turns, with the sign of what each does to the distance of the boundary."""
        d = theta[0].numel()
        size = torch.maximum(beta, self.grain * math.sqrt(d) / radius)
        total = torch.zeros_like(theta)
        for turn in range(self.turns):
            u = unit(rng.normal(task.seed, task.ids, t, TURN + turn, d).view_as(theta))
            fooled = task.reached(query(_at(task, unit(theta + wide(size) * u), radius), where))
            total += wide(torch.where(fooled, -1.0, 1.0)) * u
        return total / self.turns


def _nearer(
    task: Task, query: LabelOracle, theta: Tensor, radius: Tensor, tolerance: Tensor, where: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the boundary along theta is nearer than the radius (N,), and the radius on its far side (N,).

    # differs from the release: where theta does not fool at the radius, the boundary is further, and how far
    # is of no use.
    """
    found = where & task.reached(query(_at(task, theta, radius), where))
    high, low = radius, radius * SHRINK
    todo = found & query.live
    while bool(todo.any()):
        todo &= task.reached(query(_at(task, theta, low), todo))
        high, low = torch.where(todo, low, high), torch.where(todo, low * SHRINK, low)
        todo &= query.live
    todo = found & query.live
    while bool(todo.any()):
        middle = (low + high) / 2
        fooled = task.reached(query(_at(task, theta, middle), todo))
        high, low = torch.where(todo & fooled, middle, high), torch.where(todo & ~fooled, middle, low)
        todo &= query.live & (high - low > tolerance)
    return found & (high < radius), high


def _at(task: Task, theta: Tensor, radius: Tensor) -> Tensor:
    # differs from the release: clipped, as the model sees it, which is never further
    return (task.images + wide(radius) * theta).clamp(0, 1)
