"""Square attack: random search with square windows on the surface of the ball.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search" (ECCV 2020). L-inf: start from vertical stripes; then set a random window of the perturbation to
+eps or -eps in each channel, and keep it if the loss falls. L2: start from a grid of bumps; then move
the length of one window to a new bump in another. The window shrinks by a fixed schedule.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.acceptance import GREEDY, Rule
from queryfoil.checks import require, require_whole
from queryfoil.oracle import Oracle
from queryfoil.run import Attack
from queryfoil.task import Task, length

START, ROW, COLUMN, COLOURS, TURN, ROW_2, COLUMN_2 = range(7)  # names of the draws; a redraw adds 8
TINY = 1e-10

Window = tuple[Tensor, Tensor, Tensor, Tensor]
"""An index into (N, C, H, W), with one square of each image."""


class State(NamedTuple):
    best: Tensor  # (N, C, H, W) current images
    loss: Tensor  # (N,) the attacker's loss at `best`
    memory: Tensor  # (N, M) of the acceptance rule


@dataclass(frozen=True)
class Square(Attack[State]):
    """Square attack, L-inf and L2: random search over square windows.

    p_init: share of the image that the first windows cover, in (0, 1]. horizon: number of iterations
    over which the window shrinks; 10,000 whatever the budget, as in AAA's experiments. accept: the
    acceptance rule.
    """

    p_init: float = 0.05
    horizon: int = 10_000
    accept: Rule = GREEDY

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    loss: ClassVar[str] = "margin"

    def __post_init__(self) -> None:
        require("p_init", self.p_init, "in (0, 1]", lambda value: 0 < value <= 1)
        require_whole("horizon", self.horizon)

    def init(self, task: Task, query: Oracle) -> State:
        x = self.start(task)
        loss = task.objective(query(x))  # accepted whatever it is
        return State(x, loss, self.accept.start(loss))

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        x = self.propose(task, state.best, t)
        loss = task.objective(query(x))
        accepted, memory = self.accept(state.loss, loss, state.memory)
        return State(
            torch.where(accepted[:, None, None, None], x, state.best),
            torch.where(accepted, loss, state.loss),
            memory,
        )

    def start(self, task: Task) -> Tensor:
        """The first images (N, C, H, W): vertical stripes for L-inf, a grid of bumps for L2."""
        return _stripes(task) if task.norm == "linf" else _grid_of_bumps(task)

    def propose(self, task: Task, best: Tensor, t: int) -> Tensor:
        """The images to ask at iteration t (N, C, H, W), from the current ones."""
        return self._recoloured(task, best, t) if task.norm == "linf" else self._moved(task, best, t)

    def side(self, t: int, height: int, width: int) -> int:
        """Side of the window at iteration t, from p_init halved (..., doubled in time) by the schedule."""
        i = t * 10_000 / self.horizon
        divisor = 2 ** sum(i > end for end in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = round(math.sqrt(self.p_init / divisor * height * width))
        return max(min(side, min(height, width) - 1), 1)

    def odd_side(self, t: int, height: int, width: int) -> int:
        """The same for L2, where windows have an odd side of at least 3 (if the image has that)."""
        side = max(self.side(t, height, width), 3)
        most = min(height, width)
        return min(side + 1 - side % 2, most - 1 + most % 2)

    def _recoloured(self, task: Task, best: Tensor, t: int) -> Tensor:
        """Each image with one window of its own set to clip(clean +- eps); drawn again where nothing changes.

        # differs from the release: a window for each image instead of one for the batch, and windows
        # reach the last row and column.
        """
        n, c, h, w = best.shape
        side = self.side(t, h, w)
        x = best.clone()
        todo = torch.arange(n, device=best.device)
        for redraw in range(0, 8 * 64, 8):
            some = task.ids[todo]
            window = _window(task, t, side, (ROW + redraw, COLUMN + redraw), some, todo)
            colours = rng.signs(task.seed, some, t, COLOURS + redraw, c).view(-1, c, 1, 1)
            patch = (task.images[window] + task.eps * colours).clamp(0, 1)
            changed = (patch != best[window]).flatten(1).any(1)
            x[window] = patch
            todo = todo[~changed]
            if not len(todo):
                break
        return x

    def _moved(self, task: Task, best: Tensor, t: int) -> Tensor:
        """Each image with a bump added in one window, with the length of that and of another, which is emptied."""
        n, c, h, w = best.shape
        side = self.odd_side(t, h, w)
        every = torch.arange(n, device=best.device)
        new = _window(task, t, side, (ROW, COLUMN), task.ids, every)
        old = _window(task, t, side, (ROW_2, COLUMN_2), task.ids, every)
        delta = best - task.images
        spare = (task.eps**2 - length(delta) ** 2).clamp_min(0)[:, None] / c  # (N, 1): clipping leaves some
        here = delta[new]  # (N, C, side, side)
        direction = rng.signs(task.seed, task.ids, t, COLOURS, c).view(-1, c, 1, 1) * _bumps(task, t, TURN, side)
        direction = direction + here / (TINY + _each_length(here))
        lost = _each_length(delta[old]) ** 2
        delta[old] = 0
        lost += _each_length(delta[new]) ** 2  # of the union of both windows, in each channel
        size = (spare[:, :, None, None] + lost).sqrt()
        delta[new] = direction / (TINY + _each_length(direction)) * size
        return on_the_sphere(task, delta)


def _stripes(task: Task) -> Tensor:
    n, c, _, w = task.images.shape
    signs = rng.signs(task.seed, task.ids, 0, START, c * w).view(n, c, 1, w)
    return (task.images + task.eps * signs).clamp(0, 1)


def _grid_of_bumps(task: Task) -> Tensor:
    """Five by five bumps (more along the longer side), each with a sign for each image and channel."""
    n, c, h, w = task.images.shape
    shorter = min(h, w)
    side = max(shorter // 5, 1)
    rows, columns = (min(5 * size // shorter, size // side) for size in (h, w))
    signs = rng.signs(task.seed, task.ids, 0, START, c * rows * columns).view(n, c, rows, 1, columns, 1)
    turns = rng.signs(task.seed, task.ids, 0, TURN, rows * columns).view(n, 1, rows, 1, columns, 1)
    upright = bump(side).to(task.images)
    tiles = torch.where(turns > 0, upright[:, None], upright.T[:, None])  # (N, 1, rows, side, columns, side)
    delta = torch.zeros_like(task.images)
    top, left = (h - rows * side) // 2, (w - columns * side) // 2
    tiled = (signs * tiles).reshape(n, c, rows * side, columns * side)
    delta[:, :, top : top + rows * side, left : left + columns * side] = tiled
    return on_the_sphere(task, delta)


def on_the_sphere(task: Task, delta: Tensor) -> Tensor:
    """The clean images plus changes (N, C, H, W) brought to the length eps, clipped to [0, 1]."""
    return (task.images + delta * (task.eps / length(delta).clamp_min(TINY))[:, None, None, None]).clamp(0, 1)


def _window(task: Task, t: int, side: int, draws: tuple[int, int], ids: Tensor, rows: Tensor) -> Window:
    """A random window for each of `rows`."""
    _, c, h, w = task.images.shape
    offsets = torch.arange(side, device=ids.device)
    down = rng.integers(task.seed, ids, t, draws[0], h - side + 1) + offsets
    across = rng.integers(task.seed, ids, t, draws[1], w - side + 1) + offsets
    channels = torch.arange(c, device=ids.device)[:, None, None]
    return rows[:, None, None, None], channels, down[:, None, :, None], across[:, None, None, :]


def _bumps(task: Task, t: int, draw: int, side: int) -> Tensor:
    """A bump, upright or turned, for each image (N, 1, side, side)."""
    upright = bump(side).to(task.images)
    turned = rng.signs(task.seed, task.ids, t, draw).view(-1, 1, 1, 1) > 0
    return torch.where(turned, upright, upright.T)


def bump(side: int) -> Tensor:
    """Two halves of opposite sign, each falling off from its centre; a pattern (side, side) of length 1."""
    pattern = torch.cat([_half(side // 2, side), -_half(side - side // 2, side)])
    return pattern / length(pattern[None])


def _half(rows: int, columns: int) -> Tensor:
    """1/(k+1)^2 on squares of side 2k + 1 around the centre, one on the other; length 1."""
    if not rows:
        return torch.zeros(0, columns)
    rings = max(rows // 2, columns // 2)
    ring = torch.maximum(
        (torch.arange(rows) - rows // 2).abs()[:, None], (torch.arange(columns) - columns // 2).abs()
    )  # number of the smallest square that holds the value
    heights = torch.tensor([sum((k + 1) ** -2 for k in range(r, rings + 1)) for r in range(rings + 1)])
    half = heights[ring]
    return half / length(half[None])


def _each_length(patch: Tensor) -> Tensor:
    """Length in each channel (N, C, 1, 1)."""
    norm: Tensor = torch.linalg.vector_norm(patch, dim=(2, 3), keepdim=True, dtype=torch.float64)
    return norm.to(patch)
