"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016): the paper's victims on CIFAR-10."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from queryfoil.checks import lookup
from queryfoil.models.layers import ACTIVATIONS, Normalize, RowwiseLinear, conv


class Block(nn.Module):
    """Two 3x3 convolutions, each after batch norm and activation; a new width goes through a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: nn.Module, same: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride, same)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3, 1, same)
        self.activation = activation
        self.convShortcut = conv(inputs, outputs, 1, stride, same) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return torch.add(self.conv2(self.activation(self.bn2(self.conv1(out)))), shortcut)


class Group(nn.Module):
    """Blocks of one width."""

    def __init__(self, count: int, inputs: int, outputs: int, stride: int, activation: nn.Module, same: bool) -> None:
        super().__init__()
        first = Block(inputs, outputs, stride, activation, same)
        self.layer = nn.Sequential(first, *(Block(outputs, outputs, 1, activation, same) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`; images in [0, 1], (N, C, H, W), to logits (N, K).

    depth: 6 n + 4. activation: "relu", "swish", or "pssilu", one for the whole network. stride: of the first
    convolution; 1 in the papers, 2 makes a network for small devices. same: padding as in TensorFlow.
    normalize: mean and standard deviation of each channel; None leaves the images as they are.

    RobustBench publishes weights: Standard and Dai2021Parameterizing ("pssilu") without normalization;
    Rade2021Helper_extra is WRN-34-10, "swish", same, normalized. Names are those of TRADES (Zhang et al., ICML 2019).

    >>> sum(p.numel() for p in WideResNet(10, 1).parameters())
    77850
    """

    output = "logits"

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        *,
        activation: str = "relu",
        same: bool = False,
        stride: int = 1,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"expected a depth of 10, 16, 22, 28, ..., but got {depth}")
        count, widths = (depth - 4) // 6, [16, 16 * widen, 32 * widen, 64 * widen]
        self.activation = lookup(ACTIVATIONS, activation, "activation")()
        self.normalize = Normalize(*normalize) if normalize else nn.Identity()
        self.conv1 = conv(channels, widths[0], 3, stride, same)
        self.block1 = Group(count, widths[0], widths[1], 1, self.activation, same)
        self.block2 = Group(count, widths[1], widths[2], 2, self.activation, same)
        self.block3 = Group(count, widths[2], widths[3], 2, self.activation, same)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = RowwiseLinear(widths[3], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(self.normalize(x)))))
        logits: Tensor = self.fc(self.activation(self.bn1(out)).mean(dim=(2, 3)))
        return logits
