"""RamBo: a walk along the boundary, then blocks moved towards the image, then a turn of the direction.

Vo, Abbasnejad and Ranasinghe, "RamBoAttack: a robust query efficient deep neural network decision exploit"
(NDSS 2022). HopSkipJump until it slows down; BlockDescent, which moves small windows by a fixed step towards
the image wherever that still fools, until it slows down too; and Sign-OPT for the rest of the budget.
"""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from queryfoil import rng
from queryfoil.attacks import hopskipjump
from queryfoil.attacks.hopskipjump import HopSkipJump, wide
from queryfoil.attacks.signopt import SignOpt
from queryfoil.checks import require, require_positive, require_whole
from queryfoil.oracle import LabelOracle
from queryfoil.run import Attack
from queryfoil.task import Task, length

WALK, DESCENT, REFINEMENT = range(3)
ORDER = 1 << 16  # names of the draws; a pass adds its number within the step
MOST_WALKS = 150  # iterations of HopSkipJump
IDLE_PASSES = 3  # passes without a query that end the descent


class State(NamedTuple):
    x: Tensor  # (N, C, H, W) images that fool
    stage: Tensor  # (N,)
    asked: Tensor  # (N,) queries since the last check of the progress: probes of the walk, moves of the descent
    before: Tensor  # (N,) distance at that check
    gained: Tensor  # (N,) by how much the distances after the moves since then are below it, summed
    far: Tensor  # (N,) of HopSkipJump
    size: Tensor  # (N,) step of the descent
    order: Tensor  # (N, blocks, block) values of the image in the order of the current pass
    position: Tensor  # (N,) next block
    idle: Tensor  # (N,) passes ended since the last query; -1 in the pass of a query
    alpha: Tensor  # (N,) of Sign-OPT
    beta: Tensor  # (N,) of Sign-OPT


