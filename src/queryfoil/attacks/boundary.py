"""What attacks along the decision boundary share: a start, a circle to search, a bisection, smooth directions."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from queryfoil.attacks.hopskipjump import wide
from queryfoil.attacks.simba import cosines
from queryfoil.oracle import LabelOracle
from queryfoil.task import Task


def first_that_fools(task: Task, query: LabelOracle, propose: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """For each image the first proposal (N, C, H, W) of 0, 1, ... that fools, and whether there was one (N,).

    It goes on until each image has one or is no longer live.
    """
    x, found = task.images.clone(), torch.zeros_like(query.live)
    for trial in itertools.count():
        todo = query.live & ~found
        if not bool(todo.any()):
            break
        y = propose(trial)
        fooled = todo & task.reached(query(y, todo))
        x = torch.where(wide(fooled), y, x)
        found |= fooled
    return x, found


def narrow(
    task: Task,
    query: LabelOracle,
    where: Tensor,
    fools: Tensor,
    does_not: Tensor,
    at: Callable[[Tensor], Tensor],
    width: Callable[[Tensor, Tensor], Tensor],
    rounds: int = 64,
) -> Tensor:
    """Places (N,) that fool, next to places that do not: the gap between two such places is halved again and again.

    where: the rows to search (N,). at: images (N, C, H, W) of places. width: of a gap (N,), as a multiple of what is
    narrow enough; a row ends at 1, or after so many rounds.
    """
    todo = where & query.live & (width(fools, does_not) > 1)
    for _ in range(rounds):
        if not bool(todo.any()):
            break
        middle = (fools + does_not) / 2
        fooled = task.reached(query(at(middle), todo))
        fools = torch.where(todo & fooled, middle, fools)
        does_not = torch.where(todo & ~fooled, middle, does_not)
        todo &= query.live & (width(fools, does_not) > 1)
    return fools


def on_circle(task: Task, radius: Tensor, one: Tensor, other: Tensor, angle: Tensor) -> Tensor:
    """Images on the circle through the clean one and the point at `radius` (N,) along `one`, before any clipping.

    one, other: orthogonal unit directions (N, C, H, W). angle: (N,) float64, in degrees, seen from the clean image
    and measured from `one`; at 90 degrees the circle is back at the clean image. Each point is nearer to it than the
    first, by the cosine.
    """
    turn = torch.deg2rad(angle)
    size = radius * turn.cos()  # float64, in which no two places fall together
    return task.images + wide((size * turn.cos()).to(one)) * one + wide((size * turn.sin()).to(one)) * other


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each pair of rows (N,), summed in float64, as `task.length` is."""
    return (a.double() * b.double()).flatten(1).sum(1).to(a)


def without(u: Tensor, direction: Tensor) -> Tensor:
    """u (N, C, H, W) without its part along unit directions (N, C, H, W)."""
    return u - wide(dot(u, direction)) * direction


def smooth(coefficients: Tensor, height: int, width: int) -> Tensor:
    """Images (N, C, H, W) float32 with these lowest cosine coefficients (N, C, h, w), the others zero.

    The transform keeps lengths. Summed in float64, as the order of a product's sums depends on the batch.
    """
    down, across = (cosines(size, n) for size, n in zip((height, width), coefficients.shape[2:], strict=True))
    down, across = down.to(coefficients.device), across.to(coefficients.device)
    return (down.T @ coefficients.double() @ across).float()
