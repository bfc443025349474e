"""Random noise at every query: on the input (RND) or on the scores."""

import math
from typing import Any

from torch import Tensor, nn

from queryfoil import rng
from queryfoil.checks import is_real
from queryfoil.defenses.defense import Defense
from queryfoil.oracle import as_log_scores, from_log_scores, quantize


def _check_std(std: Any, scale: str) -> float:
    if not is_real(std) or not (math.isfinite(std) and std >= 0):
        raise ValueError(f"expected std >= 0 {scale}, but got {std!r}")
    return float(std)


class InputNoise(Defense):
    """RND: normal noise on the image, fresh at every call (Qin et al., NeurIPS 2021; Byun et al., WACV 2022).

    The model is given clip(x + std * noise, 0, 1), floored to 8 bits. Costs no forward pass.

    std: standard deviation on the [0, 1] scale, >= 0. The paper calls its 0.02 a variance; the released
    code uses it as a standard deviation, and so does this. On adversarially trained networks the release has 0.05.
    """

    deterministic = False

    def __init__(self, model: nn.Module, *, std: float = 0.02) -> None:
        super().__init__(model)
        self.std = _check_std(std, "on the [0, 1] scale")

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the noisy images."""
        scores: Tensor = self.model(quantize(x + self.std * rng.noise_like(x)))
        return scores


class OutputNoise(Defense):
    """Normal noise on the logits, fresh at every call (Aithal and Li, IEEE Access 2022). Costs no forward pass.

    Probabilities get it on their logarithm, and are normalized again.

    std: in units of logits, >= 0. The paper's release has 1 for the undefended network on CIFAR-10, and 0.3.
    """

    deterministic = False

    def __init__(self, model: nn.Module, *, std: float = 1.0) -> None:
        super().__init__(model)
        self.std = _check_std(std, "in units of logits")

    def forward(self, x: Tensor) -> Tensor:
        """Noisy scores (N, K)."""
        scores = as_log_scores(self.model(x), self.output)
        return from_log_scores(scores + self.std * rng.noise_like(scores), self.output)
