"""Surrogates of QueryNet: networks that learn to answer as the model does, and how they are trained.

`small`: three fixed small networks, for a CPU. `search`: the paper's three, whose architectures are
searched while they learn (see `surrogate_search`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from queryfoil.attacks.surrogate_search import SuperNet

STEPS = {"small": 20, "search": 500}
"""The kinds of surrogates, with their training steps before each query."""

LAYERS = ((3, 2), (5, 2), (3, 3))  # kernel and number of convolutions of each small network
CELLS = (10, 6, 8)  # of each searching network, in the release's order
GRID = 8  # the small networks work on about this many rows and columns


class Small(nn.Module):
    """A small convolutional network that keeps positions; images (N, C, H, W) in [0, 1] to scores (N, K).

    The first of its `depth` convolutions has a stride for images larger than 15 x 15.
    """

    def __init__(self, like: Tensor, classes: int, width: int, kernel: int, depth: int) -> None:
        super().__init__()
        stride = max(min(like.shape[2:]) // GRID, 1)
        first = nn.Conv2d(like.shape[1], width, kernel + stride - 1, stride, kernel // 2)
        layers: list[nn.Module] = [first, nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(width, width, kernel, padding=kernel // 2), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(GRID), nn.Flatten())
        self.linear = nn.Linear(width * GRID**2, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(self.features(4 * x - 2))
        return scores


@dataclass(frozen=True)
class Surrogate:
    """A network with the optimizers that train it; `architecture` is None where that is fixed."""

    network: nn.Module
    weights: torch.optim.Optimizer
    architecture: torch.optim.Optimizer | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]


def build(kind: str, like: Tensor, classes: int, width: int, seed: int) -> tuple[Surrogate, ...]:
    """Three surrogates for images such as `like` (N, C, H, W), on its device; a function of the seed.

    The global random state is left alone.
    """
    channels = like.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change those of GPUs, too
        if kind == "small":
            return tuple(_fixed(Small(like, classes, width, kernel, depth).to(like.device)) for kernel, depth in LAYERS)
        return tuple(_searching(SuperNet(channels, classes, width, cells).to(like.device)) for cells in CELLS)


def _fixed(network: Small) -> Surrogate:
    return Surrogate(network, torch.optim.Adam(network.parameters(), lr=2e-3))


def _searching(network: SuperNet) -> Surrogate:
    return Surrogate(
        network,
        torch.optim.SGD(network.weights(), lr=0.1, momentum=0.9, weight_decay=3e-4),
        torch.optim.Adam(network.architecture(), lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3),
    )


def train(surrogate: Surrogate, images: Tensor, answers: Tensor, batches: Tensor) -> None:
    """Fit a surrogate to answers (M, K) to images (M, C, H, W) of bytes.

    batches: (steps, 2, B) rows of these; one for the architecture's step and one for the weights'.

    # differs from the release: the gradient of the architecture's batch is not added to the weights'
    # (it forgets to clear it).
    """
    with torch.enable_grad():
        for i, (first, second) in enumerate(batches):
            if surrogate.architecture is not None:
                _descend(surrogate, surrogate.architecture, images[first], answers[first])
                for group in surrogate.weights.param_groups:
                    group["lr"] = 0.05 * (1 + math.cos(math.pi * i / 5))
            _descend(surrogate, surrogate.weights, images[second], answers[second])


def _descend(surrogate: Surrogate, optimizer: torch.optim.Optimizer, images: Tensor, answers: Tensor) -> None:
    parameters: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss = mse_loss(surrogate(images.float() / 255), answers)
    loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
    if optimizer is surrogate.weights:
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()
