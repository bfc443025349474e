"""RND: noise on the input at every query (Qin et al., NeurIPS 2021; Byun et al., WACV 2022)."""

import math

from torch import Tensor, nn

from queryfoil import rng
from queryfoil.checks import is_real
from queryfoil.oracle import quantize


class InputNoise(nn.Module):
    """RND: normal noise on the image, fresh at every call.

    The model is given clip(x + std * noise, 0, 1), floored to 8 bits.

    std: standard deviation on the [0, 1] scale, >= 0. The paper calls its 0.02 a variance; the released
    code uses it as a standard deviation, and so does this.
    """

    deterministic = False
    keeps_label = False
    rowwise = True

    def __init__(self, model: nn.Module, *, std: float = 0.02) -> None:
        super().__init__()
        if not is_real(std) or not (math.isfinite(std) and std >= 0):
            raise ValueError(f"expected std >= 0 on the [0, 1] scale, but got {std!r}")
        self.model = model
        self.std = float(std)
        self.training = model.training
        self.output: str = getattr(model, "output", "logits")

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the noisy images."""
        scores: Tensor = self.model(quantize(x + self.std * rng.noise_like(x)))
        return scores

    def extra_repr(self) -> str:
        return f"std={self.std:g}"
