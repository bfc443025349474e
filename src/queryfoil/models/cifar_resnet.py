"""Residual networks for CIFAR (He et al., CVPR 2016, section 4.2): the bodies of PNI and TRS."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil.checks import lookup
from queryfoil.models.layers import Normalize, conv

SHORTCUTS = {"pad": "every second pixel, and zeros for the new channels", "conv": "a 1x1 convolution and batch norm"}


class Pad(nn.Module):
    """A shortcut without parameters to `outputs` channels and half the resolution ("option A")."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.outputs - x.shape[1]))


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs and shortcut == "pad":
            self.downsample = Pad(outputs)
        elif inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(nn.Module):
    """ResNet-(6 `blocks` + 2); images in [0, 1], (N, C, H, W), to logits (N, K).

    shortcut: "pad" (PNI) or "conv" (TRS). normalize: mean and standard deviation of each channel. Names are
    those of TRS's files.

    >>> sum(p.numel() for p in CifarResNet(3, shortcut="pad", normalize=([0.5], [0.5])).parameters())
    269722
    """

    output = "logits"

    def __init__(
        self,
        blocks: int = 3,
        *,
        shortcut: str,
        normalize: tuple[Sequence[float], Sequence[float]],
        widths: Sequence[int] = (16, 32, 64),
        stride: int = 1,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        lookup(SHORTCUTS, shortcut, "shortcut")
        self.normalize = Normalize(*normalize)
        self.conv1 = conv(channels, widths[0], 3, stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for i, width in enumerate(widths):
            first = Block(inputs, width, 1 if i == 0 else 2, shortcut)
            stages.append(nn.Sequential(first, *(Block(width, width, 1, shortcut) for _ in range(blocks - 1))))
            inputs = width
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(inputs, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(self.normalize(x))))
        logits: Tensor = self.fc(self.layer3(self.layer2(self.layer1(out))).mean(dim=(2, 3)))
        return logits
