"""Where workers write how far they are, and the driver reads it."""

from collections.abc import Iterable
from typing import Any


def board() -> type[Any]:
    """The class of an actor. A local class goes there as code, so that its process loads neither library nor torch."""

    class Board:
        def __init__(self) -> None:
            self.noted: dict[int, tuple[int, int]] = {}

        def note(self, piece: int, spent: int, settled: int) -> None:
            """Of a piece of work: queries spent, and queries spent or never needed."""
            self.noted[piece] = (spent, settled)

        def read(self, pieces: Iterable[int]) -> dict[int, tuple[int, int]]:
            """What was noted of these pieces; of all others nobody will ask again."""
            self.noted = {piece: self.noted[piece] for piece in pieces if piece in self.noted}
            return self.noted

    return Board
