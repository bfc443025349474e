"""Layers that several architectures share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FASHION = ((0.2860,), (0.3530,))
"""Mean and standard deviation of each channel of a data set, on the [0, 1] scale."""


class Normalize(nn.Module):
    """(x - mean) / std for each channel. The constants are no part of the state: published files leave them out.

    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Padded as TensorFlow's "SAME": ceil(size / stride) results a side, an odd rest at the right and bottom.

    >>> pad_same(torch.ones(1, 1, 2, 2), kernel=3, stride=2)[0, 0]
    tensor([[1., 1., 0.],
            [1., 1., 0.],
            [0., 0., 0.]])
    """
    sides = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=value)


class RowwiseConv2d(nn.Conv2d):
    """A convolution whose rows have the same bits in any batch: on a CPU, one image alone takes another way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(2, -1, -1, -1))[:1] if len(x) == 1 else super().forward(x)


class SameConv2d(RowwiseConv2d):
    """A convolution with the padding of `pad_same`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_same(x, self.kernel_size[0], self.stride[0]))


class RowwiseLinear(nn.Linear):
    """A linear layer whose rows have the same bits in any batch.

    BLAS computes products of few rows (under 16 with MKL on AVX-512) in another order of sums; so 15 more, of
    zeros, always go along.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 15)))[: len(x)]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, same: bool = False, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, divided by the stride; `same` pads like TensorFlow."""
    if same:
        return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return RowwiseConv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class PSSiLU(nn.Module):
    """x (sigmoid(|alpha| x) - |beta|) / (1 - |beta|), alpha and beta trained (Dai, Mahloujifar and Mittal, 2022).

    >>> PSSiLU()(torch.tensor([-1.0, 0.0, 1.0])).detach()
    tensor([-0.2689,  0.0000,  0.7311])
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([1.0]))
        self.beta = nn.Parameter(torch.tensor([1e-8]))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.beta.abs()
        return x * (torch.sigmoid(self.alpha.abs() * x) - shift) / (1 - shift)


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "swish": nn.SiLU, "pssilu": PSSiLU}
