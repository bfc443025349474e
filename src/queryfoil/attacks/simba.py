"""SimBA: one coordinate of an orthonormal basis at a time, down or else up.

Guo et al., "Simple Black-box Adversarial Attacks" (ICML 2019), with the paper's bound: the sum of all steps is
projected onto the ball (AAA uses it so; the original has no ball). The basis is the discrete cosine
transform of the whole image, of which only the lowest frequencies are taken, or single pixels.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import rng
from queryfoil.attacks.acceptance import GREEDY, Rule
from queryfoil.checks import lookup, require_positive, require_whole
from queryfoil.oracle import Oracle
from queryfoil.run import Attack
from queryfoil.task import Task

ORDER = 0  # name of the draw
BASES = {"dct": "cosines", "pixel": "single values"}


class State(NamedTuple):
    delta: Tensor  # (N, C, H, W) sum of the accepted steps, before projection
    loss: Tensor  # (N,) the attacker's loss there
    place: Tensor  # (N,) int64, how many coordinates are done
    second: Tensor  # (N,) bool, is the other direction next?
    memory: Tensor  # (N, M) of the acceptance rule


@dataclass(frozen=True)
class SimBA(Attack[State]):
    """SimBA, L-inf and L2: steps along cosines or pixels, in a random order for each image.

    step_size: change of one coefficient, > 0 (0.2 in [0, 1] pixels or coefficients). basis: "dct" or "pixel".
    frequencies: how many of the lowest frequencies of "dct" are taken along each side. accept: the
    acceptance rule; where it refuses the step down, the step up is tried.
    """

    step_size: float = 0.2
    basis: str = "dct"
    frequencies: int = 32
    accept: Rule = GREEDY

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    loss: ClassVar[str] = "probability"

    def __post_init__(self) -> None:
        require_positive("step_size", self.step_size)
        require_whole("frequencies", self.frequencies)
        lookup(BASES, self.basis, "basis")

    def init(self, task: Task, query: Oracle) -> State:
        loss = task.objective(query.scores)
        place = torch.zeros_like(task.ids)
        return State(torch.zeros_like(task.images), loss, place, place > 0, self.accept.start(loss))

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        delta = self._stepped(task, state)
        loss = task.objective(query(task.project(task.images + delta)))
        accepted, memory = self.accept(state.loss, loss, state.memory)
        # differs from the release, which also tries the second direction where the first has helped, uncounted
        done = accepted | state.second
        return State(
            torch.where(accepted[:, None, None, None], delta, state.delta),
            torch.where(accepted, loss, state.loss),
            state.place + done,
            ~done,
            memory,
        )

    def _stepped(self, task: Task, state: State) -> Tensor:
        """One step along the coordinate whose turn it is.

        # differs from the release: an order for each image, and a new one when all coordinates are done
        """
        n, c, h, w = task.images.shape
        rows, columns = (min(self.frequencies, h), min(self.frequencies, w)) if self.basis == "dct" else (h, w)
        size = c * rows * columns
        chosen = rng.permuted(task.seed, task.ids, state.place // size, ORDER, state.place % size, size)
        channel, row, column = chosen // (rows * columns), chosen // columns % rows, chosen % columns
        change = torch.where(state.second, self.step_size, -self.step_size)
        delta = state.delta.clone()
        every = torch.arange(n, device=delta.device)
        if self.basis == "pixel":
            delta[every, channel, row, column] += change
        else:
            down, across = cosines(h, rows).to(delta)[row], cosines(w, columns).to(delta)[column]
            delta[every, channel] += change[:, None, None] * down[:, :, None] * across[:, None, :]
        return delta


def cosines(size: int, frequencies: int) -> Tensor:
    """The lowest rows (frequencies, size) of the orthonormal discrete cosine transform of type 2."""
    place = torch.arange(size, dtype=torch.float64) + 0.5
    waves = (math.pi / size * torch.arange(frequencies, dtype=torch.float64)[:, None] * place).cos() * math.sqrt(
        2 / size
    )
    waves[0] /= math.sqrt(2)
    return waves
