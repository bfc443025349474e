"""SignHunter: the signs of the gradient by divide and conquer.

Al-Dujaili and O'Reilly, "Sign Bits Are All You Need for Black-Box Attacks" (ICLR 2020). Start at the
corner of the ball where all signs are +. Then flip all signs, each half, each quarter, ... and keep a flip unless
the loss rises. When single values are done, start again from there.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil.attacks.acceptance import GREEDY, Rule
from queryfoil.checks import lookup
from queryfoil.oracle import Oracle
from queryfoil.run import Attack
from queryfoil.task import Task

LAYOUTS = {"hwc": "a part is a band of rows with all channels", "chw": "a part belongs to one channel"}


class State(NamedTuple):
    origin: Tensor  # (N, C, H, W) where the signs are added
    signs: Tensor  # (N, C*H*W) in the order of the layout
    loss: Tensor  # (N,) the attacker's loss there
    memory: Tensor  # (N, M) of the acceptance rule


@dataclass(frozen=True)
class SignHunter(Attack[State]):
    """SignHunter, L-inf and L2: flips ever smaller parts of the sign vector.

    layout: in which order values are divided, "hwc" (a part is a band of rows with all channels; the
    original) or "chw". accept: the acceptance rule; a flip that changes nothing is always kept.
    """

    layout: str = "hwc"
    accept: Rule = GREEDY

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    loss: ClassVar[str] = "cross_entropy"

    def __post_init__(self) -> None:
        lookup(LAYOUTS, self.layout, "layout")

    def init(self, task: Task, query: Oracle) -> State:
        return self._start(task, query, task.images)

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        part = parts(state.signs.shape[1], t)
        if part is None:
            return self._start(task, query, self._corner(task, state.origin, state.signs))
        signs = state.signs.clone()
        signs[:, part] *= -1
        loss = task.objective(query(self._corner(task, state.origin, signs)))
        accepted, memory = self.accept(state.loss, loss, state.memory)
        accepted |= loss == state.loss
        return State(
            state.origin,
            torch.where(accepted[:, None], signs, state.signs),
            torch.where(accepted, loss, state.loss),
            memory,
        )

    def _start(self, task: Task, query: Oracle, origin: Tensor) -> State:
        signs = torch.ones_like(origin).flatten(1)
        loss = task.objective(query(self._corner(task, origin, signs)))
        return State(origin, signs, loss, self.accept.start(loss))

    def _corner(self, task: Task, origin: Tensor, signs: Tensor) -> Tensor:
        """origin + eps * signs (L2: of length eps), in the ball and in [0, 1].

        # differs from the release: what is asked is what is judged, so it is clipped
        """
        n, c, h, w = origin.shape
        signs = signs.view(n, h, w, c).permute(0, 3, 1, 2) if self.layout == "hwc" else signs.view(n, c, h, w)
        size = task.eps if task.norm == "linf" else task.eps / math.sqrt(c * h * w)
        return task.project(origin + size * signs)


def parts(size: int, t: int) -> slice | None:
    """Which of `size` signs iteration t flips; None where the search starts again.

    All, two halves, four quarters, ... (2^h parts of ceil(size / 2^h), as many as there are), single values.

    >>> [parts(4, t) for t in (0, 1, 2, 6, 7, 8)]
    [slice(0, 4, None), slice(0, 2, None), slice(2, 4, None), slice(3, 4, None), None, slice(0, 4, None)]
    """
    levels = math.ceil(math.log2(size)) + 1
    lengths = [math.ceil(size / 2**level) for level in range(levels)]
    counts = [math.ceil(size / length) for length in lengths]
    i = t % (sum(counts) + 1)
    for length, count in zip(lengths, counts, strict=True):
        if i < count:
            return slice(i * length, min((i + 1) * length, size))
        i -= count
    return None
