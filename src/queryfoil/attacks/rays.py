"""RayS: along rays of signs to the boundary, with ever smaller blocks of the signs turned, from labels alone.

Chen and Gu, "RayS: a ray searching method for hard-label adversarial attack" (KDD 2020). An image moves by one
radius up or down in each value. A block of the signs is negated; where that still fools at a smaller radius, it is
kept, and the radius is bisected. Blocks are halves, then quarters, and so on down to single values. L-inf.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil.attacks.hopskipjump import wide
from queryfoil.checks import require
from queryfoil.oracle import LabelOracle
from queryfoil.run import Attack
from queryfoil.task import Task


class State(NamedTuple):
    signs: Tensor  # (N, C, H, W) of the ray, -1 or 1
    radius: Tensor  # (N,) int64, smallest one at which the ray is known to fool, in units of the tolerance


@dataclass(frozen=True)
class RayS(Attack[State]):
    """RayS, L-inf: minimum-norm, from labels alone, untargeted. It draws nothing at random.

    tolerance: radii are multiples of it, on the scale of the images, in (0, 1]; half a level by default, as the model
    sees 8 bits: floored, all radii between two whole levels make the same image.
    """

    tolerance: float = 0.5 / 255  # differs from the release: 0.001 in L2 there, whatever the size of the image

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    loss: ClassVar[str | None] = None
    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("tolerance", self.tolerance, "in (0, 1]", lambda value: 0 < value <= 1)

    def init(self, task: Task, query: LabelOracle) -> State:
        corner = math.ceil(1 / self.tolerance)  # the smallest radius that takes every value to 0 or 1
        return State(torch.ones_like(task.images), torch.full_like(task.ids, corner + 1))

    def step(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        start, end = block(t, task.images[0].numel())
        signs = state.signs.clone()
        signs.flatten(1)[:, start:end].neg_()
        # differs from the release, which asks at the radius itself: where radii are multiples, that may gain nothing
        low, high = torch.zeros_like(state.radius), state.radius - 1
        asked = query.live.clone()
        found = asked & task.reached(query(self._at(task, signs, high), asked))
        todo = found & query.live & (high - low > 1)
        while bool(todo.any()):
            middle = (low + high) // 2
            fooled = task.reached(query(self._at(task, signs, middle), todo))
            low, high = torch.where(todo & ~fooled, middle, low), torch.where(todo & fooled, middle, high)
            todo &= query.live & (high - low > 1)
        return State(torch.where(wide(found), signs, state.signs), torch.where(found, high, state.radius))

    def _at(self, task: Task, signs: Tensor, radius: Tensor) -> Tensor:
        size = (radius.double() * self.tolerance).to(signs)
        return (task.images + wide(size) * signs).clamp(0, 1)


def block(t: int, size: int) -> tuple[int, int]:
    """Start and end of the values whose signs are negated at step t = 0, 1, ..., for images of `size` values.

    All, then each half, each quarter, ..., each value, and each value again.

    >>> [block(t, 3) for t in range(7)]
    [(0, 3), (0, 2), (2, 3), (0, 1), (1, 2), (2, 3), (0, 1)]
    """
    for level in range(size.bit_length()):
        side = math.ceil(size / 2**level)
        blocks = math.ceil(size / side)
        if t < blocks:
            return side * t, min(side * (t + 1), size)
        t -= blocks
    return t % size, t % size + 1
