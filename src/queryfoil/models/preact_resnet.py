"""Pre-activation residual networks (He et al., ECCV 2016), as RobustBench publishes one trained in L2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from queryfoil.models.layers import CIFAR, Normalize, RowwiseLinear, conv


class Block(nn.Module):
    """Two 3x3 convolutions, each after batch norm and Swish; the shortcut of a new shape is a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        self.conv_2d_1 = conv(inputs, outputs, 3, stride, same=True)
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        self.conv_2d_2 = conv(outputs, outputs, 3)
        self.shortcut = conv(inputs, outputs, 3, stride, same=True) if stride != 1 or inputs != outputs else None
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        out = self.conv_2d_2(self.activation(self.batchnorm_1(out)))
        return torch.add(out, shortcut)


class PreActResNet(nn.Module):
    """PreActResNet-18 with Swish; images in [0, 1], (N, C, H, W), to logits (N, K).

    widths: of the stages, each with `blocks` blocks. stride: of the first convolution; 1 in the papers. The
    defaults are Rade2021Helper_R18_ddpm of RobustBench, with its names.

    >>> sum(p.numel() for p in PreActResNet(widths=(8, 16), blocks=1).parameters())
    6258
    """

    output = "logits"

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: int = 2,
        *,
        stride: int = 1,
        normalize: tuple[Sequence[float], Sequence[float]] = CIFAR,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(*normalize)
        self.conv_2d = conv(channels, widths[0], 3, stride)
        self.stages = len(widths)
        inputs = widths[0]
        for i, width in enumerate(widths):
            first = Block(inputs, width, stride=1 if i == 0 else 2)
            self.add_module(f"layer_{i}", nn.Sequential(first, *(Block(width, width, 1) for _ in range(blocks - 1))))
            inputs = width
        self.batchnorm = nn.BatchNorm2d(inputs)
        self.activation = nn.SiLU()
        self.logits = RowwiseLinear(inputs, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_2d(self.normalize(x))
        for i in range(self.stages):
            out = self.get_submodule(f"layer_{i}")(out)
        logits: Tensor = self.logits(self.activation(self.batchnorm(out)).mean(dim=(2, 3)))
        return logits