@dataclass(frozen=True)
class RamBo(Attack[State]):
    """RamBoAttack, L2: HopSkipJump, BlockDescent and Sign-OPT under one budget, from labels alone, untargeted.

    walk_patience, walk_gain: the walk ends when more than that many probes bring less than that gain in distance.
    percentile: of the absolute changes, in (0, 1], is the first step of the descent. block: values moved in
    one query, each with the window of (2 reach + 1)^2 around it in its channel. shrink: divides the step
    after a pass, > 1. descent_patience, descent_gain: the same for the mean distance over that many queries.
    turns, alpha, beta: of each Sign-OPT estimate, its first step, its size of a turn. grain: as in HopSkipJump.

    Defaults are the release's for CIFAR-10, but for grain; the preset "imagenet" has those for ImageNet.
    """

    walk_patience: int = 500
    walk_gain: float = 0.01
    percentile: float = 1.0
    block: int = 1
    reach: int = 1
    shrink: float = 1.2
    descent_patience: int = 500
    descent_gain: float = 0.01
    turns: int = 200
    alpha: float = 0.2
    beta: float = 1e-3
    grain: float = 1 / 255

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    loss: ClassVar[str | None] = None
    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("walk_patience", "descent_patience", "block", "turns"):
            require_whole(name, getattr(self, name))
        require_whole("reach", self.reach, least=0)
        for name in ("walk_gain", "descent_gain"):
            require(name, getattr(self, name), "finite and >= 0", lambda value: value >= 0)
        for name in ("alpha", "beta"):
            require_positive(name, getattr(self, name))
        require("shrink", self.shrink, "finite and > 1", lambda value: value > 1)
        require("percentile", self.percentile, "in (0, 1]", lambda value: 0 < value <= 1)
        hopskipjump.check_grain(self.grain)

    def init(self, task: Task, query: LabelOracle) -> State:
        x, far = self._walker.init(task, query)
        n, d = len(x), x[0].numel()
        block = min(self.block, d)
        none = torch.zeros_like(task.labels)
        order = none[:, None, None].expand(n, d // block, block)
        near = length(x - task.images)
        ones = torch.ones_like(near)
        return State(
            x, none, none, near, ones * 0, far, ones, order, none + d, none - 1, self.alpha * ones, self.beta * ones
        )  # position d: the descent begins with a new pass

    def step(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        state = self._walk(task, query, state, t)
        state = self._descend(task, query, state, t)
        where = query.live & (state.stage == REFINEMENT)
        if not bool(where.any()):
            return state
        refinement = SignOpt(self.turns, self.grain)
        x, alpha, beta = refinement.iterate(task, query, state.x, state.alpha, state.beta, t, where)
        return state._replace(x=x, alpha=alpha, beta=beta)

    @property
    def _walker(self) -> HopSkipJump:
        return HopSkipJump(grain=self.grain)

    def _walk(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        """One iteration of HopSkipJump for the rows that walk.

        # differs from the release: the fixed size of probes is that of the first iteration, as in HopSkipJump's own,
        # not of the second.
        """
        where = query.live & (state.stage == WALK)
        if not bool(where.any()):
            return state
        x, far = self._walker.iterate(task, query, hopskipjump.State(state.x, state.far), t, where)
        asked = state.asked + where * self._walker.count(t)
        near = length(x - task.images)
        due = where & ((asked > self.walk_patience) | (t + 1 >= MOST_WALKS))
        ended = due & ((state.before - near < self.walk_gain) | (t + 1 >= MOST_WALKS))
        change = (x - task.images).abs().flatten(1)
        size = change.kthvalue(math.ceil(self.percentile * change.shape[1]), 1).values
        # differs from the release: a percentile is one of the changes, never between two
        return state._replace(
            x=x,
            far=far,
            stage=torch.where(ended, DESCENT, state.stage),
            asked=torch.where(due, 0, asked),
            before=torch.where(due, near, state.before),
            size=torch.where(ended, size * self.shrink, state.size),  # which the first pass divides
        )

    def _descend(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        """One query for each row that descends; those that have no move left go on to the refinement."""
        todo = query.live & (state.stage == DESCENT)
        for trial in itertools.count():
            if not bool(todo.any()):
                break
            y, block, left = self._move(task, state)
            asks = todo & left & (length(y - task.images) < length(state.x - task.images))
            fooled = asks & task.reached(query(y, asks))
            x = torch.where(wide(fooled), y, state.x)
            state = state._replace(
                x=x,
                position=torch.where(todo & left, block + 1, state.position),
                idle=torch.where(asks, -1, state.idle),
                asked=state.asked + asks,
                gained=state.gained + asks * (state.before - length(x - task.images)),
            )
            state = self._next_pass(task, state, todo & ~left, t, trial)
            state = self._end(state, todo)
            todo &= ~asks & (state.stage == DESCENT)
        return state

    def _move(self, task: Task, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Images with the next block moved that shortens the distance, its number (N,), and if there is one (N,)."""
        change = state.x - task.images
        moved = (state.x - wide(state.size) * change.sign()).clamp(0, 1)
        gain = change.double() ** 2 - (moved - task.images).double() ** 2
        side = 2 * self.reach + 1
        gain = functional.avg_pool2d(gain, side, 1, self.reach)  # of each window, over its size
        gains = gain.flatten(1).gather(1, state.order.flatten(1)).view_as(state.order).sum(2)  # (N, blocks)
        ahead = torch.arange(gains.shape[1], device=gains.device) >= state.position[:, None]
        falls = ahead & (gains > 0)
        block = falls.byte().argmax(1)  # the first one
        values = state.order[torch.arange(len(block), device=block.device), block]  # (N, block)
        centres = torch.zeros_like(change).flatten(1).scatter(1, values, 1).view_as(change)
        window = functional.max_pool2d(centres, side, 1, self.reach) > 0
        return torch.where(window, moved, state.x), block, falls.any(1)

    def _next_pass(self, task: Task, state: State, where: Tensor, t: int, trial: int) -> State:
        """A smaller step and another order, for the rows whose pass is over.

        A pass is of whole blocks: it leaves out the few values that make no block.
        """
        rows = where.nonzero().squeeze(1)
        if not len(rows):
            return state
        _, blocks, block = state.order.shape
        random = rng.bits(task.seed, task.ids[rows], t, ORDER + trial, task.images[0].numel()).argsort(1)
        return state._replace(
            size=torch.where(where, state.size / self.shrink, state.size),
            order=state.order.index_copy(0, rows, random[:, : blocks * block].view(-1, blocks, block)),
            position=torch.where(where, 0, state.position),
            idle=state.idle + where,
        )

    def _end(self, state: State, where: Tensor) -> State:
        """Check the progress of the rows that have asked often enough."""
        due = where & (state.asked >= self.descent_patience)
        gain = state.gained / state.asked
        slow = due & (gain < self.descent_gain)
        return state._replace(
            stage=torch.where(slow | (where & (state.idle >= IDLE_PASSES)), REFINEMENT, state.stage),
            asked=torch.where(due, 0, state.asked),
            before=torch.where(due, state.before - gain, state.before),
            gained=torch.where(due, 0, state.gained),
        )
