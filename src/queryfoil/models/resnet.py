"""A small residual network for small images: the victim that ships with the library."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Basic residual block (He et al., 2016): two 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Small residual network, 8 convolutions deep, for small images.

    Images in [0, 1], float32 (N, C, H, W), to logits (N, K); normalization is inside. A stem
    of stride 2, one block per width (the later ones halve the resolution), global average pooling, a
    linear layer.

    >>> ResNet(widths=(8, 16), channels=1, classes=10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    output = "logits"

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        channels: int = 1,
        classes: int = 10,
        mean: float = 0.2860,
        std: float = 0.3530,
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.conv = nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        pairs = zip([widths[0], *widths[:-1]], widths, strict=True)
        self.blocks = nn.Sequential(*(Block(a, b, stride=1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)))
        self.linear = nn.Linear(widths[-1], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on a CPU

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv((x - self.mean) / self.std)))
        logits: Tensor = self.linear(self.blocks(x).mean(dim=(2, 3)))
        return logits


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all convolution and linear weights anew (He normal, fan-out), biases zero.

    Leaves the global random state alone, so that training is a function of its seed.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight: Any = module.weight
        if isinstance(noisy := getattr(module, "parametrizations", None), nn.ModuleDict):  # behind weight noise
            weight = noisy["weight"].original
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(weight, mode="fan_out", generator=generator)
        else:
            nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
            nn.init.zeros_(module.bias)
