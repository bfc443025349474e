"""A network for pairs of images: another reads both halves, and each pair of classes has the sum of their logits."""

from torch import Tensor, nn

from queryfoil.models.zoo import load


class Pairs(nn.Module):
    """Logits (N, K K) of images (N, C, H, 2 W) by a network that gives logits (N, K) of (N, C, H, W).

    Class K a + b has the sum of the left half's logit for a and the right half's for b: its probability is the product
    of theirs, so a calibrated network stays calibrated.

    >>> import torch
    >>> Pairs(nn.Flatten())(torch.tensor([[[[1.0, 2.0, 10.0, 20.0]]]]))
    tensor([[11., 21., 12., 22.]])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[3] // 2
        left, right = self.network(x[..., :half]), self.network(x[..., half:])
        both: Tensor = left[:, :, None] + right[:, None, :]
        return both.flatten(1)


def fashion() -> nn.Module:
    """Pairs of clothes, 100 classes, by `fashion-resnet`: `queryfoil.models.pairs:fashion` in a plan."""
    return Pairs(load("fashion-resnet")).eval()
