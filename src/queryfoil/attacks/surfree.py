"""SurFree: along circles through the image, in random smooth directions and without any estimate of a normal.

Maho, Furon and Le Merrer, "SurFree: a fast surrogate-free black-box attack" (CVPR 2021). A circle in a plane with the
clean image x and the nearest image x_b that fools leads from x_b back to x, and all of it is nearer than x_b. A
direction across is drawn, new in each step and orthogonal to the last ones; where a point at the trial angle to one
side or the other fools, the last point of that arc that does is x_b. L2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.boundary import first_that_fools, narrow, on_circle, smooth, without
from queryfoil.attacks.hopskipjump import unit, wide
from queryfoil.attacks.simba import cosines
from queryfoil.checks import require, require_whole
from queryfoil.oracle import LabelOracle
from queryfoil.run import Attack
from queryfoil.task import Task, length

START, DIRECTION, NOISE = range(3)  # names of the draws
SPREAD = 0.5  # of the noise of the start
ROUNDS = 7  # of a bisection
GAP = 0.01  # in the cosine of the angle, which ends one
WIDEST = 89.0  # degrees; at 90 the circle is back at the image
SPENT = 1e-3  # length below which nothing is left of a direction


class State(NamedTuple):
    x: Tensor  # (N, C, H, W) the nearest images that fool
    angle: Tensor  # (N,) float64, the trial angle in degrees
    basis: Tensor  # (N, 1 + ortho, C, H, W) orthonormal: towards the first x, then the last directions; 0 if none yet


@dataclass(frozen=True)
class SurFree(Attack[State]):
    """SurFree, L2: minimum-norm, from labels alone, untargeted.

    angle: the first trial angle, in degrees, in (0, 90). rho: the angle falls by this factor where both sides fail, and
    rises by it where one fools, in (0, 1). ortho: a direction is orthogonal to so many before it (at most half as
    many as an image has values), which are held for each image. low: share of the cosine frequencies that
    directions have, from the lowest, in (0, 1]. Defaults are the release's.
    """

    angle: float = 30.0
    rho: float = 0.95
    ortho: int = 100
    low: float = 0.5

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    loss: ClassVar[str | None] = None
    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("angle", self.angle, "in (0, 90), in degrees", lambda value: 0 < value < 90)
        require("rho", self.rho, "in (0, 1)", lambda value: 0 < value < 1)
        require_whole("ortho", self.ortho)
        require("low", self.low, "in (0, 1]", lambda value: 0 < value <= 1)

    def init(self, task: Task, query: LabelOracle) -> State:
        n, c, h, w = task.images.shape

        def noisy(trial: int) -> Tensor:
            noise = rng.normal(task.seed, task.ids, trial, START, c * h * w).view_as(task.images)
            return rounded(task.images + SPREAD * noise)

        far, found = first_that_fools(task, query, noisy)
        ends = torch.ones(n, dtype=torch.float64, device=far.device)

        def at(share: Tensor) -> Tensor:
            return rounded(task.images + wide(share.to(far)) * (far - task.images))

        # differs from the release: bisected from the middle, not from 0.8, and not again at the end, of which it
        # knows nothing here
        x = at(narrow(task, query, found, ends, 0 * ends, at, lambda one, other: (one - other) * 2**ROUNDS))
        ortho = min(self.ortho, c * h * w // 2)
        basis = torch.zeros(n, 1 + ortho, c, h, w, device=far.device)
        basis[:, 0] = unit(x - task.images)
        return State(x, self.angle * ends, basis)

    def step(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        radius = length(state.x - task.images)
        towards = unit(state.x - task.images)
        across = self.direction(task, state, towards, t)

        def at(angle: Tensor) -> Tensor:
            return rounded(on_circle(task, radius, towards, across, angle))

        asked = query.live.clone()
        first = asked & task.reached(query(at(state.angle), asked))
        asked &= ~first & query.live
        second = asked & task.reached(query(at(-state.angle), asked))
        found, side = first | second, torch.where(second, -1, 1)
        x = at(side * self._last(task, query, found, state.angle, lambda angle: at(side * angle)))
        nearer = found & (length(x - task.images) < radius)  # rounding may undo the least of moves
        place = torch.tensor([1 + t % (state.basis.shape[1] - 1)], device=x.device)
        return State(
            torch.where(wide(nearer), x, state.x),
            torch.where(found, (state.angle / self.rho).clamp_max(WIDEST), state.angle * self.rho),
            state.basis.index_copy(1, place, across[:, None]),
        )

    def _last(
        self, task: Task, query: LabelOracle, where: Tensor, angle: Tensor, at: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The last angle that fools (N,), in steps of an angle that does, and then between two of them.

        # differs from the release: on the side that fools only, and not beyond 90 degrees
        """
        fools, does_not = angle, torch.full_like(angle, 90.0)
        todo = where & query.live & (fools + angle < 90)
        while bool(todo.any()):
            fooled = task.reached(query(at(fools + angle), todo))
            does_not = torch.where(todo & ~fooled, fools + angle, does_not)
            fools = torch.where(todo & fooled, fools + angle, fools)
            todo &= fooled & query.live & (fools + angle < 90)
        return narrow(task, query, where, fools, does_not, at, lambda a, b: (cosine(a) - cosine(b)) / GAP, ROUNDS)

    def direction(self, task: Task, state: State, towards: Tensor, t: int) -> Tensor:
        """A random smooth unit direction for each image, orthogonal to `towards` and to the last ones.

        Where an image has too few frequencies left (an even one has a single one), the direction is white noise.
        """
        _, c, h, w = task.images.shape
        draws = rng.integers(task.seed, task.ids, t, DIRECTION, 3, c * h * w).view_as(task.images) - 1
        smoothed = smooth(draws * self.weights(task.images), h, w)
        basis = state.basis[:, : 1 + t].flatten(2).double()  # those drawn so far
        direction = orthogonal(smoothed, basis, towards)
        spent = length(direction) < SPENT
        if bool(spent.any()):
            noise = unit(rng.normal(task.seed, task.ids, t, NOISE, c * h * w).view_as(task.images))
            direction = torch.where(wide(spent), orthogonal(noise, basis, towards), direction)
        return unit(direction)

    def weights(self, x: Tensor) -> Tensor:
        """Weights of the cosines in images (N, C, H, W): tanh of the images' own, 0 for high frequencies."""
        h, w = x.shape[2:]
        down, across = cosines(h, h).to(x.device), cosines(w, w).to(x.device)
        place = zigzag(h, w).to(x.device)
        return (down @ x.double() @ across.T).tanh() * (place < self.low * h * w)


