"""Acceptance rules of attackers who expect that the scores mislead: they walk, turn round, or climb now and then.

The paper's rules (`acceptance`) are functions of losses alone; these may also draw, and `adaptive` gives them their
draws. All but the first are those with which later work attacks AAA: "Dashed Line Defense" (2026; reverse, anneal,
explore) and "Random Logit Scaling" (TMLR 2026; switch_dir).
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from queryfoil.checks import require, require_positive, require_whole


class Tactic(Protocol):
    """Like `acceptance.Rule`, with a draw `chance` (N,) in [0, 1) for each image and query."""

    name: ClassVar[str]

    def start(self, losses: Tensor) -> Tensor: ...

    def decide(self, current: Tensor, proposed: Tensor, memory: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Drift:
    """Accept where the loss does not rise: where scores are constant it walks at random, and never climbs."""

    name: ClassVar[str] = "drift"

    def start(self, losses: Tensor) -> Tensor:
        return losses.new_zeros(len(losses), 0)

    def decide(self, current: Tensor, proposed: Tensor, memory: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        return proposed <= current, memory


@dataclass(frozen=True)
class Reverse:
    """Greedy in one direction; after more than `patience` refusals in a row, accept whatever comes and turn round."""

    patience: int = 23

    name: ClassVar[str] = "reverse"

    def __post_init__(self) -> None:
        require_whole("patience", self.patience)

    def start(self, losses: Tensor) -> Tensor:
        return _nothing(losses, 2)  # refusals in a row; is the search climbing?

    def decide(self, current: Tensor, proposed: Tensor, memory: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        refused, climbing = memory[:, 0], memory[:, 1] > 0
        accepted = _moves(current, proposed, climbing)
        refused = torch.where(accepted, 0, refused + 1)
        forced = refused > self.patience
        return accepted | forced, torch.stack([torch.where(forced, 0, refused), (climbing ^ forced).long()], 1)


@dataclass(frozen=True)
class SwitchDirection:
    """Greedy in one direction; after more than `patience` refusals in a row turn round, and judge anew."""

    patience: int = 10

    name: ClassVar[str] = "switch_dir"

    def __post_init__(self) -> None:
        require_whole("patience", self.patience)

    def start(self, losses: Tensor) -> Tensor:
        return _nothing(losses, 2)  # refusals in a row; is the search climbing?

    def decide(self, current: Tensor, proposed: Tensor, memory: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        refused, climbing = memory[:, 0], memory[:, 1] > 0
        refused = torch.where(_moves(current, proposed, climbing), 0, refused + 1)
        turns = refused > self.patience
        climbing ^= turns
        accepted = _moves(current, proposed, climbing)
        return accepted, torch.stack([torch.where(turns, 0, refused), climbing.long()], 1)


@dataclass(frozen=True)
class Annealing:
    """Accept a rise with the probability exp(-rise / temperature), which falls, and starts anew after long refusals.

    heat: first temperature, in units of the loss, or with `relative` of its absolute value at the start. cooling: its
    factor after each query, in (0, 1]. patience: after more refusals in a row the temperature is `heat` again.
    """

    heat: float = 25.0
    cooling: float = 0.997
    patience: int = 20
    relative: bool = False

    name: ClassVar[str] = "anneal"

    def __post_init__(self) -> None:
        require_positive("heat", self.heat)
        require("cooling", self.cooling, "in (0, 1]", lambda v: 0 < v <= 1)
        require_whole("patience", self.patience)

    def start(self, losses: Tensor) -> Tensor:
        heat = self.heat * (
            losses.abs().double().clamp_min(1e-12) if self.relative else torch.ones_like(losses).double()
        )
        return torch.stack([heat, heat, torch.zeros_like(heat)], 1)  # temperature, first one, refusals in a row

    def decide(self, current: Tensor, proposed: Tensor, memory: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        temperature, heat, refused = memory.T
        rise = (proposed - current).double()
        accepted = (rise <= 0) | (chance < (-rise / temperature).exp())
        refused = torch.where(accepted, 0, refused + 1)
        again = refused > self.patience
        temperature = torch.where(again, heat, temperature * self.cooling)
        return accepted, torch.stack([temperature, heat, torch.where(again, 0, refused)], 1)


@dataclass(frozen=True)
class Explore:
    """Greedy, and whatever comes with the probability `rho`, in [0, 1]."""

    rho: float = 0.5

    name: ClassVar[str] = "explore"

    def __post_init__(self) -> None:
        require("rho", self.rho, "in [0, 1]", lambda v: 0 <= v <= 1)

    def start(self, losses: Tensor) -> Tensor:
        return losses.new_zeros(len(losses), 0)

    def decide(self, current: Tensor, proposed: Tensor, memory: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        return (proposed < current) | (chance < self.rho), memory


def _moves(current: Tensor, proposed: Tensor, climbing: Tensor) -> Tensor:
    """Whether the loss moves, strictly, in each image's direction (N,)."""
    return torch.where(climbing, proposed > current, proposed < current)


def _nothing(losses: Tensor, columns: int) -> Tensor:
    return torch.zeros(len(losses), columns, dtype=torch.int64, device=losses.device)


TACTICS: dict[str, type[Tactic]] = {kind.name: kind for kind in (Drift, Reverse, SwitchDirection, Annealing, Explore)}
