"""Undoing AAA-sine: up to three raw margins show the same one, and the one nearest to the last is taken.

AAA-sine shows, of a raw margin m in an interval with middle a, and with u = m - a, a + u - alpha tau sin(2 pi u / tau).
That rises, falls between the turning points -+ tau arccos(1 / (2 pi alpha)) / (2 pi), and rises again: one root in each
piece at most. A search moves in small steps, so the root of an answer is the one nearest to that of the answer before.
What that cannot see is a path through a turning point: it shows the same margins as a path that turns back there, whose
roots are nearer. So the piece seldom changes, and within a piece the curve only rises or only falls:
`benchmarks/sine_roots.py` measures how often a wrong root is taken.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil.attacks.readings import _margin, _with_margin
from queryfoil.checks import lookup, require, require_positive
from queryfoil.oracle import Oracle
from queryfoil.run import Attack, check
from queryfoil.task import Task

HALVINGS = 50  # of a piece, at most tau long: to the last bits
FIRST = {
    "high": "the highest root: the image is far from the boundary",
    "middle": "the middle one of three, the higher of two",
    "low": "the lowest root",
}
"""Which root of the clean image's margin the tracking starts from, where nothing is known yet."""


def turning_point(tau: float, alpha: float) -> float:
    """Distance from the middle of an interval at which the shown margin turns; 0 where it never falls.

    >>> round(turning_point(6.0, 0.7) / 6, 4)
    0.2135
    """
    return tau * math.acos(1 / (2 * math.pi * alpha)) / (2 * math.pi) if 2 * math.pi * alpha > 1 else 0.0


def peak(tau: float, alpha: float) -> float:
    """How far above the middle of an interval the shown margin comes within it; half of a fall from peak to valley.

    >>> round(peak(6.0, 0.7) / 6, 3)
    0.468
    """
    turn = turning_point(tau, alpha)
    return alpha * tau * math.sin(2 * math.pi * turn / tau) - turn


def sine_roots(margins: Tensor, tau: float = 6.0, alpha: float = 0.7) -> Tensor:
    """Raw margins (N, 3) that AAA-sine shows as `margins` (N,), >= 0: ascending, NaN in place of those missing.

    The second is the one in the piece where the curve falls. In double precision. tau: the defense's period, > 0.
    alpha: its reverse step, > 0 and not so large that the intervals overlap (0.73), else ValueError.

    >>> sine_roots(torch.tensor([0.3627, 4.6373, 6.0])).round(decimals=2)
    tensor([[0.0700, 4.0000, 4.5600],
            [1.0000, 2.4900, 5.7500],
            [6.0000,    nan,    nan]], dtype=torch.float64)
    """
    require_positive("tau", tau)
    require("alpha", alpha, "> 0", lambda v: v > 0)
    if peak(tau, alpha) > tau / 2:
        raise ValueError(f"expected alpha of at most 0.73, from where intervals of AAA-sine overlap, but got {alpha!r}")
    margins = margins.double()
    middle = ((margins / tau).floor() + 0.5) * tau
    off, turn, top = margins - middle, turning_point(tau, alpha), peak(tau, alpha)
    there = torch.stack([off <= top, off.abs() <= top, off >= -top], 1)
    ends = torch.tensor([-tau / 2, -turn, turn, tau / 2], dtype=off.dtype, device=off.device)
    low, high = ends[:3].repeat(len(off), 1), ends[1:].repeat(len(off), 1)
    rises = torch.tensor([True, False, True], device=off.device)
    for _ in range(HALVINGS):
        u = (low + high) / 2
        beyond = (u - alpha * tau * torch.sin(2 * math.pi * u / tau) > off[:, None]) == rises
        low, high = torch.where(beyond, low, u), torch.where(beyond, u, high)
    return torch.where(there, middle[:, None] + (low + high) / 2, torch.nan)


