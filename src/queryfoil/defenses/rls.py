"""RLS: random logit scaling (TMLR 2026)."""

import math

import torch
from torch import Tensor, nn

from queryfoil import rng
from queryfoil.checks import lookup
from queryfoil.defenses.defense import Defense
from queryfoil.defenses.scores import log_scores, show, single


def uniform(noise: Tensor) -> Tensor:
    """Standard normal numbers as ones uniform in (0.5, 10), by the normal distribution function."""
    twice: Tensor = torch.special.erfc(noise.double() / -math.sqrt(2))
    return 0.5 + 9.5 * twice / 2


def normal(noise: Tensor) -> Tensor:
    """Standard normal numbers as max(0.2, |n|) with n of mean 1 and standard deviation 100."""
    return (1 + 100 * noise.double()).abs().clamp_min(0.2)


LAWS = {"uniform": uniform, "normal": normal}
"""Distributions of the factor, as functions of a standard normal number."""


class RLS(Defense):
    """The logits times a random factor c > 0, fresh at every call: ranking and label stay. Costs no forward pass.

    Probabilities are scaled through their logarithm, that is raised to the power c, and normalized; they saturate
    often. The confidence means nothing any more. A loss that is free of the scale, such as (z1 - z2) / (z1 - z3), sees
    the raw trend.

    law: "uniform" in (0.5, 10), or "normal": max(0.2, |n|) with n of mean 1 and standard deviation 100.
    shared: one factor for all images of a call, as in the release, where an image of known scores reveals it; it is not
        rowwise then. In the benchmark it is a function of seed and query number. Else each image has its own.
    """

    deterministic = False
    keeps_label = True

    def __init__(self, model: nn.Module, *, law: str = "uniform", shared: bool = False) -> None:
        super().__init__(model)
        lookup(LAWS, law, "law")
        self.law, self.shared = law, shared
        self.rowwise = self.rowwise and not shared

    def forward(self, x: Tensor) -> Tensor:
        """Scaled scores (N, K), in single precision at least."""
        scores = self.model(x)
        z = log_scores(scores, self.output)
        # not normalized before it is scaled: log-scores of probabilities may have any offset, as it drops out after
        scaled = z * LAWS[self.law](self._noise(z))
        return show(scaled, z.argmax(-1, keepdim=True), self.output, single(scores.dtype))

    def _noise(self, scores: Tensor) -> Tensor:
        """A standard normal number for each row (N, 1)."""
        if not self.shared:
            return rng.noise_like(scores[:, :1])
        noise = torch.empty_like(scores[:, :1])
        for index, drawing in rng.by_query(len(scores)):
            with drawing:
                noise[index] = rng.shared_noise_like(scores[:1, :1])
        return noise
