"""Square's proposals by an attacker who looks at nothing: what chance alone achieves in the ball.

No paper's attack, but the reference point for the others: a defense that leaves no more than this search does hides
everything that scores could tell, and one that leaves less helps the attacker.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from queryfoil.attacks.square import Square
from queryfoil.checks import lookup
from queryfoil.oracle import LabelOracle
from queryfoil.run import Attack
from queryfoil.task import Task

MOVES = {"always": "every proposal becomes the current image", "never": "the start remains the current image"}


class State(NamedTuple):
    current: Tensor  # (N, C, H, W) images from which the next proposals are made


@dataclass(frozen=True)
class BlindSquare(Attack[State]):
    """Square without its eyes, L-inf and L2: random windows until one of them fools.

    moves: "always" goes on from every proposal, a random walk; "never" puts each window on the start, stripes or
    bumps. p_init, horizon: as in Square.
    """

    moves: str = "always"
    p_init: float = 0.05
    horizon: int = 10_000

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    loss: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        lookup(MOVES, self.moves, "moves")
        Square(self.p_init, self.horizon)  # which checks them

    def init(self, task: Task, query: LabelOracle) -> State:
        x = self._square.start(task)
        query(x)
        return State(x)

    def step(self, task: Task, query: LabelOracle, state: State, t: int) -> State:
        x = self._square.propose(task, state.current, t)
        query(x)
        return State(x) if self.moves == "always" else state

    @property
    def _square(self) -> Square:
        return Square(self.p_init, self.horizon)