@dataclass(frozen=True)
class InvertSine:
    """Undo AAA-sine: of the up to three margins that it shows alike, the nearest to the last one.

    Exact for AAA's closed form, where calibration does not interfere, as long as no wrong root is taken: about every
    second is. tau: the defense's period, > 0. alpha: its reverse step, > 0 and at most 0.73. first: which root of the
    clean image's margin it begins with (see `FIRST`); where the curve rises, an attack compares the roots as it would
    compare what is shown, so the middle one alone makes a difference. Called as it is, without the `Tracked` that
    remembers, it takes that root for each answer.

    >>> InvertSine(first="low")(torch.tensor([[4.6373, 0.0, -1.0]])).round(decimals=2)
    tensor([[ 1.,  0., -1.]])
    """

    tau: float = 6.0
    alpha: float = 0.7
    first: str = "middle"

    name: ClassVar[str] = "invert_sine"

    def __post_init__(self) -> None:
        lookup(FIRST, self.first, "first root")
        sine_roots(torch.ones(1), self.tau, self.alpha)  # ValueError for a curve that cannot be undone

    def __call__(self, scores: Tensor) -> Tensor:
        return _with_margin(scores, self.start(_margin(scores)))

    def start(self, margins: Tensor) -> Tensor:
        """The root (N,) of each margin (N,) with nothing known before."""
        roots = sine_roots(margins, self.tau, self.alpha)
        if self.first == "high":
            return roots.nan_to_num(-torch.inf).amax(1)
        if self.first == "low":
            return roots.nan_to_num(torch.inf).amin(1)
        there = ~roots.isnan()
        place = (there.cumsum(1) == there.sum(1, keepdim=True) // 2 + 1) & there
        return torch.where(place, roots, 0).sum(1)

    def follow(self, margins: Tensor, last: Tensor) -> Tensor:
        """The root (N,) of each margin (N,) that is the nearest to a last one (N,); of two as near, the lower."""
        roots = sine_roots(margins, self.tau, self.alpha)
        nearest = (roots - last[:, None]).abs().nan_to_num(torch.inf).argmin(1, keepdim=True)
        return roots.gather(1, nearest).squeeze(1)


class Rows:
    """An attack's state as a single entry of another, of which rows can be taken as of a tensor."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, rows: Tensor) -> "Rows":
        return Rows(type(self.state)(*(field[rows] for field in self.state)))


class State(NamedTuple):
    inner: Rows  # of the attack that is led
    root: Tensor  # (N,) the last raw margin, as it was read
    top: Tensor  # (N,) the class that led by it


@dataclass(frozen=True)
class Tracked(Attack[State]):
    """Another attack, that sees scores whose margins are the roots of AAA-sine, followed from answer to answer.

    attack: any that sees scores and treats each image by itself, also an `Adaptive` with a tactic or neighbours.
    """

    attack: Attack[Any]
    reading: InvertSine

    norms: ClassVar[tuple[str, ...]] = ()  # these two, and targetable, are the attack's
    loss: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        name = type(self.attack).__name__
        if self.attack.loss is None:
            raise ValueError(f"{name} sees labels alone, so a reading would have no effect; leave it out")
        if not self.attack.rowwise:
            raise ValueError(f"{name} learns from all images at once, and takes no reading; leave it out")
        for shared in ("norms", "loss", "targetable"):
            object.__setattr__(self, shared, getattr(self.attack, shared))

    def check_task(self, task: Task) -> None:
        check(self.attack, task.norm, task.targets is not None, task.loss)
        self.attack.check_task(task)

    def init(self, task: Task, query: Oracle) -> State:
        shown = query.scores
        door: Any = Door(query, self.reading, self.reading.start(_margin(shown)), shown.argmax(1))
        inner = self.attack.init(task, door)
        return State(Rows(inner), door.root, door.top)

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        door: Any = Door(query, self.reading, state.root, state.top)
        inner = self.attack.step(task, door, state.inner.state, t)
        return State(Rows(inner), door.root, door.top)


class Door:
    """An oracle behind which the margins are followed; what else is asked of it, the oracle itself answers."""

    def __init__(self, oracle: Oracle, reading: InvertSine, root: Tensor, top: Tensor) -> None:
        self.oracle, self.reading, self.root, self.top = oracle, reading, root, top
        self.scores = _with_margin(oracle.scores, root)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.oracle, name)

    def __call__(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Scores (N, K) with raw margins; `where` (N,) leaves out rows, which keep their last ones."""
        shown = self.oracle(x, where)  # the last answer of a row that was not asked, of which the root stays
        top = shown.argmax(1)
        # where another class leads, the last margin lies on the other side of 0: the lowest root is the nearest
        last = torch.where(top == self.top, self.root, -self.root)
        self.root, self.top = self.reading.follow(_margin(shown), last), top
        self.scores = _with_margin(shown, self.root)
        return self.scores
