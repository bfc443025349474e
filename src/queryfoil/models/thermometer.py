"""Thermometer encoding (Buckman et al., ICLR 2018): an input layer that gradients do not pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def encode(x: Tensor, levels: int) -> Tensor:
    """Each value of (N, C, H, W) in [0, 1] as `levels` bits, (N, C * levels, H, W): bit i is 1 where x > i / levels.

    The bits are steps. Backward, bit i has the slope of a ramp from i / levels to (i + 1) / levels (BPDA: Athalye et
    al., ICML 2018), so that a white-box attack on it means something.

    >>> encode(torch.tensor([[[[0.3]]]]), levels=4).flatten()
    tensor([1., 1., 0., 0.])
    """
    rest = x[:, :, None] * levels - torch.arange(levels, device=x.device).view(1, 1, -1, 1, 1)
    ramp = rest.clamp(0, 1)
    return (ramp + ((rest > 0).to(x) - ramp).detach()).flatten(1, 2)


class Thermometer(nn.Module):
    """A network behind a thermometer encoding, trained with it.

    `network` builds a network from a number of input `channels`; it sees `levels` bits for each of the images'
    `channels`. Costs little more than that network.
    """

    output = "logits"
    deterministic, keeps_label, rowwise = True, False, True

    def __init__(self, network: Callable[..., nn.Module], *, levels: int = 16, channels: int = 3) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"expected at least 2 levels, but got {levels}")
        self.levels = levels
        self.network = network(channels=channels * levels)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        logits: Tensor = self.network(encode(x, self.levels))
        return logits
