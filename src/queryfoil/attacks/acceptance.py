"""Acceptance rules of random search: which proposals become the current point.

A rule is a frozen dataclass of its parameters. It may remember something about each image: `start`
gives the memory (N, M), `__call__` the accepted rows and the memory to keep.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from queryfoil.checks import is_real

TAU = 6.0
"""The paper's period, whose half is the threshold of `op` and `bi` against a defense whose tau is not known."""


class Rule(Protocol):
    """What a random search asks after each query: losses (N,) and the rule's memory (N, M) in, decisions out."""

    name: ClassVar[str]

    def start(self, losses: Tensor) -> Tensor: ...

    def __call__(self, current: Tensor, proposed: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Greedy:
    """Accept where the attacker's loss strictly falls (paper, eq. 3)."""

    name: ClassVar[str] = "greedy"

    def start(self, losses: Tensor) -> Tensor:
        return losses.new_zeros(len(losses), 0)

    def __call__(self, current: Tensor, proposed: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return proposed < current, memory


@dataclass(frozen=True)
class Opposite:
    """Accept where the loss rises, or falls by more than the threshold (paper, section 4: op-Square).

    threshold: in units of the loss, > 0; half the defense's tau.
    """

    threshold: float = TAU / 2

    name: ClassVar[str] = "op"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def start(self, losses: Tensor) -> Tensor:
        return losses.new_zeros(len(losses), 0)

    def __call__(self, current: Tensor, proposed: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        rise = proposed - current
        return (rise > 0) | (rise < -self.threshold), memory


@dataclass(frozen=True)
class Bidirectional:
    """Greedy, until a query shows a rise above the threshold; from then on `op`, for good (bi-Square).

    threshold: in units of the loss, > 0; half the defense's tau.
    """

    threshold: float = TAU / 2

    name: ClassVar[str] = "bi"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def start(self, losses: Tensor) -> Tensor:
        return torch.zeros(len(losses), 1, dtype=torch.bool, device=losses.device)  # is it `op` by now?

    def __call__(self, current: Tensor, proposed: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        rise = proposed - current
        turned = memory[:, 0]
        accepted = torch.where(turned, (rise > 0) | (rise < -self.threshold), rise < 0)
        return accepted, (turned | (rise > self.threshold))[:, None]


def _check_threshold(threshold: float) -> None:
    if not is_real(threshold) or not 0 < threshold < float("inf"):
        raise ValueError(f"expected threshold > 0 and finite, in units of the loss, but got {threshold!r}")


GREEDY = Greedy()
ACCEPTANCE: dict[str, type[Rule]] = {kind.name: kind for kind in (Greedy, Opposite, Bidirectional)}
