"""A walk along the borders between shown levels, down to the border between two labels.

For scores that are constant but at a few borders, such as those of `defenses.terraces`, and for labels alone, which
are such scores too. Only a border can be felt there, so this attacker holds on to one, as RayS (Chen and Gu, KDD 2020)
does to that between two labels: along a ray of signs he finds by bisection where the shown loss has fallen to a level.
He then turns the signs in one of Square's windows (Andriushchenko et al., ECCV 2020), and keeps what passes the border
no farther from the image. The level that the ray shows at the edge of the ball is the one to look for: a lower one
that he sees there takes the place of the last. He begins with the best of several rays.

No paper's attack. It differs from RayS in its windows, in that it walks on where a turn gains nothing, and in that any
level leads it.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.hopskipjump import wide
from queryfoil.attacks.square import START, Square
from queryfoil.checks import require, require_whole
from queryfoil.oracle import Oracle
from queryfoil.run import Attack
from queryfoil.task import Task


class State(NamedTuple):
    signs: Tensor  # (N, C, H, W) of the ray, -1 or 1
    goal: Tensor  # (N,) loss of the level that is looked for
    radius: Tensor  # (N,) int64, smallest one at which the ray is known to show it, in units of the tolerance


@dataclass(frozen=True)
class BorderWalk(Attack[State]):
    """A walk along the borders between shown levels, L-inf; it also asks outside the ball.

    starts: rays of vertical stripes, the best of which is walked on from. p_init, horizon: of the windows, as in
    `Square`. tolerance: radii are multiples of it, on the scale of the images, in (0, 1] and at most eps; a level of
    8 bits by default.
    """

    starts: int = 8
    p_init: float = 0.15
    horizon: int = 10_000
    tolerance: float = 1 / 255

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    loss: ClassVar[str] = "margin"

    def __post_init__(self) -> None:
        require_whole("starts", self.starts)
        Square(self.p_init, self.horizon)  # which checks them
        require("tolerance", self.tolerance, "in (0, 1]", lambda value: 0 < value <= 1)

    def check_task(self, task: Task) -> None:
        if self._edge(task) < 1:
            raise ValueError(f"expected a tolerance of at most eps, {task.eps:g}, but got {self.tolerance:g}")

    def init(self, task: Task, query: Oracle) -> State:
        clean = task.objective(query.scores)
        below = torch.nextafter(clean, torch.full_like(clean, -torch.inf))  # any level but that of the clean image
        signs = _stripes(task, 0)
        state = State(signs, below, torch.full_like(task.ids, self._corner + 1))
        state = self._try(task, query, state, signs, torch.full_like(state.radius, self._edge(task)))
        for start in range(1, self.starts):
            state = self._try(task, query, state, _stripes(task, start), state.radius.clamp_max(self._corner))
        return state

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        signs = 2 * self._square.propose(_signs_only(task), (state.signs + 1) / 2, t) - 1
        return self._try(task, query, state, signs, state.radius.clamp_max(self._corner))

    def _try(self, task: Task, query: Oracle, state: State, signs: Tensor, radius: Tensor) -> State:
        """Take the ray of other signs where it shows the level within a radius (N,), and see how far it gets."""
        edge = torch.full_like(radius, self._edge(task))
        loss = task.objective(query(self._at(task, signs, radius)))
        passed = query.live & (loss <= state.goal)
        goal = torch.where(passed & (radius == edge), loss, state.goal)
        stride = (radius == state.radius).long()  # the border is near where the last ray had it, if there was one
        near, shown = self._border(task, query, signs, goal, torch.zeros_like(radius), radius, loss, stride, passed)
        inside = passed & (near <= edge) & (radius != edge)
        loss = task.objective(query(self._at(task, signs, edge), inside))
        lower = inside & query.live & (loss < goal)
        goal = torch.where(lower, loss, goal)
        further, _ = self._border(task, query, signs, goal, near, edge, loss, 0 * stride, lower & (shown > goal))
        near = torch.where(lower & (shown > goal), further, near)
        return State(torch.where(wide(passed), signs, state.signs), goal, torch.where(passed, near, state.radius))

    def _border(
        self, task: Task, query: Oracle, signs: Tensor, goal: Tensor, low: Tensor, high: Tensor, loss: Tensor,
        stride: Tensor, where: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The radius (N,) from which on the level is shown, in rows `where`, and the loss there (N,).

        `high` shows it, with the loss given, `low` does not. Down from `high` in steps that double, beginning with
        `stride` (N,), until one is too long; then, or for a stride of 0, by bisection.
        """
        todo = where & query.live & (high - low > 1)
        while bool(todo.any()):
            half = (low + high) // 2
            middle = torch.where(stride > 0, torch.maximum(high - stride, half), half)
            seen = task.objective(query(self._at(task, signs, middle), todo))
            passed = seen <= goal
            loss = torch.where(todo & passed, seen, loss)
            low, high = torch.where(todo & ~passed, middle, low), torch.where(todo & passed, middle, high)
            stride = torch.where(passed, 2 * stride, 0)
            todo &= query.live & (high - low > 1)
        return high, loss

    def _at(self, task: Task, signs: Tensor, radius: Tensor) -> Tensor:
        size = (radius.double() * self.tolerance).to(signs)
        return (task.images + wide(size) * signs).clamp(0, 1)

    def _edge(self, task: Task) -> int:
        """The largest radius in the ball."""
        return math.floor(task.eps / self.tolerance + 1e-6)

    @property
    def _corner(self) -> int:
        """The smallest radius that takes every value to 0 or 1."""
        return math.ceil(1 / self.tolerance)

    @property
    def _square(self) -> Square:
        return Square(self.p_init, self.horizon)


def _stripes(task: Task, number: int) -> Tensor:
    """Signs of vertical stripes (N, C, H, W); number 0 are those that Square starts with."""
    n, c, h, w = task.images.shape
    return rng.signs(task.seed, task.ids, number, START, c * w).view(n, c, 1, w).expand(n, c, h, w)


def _signs_only(task: Task) -> Task:
    """A task of grey images in a ball that holds everything, in which Square's proposals are signs, as 0 and 1."""
    return replace(task, images=torch.full_like(task.images, 0.5), eps=0.5)
