"""Residual networks with bottlenecks: WRN-50-2, ResNeXt-101 and its denoising variant, the paper's victims on ImageNet.

He et al. (CVPR 2016), Xie et al. (CVPR 2017), feature denoising: Xie et al. (CVPR 2019).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil.models.layers import IMAGENET, Normalize, RowwiseLinear, conv, pad_same


class Denoise(nn.Module):
    """x + BN(conv(d)), where d_i = (1 / HW) sum over j of (x_i . x_j) x_j: non-local means without an embedding.

    The sum is the same whether pixels or channels are multiplied first; the smaller product is taken.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.bn(self.conv(non_local_means(x)))
        return out


def non_local_means(x: Tensor) -> Tensor:
    """The mean over pixels j of (x_i . x_j) x_j, for each pixel i of (N, C, H, W).

    >>> non_local_means(torch.tensor([[[[1.0, 2.0]]]]))
    tensor([[[[2.5000, 5.0000]]]])
    """
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(n, h * w, c)  # no copy where channels come last in memory
    turned = pixels.transpose(1, 2)
    means = pixels @ (turned @ pixels) if c < h * w else (pixels @ turned) @ pixels
    return (means / (h * w)).view(n, h, w, c).permute(0, 3, 1, 2)


class Block(nn.Module):
    """1x1, grouped 3x3 (with the stride), 1x1 to four times the planes; batch norm after each; a shortcut."""

    def __init__(
        self, inputs: int, planes: int, stride: int, groups: int, group_width: int, base: int, same: bool, denoise: bool
    ) -> None:
        super().__init__()
        inner, outputs = planes * group_width // base * groups, 4 * planes
        self.conv1, self.bn1 = conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, same, groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.denoise = Denoise(outputs) if denoise else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))
        denoised: Tensor = self.denoise(torch.relu(out))
        return denoised


class BottleneckResNet(nn.Module):
    """Stages of bottleneck blocks; RGB images in [0, 1], (N, C, H, W), to logits (N, K). Names are torchvision's.

    layers: blocks of each stage. groups and group_width: of the 3x3 convolutions of the first stage. base: the
    first stage's planes. same: padding as in TensorFlow. denoise: a `Denoise` after each block. bgr:
    reverses the channels. small: a stem for small images, one 3x3 convolution of stride 2.

    - WRN-50-2: layers (3, 4, 6, 3), group_width 128
    - ResNeXt-101 32x8d: (3, 4, 23, 3), groups 32, group_width 8... in torchvision's count 256 / 64 x 8 = 32 groups of 8
    - FD: the latter with denoise, same, bgr, and 2 x - 1 as normalization

    >>> sum(p.numel() for p in BottleneckResNet((1, 1), base=8, group_width=8, classes=10).parameters())
    9362
    """

    output = "logits"

    def __init__(
        self,
        layers: Sequence[int],
        *,
        groups: int = 1,
        group_width: int = 64,
        base: int = 64,
        same: bool = False,
        denoise: bool = False,
        bgr: bool = False,
        small: bool = False,
        normalize: tuple[Sequence[float], Sequence[float]] = IMAGENET,
        channels: int = 3,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.same, self.bgr, self.small, self.stages = same, bgr, small, len(layers)
        self.normalize = Normalize(*normalize)
        self.conv1 = conv(channels, base, 3 if small else 7, 2, same)
        self.bn1 = nn.BatchNorm2d(base)
        inputs = base
        for i, count in enumerate(layers):
            planes = base << i
            strides = [1 if i == 0 else 2] + [1] * (count - 1)
            blocks = []
            for stride in strides:
                blocks.append(Block(inputs, planes, stride, groups, group_width, base, same, denoise))
                inputs = 4 * planes
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = RowwiseLinear(inputs, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(self.normalize(x.flip(1) if self.bgr else x))))
        if not self.small:
            # zeros are as good as minus infinity as padding, after the ReLU
            out = F.max_pool2d(pad_same(out, 3, 2), 3, 2) if self.same else F.max_pool2d(out, 3, 2, 1)
        for i in range(self.stages):
            out = self.get_submodule(f"layer{i + 1}")(out)
        logits: Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits
