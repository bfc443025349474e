"""CGBA: along a half circle from the boundary towards the image, in the plane of the boundary's normal.

Reza et al., "CGBA: curvature-aware geometric black-box attack" (ICCV 2023). Estimate the normal of the boundary at the
nearest image that fools, from the labels of smooth random probes; then search the half circle between the two images,
in the plane of their line and the normal, for the boundary: all of it is nearer than where it starts. L2.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.boundary import first_that_fools, narrow, on_circle, smooth, without
from queryfoil.attacks.hopskipjump import straight, unit, wide
from queryfoil.checks import require, require_positive, require_whole
from queryfoil.oracle import LabelOracle
from queryfoil.run import Attack
from queryfoil.task import Task, length

START, PROBE = 0, 1  # names of the draws; a probe adds its number
ANGLES = 10  # at most, of one search: 45, 67.5, ... degrees; the last is within a tenth of one of the image itself


class State(NamedTuple):
    x: Tensor  # (N, C, H, W) images just across the boundary


@dataclass(frozen=True)
class CGBA(Attack[State]):
    """CGBA, L2: minimum-norm, from labels alone, untargeted (the targeted CGBA-H is another search).

    probes: for the first estimate of the normal; that of iteration t has floor(probes sqrt(t)). reduction: probes have
    the lowest 1/reduction of the cosine frequencies along each side, >= 1. sigma: root mean square of a probe, > 0; one
    level, as smaller ones vanish in 8 bits. tolerance: in L2, where a bisection ends, > 0.
    """

    probes: int = 30
    reduction: float = 3.0
    sigma: float = 1 / 255  # differs from the release: 0.003 there
    tolerance: float = 0.002

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    loss: ClassVar[str | None] = None
    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_whole("probes", self.probes)
        require("reduction", self.reduction, "finite and >= 1", lambda value: value >= 1)
        require_positive("sigma", self.sigma)
        require_positive("tolerance", self.tolerance)

    def init(self, task: Task, query: LabelOracle) -> State:
        def noise(trial: int) -> Tensor:
            return rng.uniform(task.seed, task.ids, trial, START, task.images[0].numel()).float().view_as(task.images)

        far, found = first_that_fools(task, query, noise)
        radius = length(far - task.images).double()
        ends = torch.ones_like(radius)
        share = narrow(
            task,
            query,
            found,
            ends,
            0 * ends,
            lambda share: straight(task, far, share.to(far)),
            lambda one, other: (one - other) * radius / self.tolerance,
        )
        return State(straight(task, far, share.to(far)))

    def step(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        radius = length(state.x - task.images)
        towards = unit(state.x - task.images)
        across = unit(without(self.normal(task, query, state.x, t), towards))

        def at(angle: Tensor) -> Tensor:
            return on_circle(task, radius, towards, across, angle).clamp(0, 1)

        def width(one: Tensor, other: Tensor) -> Tensor:
            return radius * torch.deg2rad(other - one).sin() / self.tolerance  # the chord

        start = torch.zeros_like(radius, dtype=torch.float64)
        fools, does_not = start, torch.full_like(start, 90.0)
        todo = live = query.live.clone()
        for k in range(1, ANGLES + 1):
            angle = torch.full_like(start, 90 * (1 - 2.0**-k))
            fooled = task.reached(query(at(angle), todo))
            fools, does_not = torch.where(todo & fooled, angle, fools), torch.where(todo & ~fooled, angle, does_not)
            todo = todo & fooled & query.live
            if not bool(todo.any()):
                break
        angle = narrow(task, query, live, fools, does_not, at, width)
        return State(torch.where(wide(angle > 0), at(angle), state.x))

    def count(self, t: int) -> int:
        """Probes of the estimate at iteration t = 0, 1, ..."""
        return int(self.probes * math.sqrt(t + 1))

    def normal(self, task: Task, query: LabelOracle, x: Tensor, t: int) -> Tensor:
        """Estimated unit normal of the boundary at x, into the wrong class, from the votes of smooth probes."""
        _, c, h, w = x.shape
        rows, columns = math.ceil(h / self.reduction), math.ceil(w / self.reduction)
        size = math.sqrt(h * w / (rows * columns))  # which makes the root mean square of a probe 1
        live = query.live.clone()
        total = torch.zeros_like(x)
        for probe in range(self.count(t)):
            low = rng.normal(task.seed, task.ids, t, PROBE + probe, c * rows * columns)
            u = size * smooth(low.view(-1, c, rows, columns), h, w)
            fooled = task.reached(query((x + self.sigma * u).clamp(0, 1), live))
            total += wide(torch.where(fooled, 1.0, -1.0)) * u
        return unit(total)
