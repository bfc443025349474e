"""HopSkipJump: along the decision boundary to the nearest image on its far side, from labels alone.

Chen, Jordan and Wainwright, "HopSkipJumpAttack: a query-efficient decision-based attack" (IEEE S&P 2020).
Start from uniform noise that fools and bisect to the boundary. Then, again and again: estimate the normal of
the boundary from the labels of random probes, step along it into the wrong class, and bisect back to the boundary.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.checks import require, require_positive, require_whole
from queryfoil.oracle import LabelOracle
from queryfoil.run import Attack
from queryfoil.task import Task, length

START, PROBE = 0, 1  # names of the draws; a probe adds its number
BLEND = 1e-3  # width of the first bisection, from the image to noise
FIRST = 0.1  # size of the first probes
HALVINGS = 50  # at most, of one step; the paper has no end


class State(NamedTuple):
    x: Tensor  # (N, C, H, W) images just across the boundary
    far: Tensor  # (N,) distance before the bisection that led to them


@dataclass(frozen=True)
class HopSkipJump(Attack[State]):
    """HopSkipJump, L2 and L-inf: minimum-norm, from labels alone, untargeted.

    probes: for the first estimate of the normal; that of iteration t has floor(probes sqrt(t)), at most most_probes.
    gamma: the bisection ends at the share gamma / d^1.5 (L2) or gamma / d^2 (L-inf) of the distance, for
    images of d values, and probes have a length of gamma / d of it; > 0. These defaults are the release's.
    grain: root mean square of a probe, at least; one level, as the model sees 8 bits, in which smaller ones
    vanish; 0 is the release's.
    """

    probes: int = 100
    most_probes: int = 10_000
    gamma: float = 1.0
    grain: float = 1 / 255  # differs from the release: it halves the distance reached on 8-bit images

    norms: ClassVar[tuple[str, ...]] = ("l2", "linf")
    loss: ClassVar[str | None] = None
    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_whole("probes", self.probes)
        require_whole("most_probes", self.most_probes, least=self.probes)
        require_positive("gamma", self.gamma)
        check_grain(self.grain)

    def init(self, task: Task, query: LabelOracle) -> State:
        noise, found = task.images.clone(), torch.zeros_like(query.live)
        for trial in itertools.count():
            todo = query.live & ~found
            if not bool(todo.any()):
                break
            fresh = rng.uniform(task.seed, task.ids, trial, START, task.images[0].numel())
            noise = torch.where(wide(todo), fresh.view_as(noise).to(noise), noise)
            found |= todo & task.reached(query(noise, todo))
        x = bisect(task, query, found, lambda share: straight(task, noise, share), BLEND)
        return self._to_boundary(task, query, found, x)

    def step(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        return self.iterate(task, query, state, t, query.live.clone())

    def iterate(self, task: Task, query: LabelOracle, state: State, t: int, where: Tensor) -> State:
        """One iteration of the rows `where` (N,); the others cost nothing and stay."""
        d = state.x[0].numel()
        delta = torch.full_like(state.far, FIRST) if t == 0 else self.gamma / d * state.far
        delta = delta.clamp_min(self.grain * math.sqrt(d))
        normal = self.normal(task, query, state.x, delta, t, where)
        direction = normal if task.norm == "l2" else normal.sign()
        size = distance(task, state.x) / math.sqrt(t + 1)
        x, todo = state.x, where.clone()
        for _ in range(HALVINGS):
            y = (state.x + wide(size) * direction).clamp(0, 1)
            fooled = todo & task.reached(query(y, todo))
            x = torch.where(wide(fooled), y, x)
            todo &= ~fooled & query.live
            if not bool(todo.any()):
                break
            size = size / 2
        there = self._to_boundary(task, query, where, x)
        return State(torch.where(wide(where), there.x, state.x), torch.where(where, there.far, state.far))

    def count(self, t: int) -> int:
        """Probes of the estimate at iteration t = 0, 1, ..."""
        return min(int(self.probes * math.sqrt(t + 1)), self.most_probes)

    def normal(self, task: Task, query: LabelOracle, x: Tensor, delta: Tensor, t: int, where: Tensor) -> Tensor:
        """Estimated unit normal of the boundary at x, into the wrong class, from probes of length delta (N,)."""
        votes = torch.zeros_like(delta)
        plain, weighted = torch.zeros_like(x), torch.zeros_like(x)  # sums over the probes u, and of u times its vote
        for probe in range(self.count(t)):
            u = self._unit(task, t, PROBE + probe)
            y = (x + wide(delta) * u).clamp(0, 1)
            u = (y - x) / wide(delta)
            vote = torch.where(task.reached(query(y, where)), 1.0, -1.0)
            votes += vote
            plain += u
            weighted += wide(vote) * u
        mean = votes / self.count(t)
        baseline = torch.where(mean.abs() == 1, 0, mean)  # where all agree, the mean of the probes is all there is
        return unit(weighted - wide(baseline) * plain)

    def theta(self, task: Task) -> float:
        """Width of the bisection to the boundary, as a share of the distance."""
        d = task.images[0].numel()
        return self.gamma / (d * math.sqrt(d) if task.norm == "l2" else d * d)

    def _unit(self, task: Task, t: int, draw: int) -> Tensor:
        """A random direction for each image, of length 1."""
        d = task.images[0].numel()
        if task.norm == "l2":
            u = rng.normal(task.seed, task.ids, t, draw, d)
        else:
            u = rng.uniform(task.seed, task.ids, t, draw, d).float() * 2 - 1
        return unit(u.view_as(task.images))

    def _to_boundary(self, task: Task, query: LabelOracle, where: Tensor, x: Tensor) -> State:
        path = straight if task.norm == "l2" else clipped
        near = bisect(task, query, where, lambda share: path(task, x, share), self.theta(task))
        return State(near, distance(task, x))


def bisect(task: Task, query: LabelOracle, where: Tensor, path: Callable[[Tensor], Tensor], width: float) -> Tensor:
    """The image of a path that fools and has one that does not within `width` of it; share 1 is known to fool."""
    low, high = (torch.full_like(task.images[:, 0, 0, 0], share) for share in (0, 1))
    for _ in range(math.ceil(-math.log2(width))):
        middle = (low + high) / 2
        fooled = task.reached(query(path(middle), where))
        low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
    return path(high)


def straight(task: Task, x: Tensor, share: Tensor) -> Tensor:
    """From the image (share 0) to x (share 1), by blending."""
    return task.images + wide(share) * (x - task.images)


def clipped(task: Task, x: Tensor, share: Tensor) -> Tensor:
    """From the image (share 0) to x (share 1), by clipping to smaller and smaller balls in L-inf."""
    bound = wide(share * distance(task, x))
    return task.images + (x - task.images).clamp(-bound, bound)


def distance(task: Task, x: Tensor) -> Tensor:
    """Distance of each image from its clean one (N,), in the task's norm."""
    delta = x - task.images
    return length(delta) if task.norm == "l2" else delta.abs().flatten(1).amax(1)


def check_grain(grain: float) -> None:
    require("grain", grain, "in [0, 1], on the scale of the images", lambda value: 0 <= value <= 1)


def unit(u: Tensor) -> Tensor:
    """The rows of (N, C, H, W) at length 1 (those of length 0 stay)."""
    return u / wide(length(u).clamp_min(1e-12))


def wide(values: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, 1)."""
    return values[:, None, None, None]
