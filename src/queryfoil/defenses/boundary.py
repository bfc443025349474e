"""Boundary defense: noise where the network is unsure (Aithal and Li, 2022)."""

import torch
from torch import Tensor, nn

from queryfoil import rng
from queryfoil.checks import require
from queryfoil.defenses.defense import Defense
from queryfoil.oracle import as_log_scores, from_log_scores


class BoundaryNoise(Defense):
    """Normal noise on the logits of images whose confidence is low, fresh at every call. Costs no forward pass.

    The label is that of the noisy logits, which is what stops attackers who see labels alone. Probabilities get it on
    their logarithm, and are normalized again.

    theta: the confidence, max softmax before the noise, under which there is noise; in (0, 1]. Of K classes none is
        under 1 / K.
    std: sigma, in units of logits, >= 0.

    The paper has 0.3 and 0.1 for ImageNet; networks with few classes are hardly ever that unsure, and want a theta that
    is higher.
    """

    deterministic = False

    def __init__(self, model: nn.Module, *, theta: float = 0.3, std: float = 0.1) -> None:
        super().__init__(model)
        require("theta", theta, "> 0 and <= 1", lambda value: 0 < value <= 1)
        require("std", std, ">= 0 in units of logits", lambda value: value >= 0)
        self.theta, self.std = float(theta), float(std)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K), some of them noisy."""
        scores = as_log_scores(self.model(x), self.output)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        unsure = scores.softmax(-1).amax(-1, keepdim=True) < self.theta
        # drawn for all rows, so that a row's noise does not depend on how many others are unsure
        noisy = scores + self.std * rng.noise_like(scores)
        return from_log_scores(torch.where(unsure, noisy, scores), self.output)
