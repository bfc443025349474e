"""Residual networks for small images: the victim that ships with the library, and the bodies of PNI and TRS."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil.checks import lookup
from queryfoil.models.layers import FASHION, Normalize, RowwiseLinear, conv

SHORTCUTS = {"conv": "a 1x1 convolution and batch norm", "pad": "every second pixel, and zeros for the new channels"}


class Pad(nn.Module):
    """A shortcut without parameters to `outputs` channels and half the resolution ("option A")."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.outputs - x.shape[1]))


class Block(nn.Module):
    """Basic residual block: two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs and shortcut == "pad":
            self.shortcut = Pad(outputs)
        elif inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images (He et al., CVPR 2016, section 4.2), 2 + 2 x stages x `blocks` layers deep.

    Images in [0, 1], float32 (N, C, H, W), to logits (N, K). widths: of the stages, of which all but the first
    halve the resolution; each has `blocks` blocks. stride: of the first convolution. shortcut: "conv" or "pad", where
    the width changes. normalize: mean and standard deviation of each channel.

    The defaults are the victim that ships with the library, of 8 layers. ResNet-20 of PNI and TRS: widths (16, 32, 64),
    3 blocks, stride 1.

    >>> ResNet(widths=(8, 16))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    output = "logits"

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        *,
        stride: int = 2,
        shortcut: str = "conv",
        normalize: tuple[Sequence[float], Sequence[float]] = FASHION,
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        lookup(SHORTCUTS, shortcut, "shortcut")
        self.normalize = Normalize(*normalize)
        self.conv = conv(channels, widths[0], 3, stride)
        self.bn = nn.BatchNorm2d(widths[0])
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(inputs, width, 2 if stage > 0 and block == 0 else 1, shortcut))
                inputs = width
        self.blocks = nn.Sequential(*layers)
        self.linear = RowwiseLinear(inputs, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on a CPU

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn(self.conv(self.normalize(x))))
        logits: Tensor = self.linear(self.blocks(out).mean(dim=(2, 3)))
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
