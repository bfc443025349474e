"""PNI: parametric noise injection (He, Rakin and Fan, CVPR 2019)."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from queryfoil import rng
from queryfoil.checks import is_real
from queryfoil.defenses.defense import Defense


class WeightNoise(nn.Module):
    """Adds alpha std(W) eta to a weight W, where eta is standard normal and drawn at each call.

    `alpha` is trained: one number, or one for each output channel.
    """

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.alpha = nn.Parameter(alpha)

    def forward(self, weight: Tensor) -> Tensor:
        alpha = self.alpha.view(-1, *[1] * (weight.ndim - 1))
        return weight + alpha * weight.detach().std() * rng.shared_noise_like(weight)


class PNI(Defense):
    """Noise on the weights of every convolution and linear layer, in evaluation too, with a trained strength.

    The model is copied, and each of these layers of the copy gets a `WeightNoise`: one number a layer, or one an output
    channel (`channelwise`), that starts at `alpha`. Biases have no noise. `queryfoil train` trains it like any other
    network.

    The release draws the noise once a call, for all images of the batch. Here it is a function of seed and
    query number, the same for all images, so that a result does not depend on the batch: images
    at different query numbers are asked in groups. Outside the benchmark it is fresh at every call. Costs as much as
    the model, and a draw for each weight.
    """

    deterministic = False

    def __init__(self, model: nn.Module, *, channelwise: bool = True, alpha: float = 0.25) -> None:
        super().__init__(copy.deepcopy(model))
        if not is_real(alpha) or not 0 <= alpha < float("inf"):
            raise ValueError(f"expected alpha >= 0, in standard deviations of a layer's weights, but got {alpha!r}")
        self.channelwise, self.alpha = channelwise, float(alpha)
        layers = [module for module in self.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        layers = [layer for layer in layers if layer.weight.numel() > 1]  # one number has no standard deviation
        if not layers:
            raise ValueError("expected a model with convolutions (2-D) or linear layers, but it has none")
        for layer in layers:
            strength = layer.weight.new_full((len(layer.weight) if channelwise else 1,), float(alpha))
            parametrize.register_parametrization(layer, "weight", WeightNoise(strength))
            layer.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K)."""
        parts: list[Tensor] = []
        groups = rng.by_query(len(x))
        for index, drawing in groups:
            with drawing:
                if len(groups) == 1:
                    return self.model(x)  # type: ignore[no-any-return]
                parts.append(self.model(x[index]))
        return torch.cat(parts)[torch.cat([index for index, _ in groups]).argsort()]
