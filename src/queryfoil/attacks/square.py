"""Square attack: random search with square windows at the corners of the L-inf ball.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search" (ECCV 2020). Start from vertical stripes; then set a random window of the perturbation to
+eps or -eps in each channel, and keep it if the loss falls. The window shrinks by a fixed schedule.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.acceptance import ACCEPTANCE
from queryfoil.checks import lookup
from queryfoil.oracle import Oracle
from queryfoil.task import Task

STRIPES, ROW, COLUMN, COLOURS = 0, 1, 2, 3  # names of the draws; a redraw adds 4


class State(NamedTuple):
    best: Tensor  # (N, C, H, W) current images
    loss: Tensor  # (N,) the attacker's loss at `best`


@dataclass(frozen=True)
class Square:
    """Square attack, L-inf: random search over square windows.

    p_init: share of the image that the first windows cover, in (0, 1]. horizon: number of iterations
    over which the window shrinks; 10,000 whatever the budget, as in AAA's experiments. accept: the
    acceptance rule.
    """

    p_init: float = 0.05
    horizon: int = 10_000
    accept: str = "greedy"

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.p_init <= 1:
            raise ValueError(f"expected p_init in (0, 1], but got {self.p_init}")
        if not 1 <= self.horizon < math.inf:
            raise ValueError(f"expected horizon >= 1 and finite, but got {self.horizon}")
        lookup(ACCEPTANCE, self.accept, "acceptance rule")

    def init(self, task: Task, query: Oracle) -> State:
        n, c, _, w = task.images.shape
        stripes = rng.signs(task.seed, task.ids, 0, STRIPES, c * w).view(n, c, 1, w)
        x = (task.images + task.eps * stripes).clamp(0, 1)
        return State(x, task.objective(query(x)))  # accepted whatever its loss

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        x = self._propose(task, state.best, t)
        loss = task.objective(query(x))
        accepted = ACCEPTANCE[self.accept](state.loss, loss)
        return State(
            torch.where(accepted[:, None, None, None], x, state.best),
            torch.where(accepted, loss, state.loss),
        )

    def side(self, t: int, height: int, width: int) -> int:
        """Side of the window at iteration t, from p_init halved (..., doubled in time) by the schedule."""
        i = t * 10_000 / self.horizon
        divisor = 2 ** sum(i > end for end in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = round(math.sqrt(self.p_init / divisor * height * width))
        return max(min(side, min(height, width) - 1), 1)

    def _propose(self, task: Task, best: Tensor, t: int) -> Tensor:
        """Each image with one window of its own set to clip(clean +- eps); drawn again where nothing changes.

        # differs from the release: a window for each image instead of one for the batch, and windows
        # reach the last row and column.
        """
        n, c, h, w = best.shape
        side = self.side(t, h, w)
        x = best.clone()
        offsets = torch.arange(side, device=best.device)
        channels = torch.arange(c, device=best.device)[:, None, None]
        todo = torch.arange(n, device=best.device)
        for redraw in range(0, 4 * 64, 4):
            ids = task.ids[todo]
            rows = rng.integers(task.seed, ids, t, ROW + redraw, h - side + 1) + offsets
            columns = rng.integers(task.seed, ids, t, COLUMN + redraw, w - side + 1) + offsets
            colours = rng.signs(task.seed, ids, t, COLOURS + redraw, c).view(-1, c, 1, 1)
            window = (todo[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :])
            patch = (task.images[window] + task.eps * colours).clamp(0, 1)
            changed = (patch != best[window]).flatten(1).any(1)
            x[window] = patch
            todo = todo[~changed]
            if not len(todo):
                break
        return x
