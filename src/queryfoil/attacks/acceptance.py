"""Acceptance rules of random search: which proposals become the current point."""

from collections.abc import Callable

from torch import Tensor


def greedy(current: Tensor, proposed: Tensor) -> Tensor:
    """Accept where the attacker's loss (N,) strictly falls (paper, eq. 3)."""
    return proposed < current


ACCEPTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"greedy": greedy}
