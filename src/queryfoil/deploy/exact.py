"""The exact solver of AAA in as few tensor operations as do, none of which depends on values: what a file holds.

The minimum is that of `defenses.disguise` (docs/exact-solver.md), arranged for a server that answers one image: there
each operation costs half a microsecond, whatever it computes.
"""

import math

import torch
from torch import Tensor, nn

from queryfoil.defenses.calibration import Fit
from queryfoil.defenses.disguise import MIN_FACTOR, MIN_MARGIN, MIN_REST

NO_GAP = -1e-30  # in place of 0
UNCOUNTED = -1e30  # what is less is no gap between two classes
NEWTON_STEPS = 7


class Exact(nn.Module):
    """Log-scores (N, K) in single or double precision as AAA shows them; NaN for a row that is not finite.

    >>> found = Fit("linear", 6.0, 1.0, 5.0, 2.0, "exact", 100, 0.1, 3, 100, 1.0, 0.1, 0.1, 0.1)
    >>> top2 = Exact(found)(torch.tensor([[4.0, 0.0, -3.0]])).topk(2).values[0]
    >>> round(float(top2[0] - top2[1]), 3)  # target 2 x 3 - 4 = 2
    2.0
    """

    index: Tensor

    def __init__(self, found: Fit) -> None:
        super().__init__()
        self.found = found
        self.register_buffer("index", torch.arange(found.classes), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Log-scores (N, K) with a top score of 0."""
        key, least = self.found, torch.finfo(z.dtype).min
        top, first = z.max(-1, keepdim=True)
        is_top = self.index == first
        second, runner_up = torch.where(is_top, -torch.inf, z).max(-1, keepdim=True)
        is_second = self.index == runner_up
        margin = top - second
        # minus the gaps of the classes after the second; the top class is out of reach
        below = torch.where(is_top, least, z - second).clamp(least, NO_GAP)
        # logit of the calibrated confidence p = max softmax(z / T), never through p itself
        logit_p = margin / key.temperature - (below / key.temperature).logsumexp(-1, keepdim=True)
        m = self._margin(self._target(margin).clamp_min(MIN_MARGIN), logit_p)
        shown = -m
        if key.classes > 2:
            share = ((m - logit_p).exp() - 1).clamp(MIN_REST, float(key.classes - 2)).log()
            shown = torch.where(is_second, shown, self._rest(torch.where(is_second, least, below), share) - m)
        return torch.where(is_top, 0.0, shown) + (z * 0).sum(-1, keepdim=True)  # NaN if anything is not finite

    def _target(self, margin: Tensor) -> Tensor:
        """The margin (N, 1) to be shown for a margin (eq. 4 and 5)."""
        tau, alpha = self.found.tau, self.found.alpha
        periods = margin / tau
        if self.found.curve == "linear":
            attractor = (periods.floor() + 0.5) * tau
            return attractor + (attractor - margin if alpha == 1 else alpha * (attractor - margin))
        return margin + alpha * tau * (2 * math.pi * (periods - periods.floor())).sin()

    def _margin(self, target: Tensor, logit_p: Tensor) -> Tensor:
        """The best margin (N, 1): the target, but where it allows p too little room and beta > 4 (exact-solver.md)."""
        beta, spread = self.found.beta, math.log(self.found.classes - 1)
        if beta <= 4:
            return target
        q = math.sqrt(1 - 4 / beta)
        r = math.log((1 + q) ** 2 * beta / 4)
        # below the confidence p the objective falls up to r, so that this margin is best
        wide = torch.maximum(target, logit_p.clamp_max(r))
        # above it, there is one other that may be
        narrow = torch.minimum((logit_p.clamp_min(-r) + spread).clamp_min(MIN_MARGIN), wide)
        gain = beta * ((wide - spread).sigmoid() - (narrow - spread).sigmoid())
        return torch.where(gain > wide - narrow, narrow, wide)

    def _rest(self, below: Tensor, share: Tensor) -> Tensor:
        """Minus the gaps (N, K) by a factor, and lowered by a shift, such that ln sum exp is `share` (N, 1).

        It is convex in the factor and falls, so Newton's steps from its tangent at 0 rise to the solution.
        """
        others = self.found.classes - 2
        mean = torch.where(below > UNCOUNTED, below, 0.0).sum(-1, keepdim=True) / others
        c = ((share - math.log(others)) / mean).clamp(MIN_FACTOR, 1.0)
        for _ in range(NEWTON_STEPS):
            scaled = c * below
            slope = (scaled.softmax(-1) * below).sum(-1, keepdim=True)
            c = (c - (scaled.logsumexp(-1, keepdim=True) - share) / slope).clamp(MIN_FACTOR, 1.0)
        scaled = c * below
        return scaled - (scaled.logsumexp(-1, keepdim=True) - share).relu()