def orthogonal(u: Tensor, basis: Tensor, towards: Tensor) -> Tensor:
    """u (N, C, H, W) without its parts in an orthonormal basis (N, M, CHW), float64, and along `towards`.

    # differs from the release: `towards` itself, which the basis holds until its first directions are replaced
    """
    rest = _outside(towards, basis)
    last = unit(torch.where(wide(length(rest) < SPENT), 0.0, rest))
    return without(_outside(u, basis), last)


def _outside(u: Tensor, basis: Tensor) -> Tensor:
    rows = u.flatten(1).double()[:, None]  # (N, 1, CHW)
    return (rows - (rows @ basis.mT) @ basis).view_as(u).float()


def zigzag(height: int, width: int) -> Tensor:
    """Numbers of frequencies (height, width) in JPEG's order, from the lowest along diagonals to and fro.

    >>> zigzag(3, 3)
    tensor([[0, 1, 5],
            [2, 4, 6],
            [3, 7, 8]])
    """
    row, column = torch.arange(height)[:, None], torch.arange(width)
    diagonal = row + column
    along = torch.where(diagonal % 2 == 0, column, row)
    return (diagonal * (height + width) + along).flatten().argsort().argsort().view(height, width)


def rounded(x: Tensor) -> Tensor:
    """The nearest 8-bit images, as the release sends them; the oracle's floor leaves them as they are."""
    return (x.clamp(0, 1) * 255).round() / 255


def cosine(angle: Tensor) -> Tensor:
    return torch.deg2rad(angle).cos()
