"""DENT: dynamic inference (Wang et al., 2021)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from queryfoil.checks import lookup
from queryfoil.defenses.defense import Defense
from queryfoil.oracle import as_log_scores


def tent(scores: Tensor) -> Tensor:
    """Entropy of the probabilities, summed over rows (Wang et al., ICLR 2021)."""
    log_p = scores.log_softmax(1)
    return -(log_p.exp() * log_p).sum()


def shot(scores: Tensor) -> Tensor:
    """Entropy of the probabilities minus that of their mean over the batch (Liang et al., ICML 2020)."""
    p = scores.softmax(1)
    mean = p.mean(0)
    return -(p * (p + 1e-5).log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()


class Adam:
    """Kingma and Ba (ICLR 2015). Each number has its own moments, so that rows stay apart."""

    lr, beta1, beta2, eps = 1e-3, 0.9, 0.999, 1e-8

    def __init__(self, values: Tensor) -> None:
        self.first, self.second, self.step = torch.zeros_like(values), torch.zeros_like(values), 0

    def rates(self, gradient: Tensor) -> Tensor:
        """Learning rate of each number, after its gradient."""
        self.step += 1
        self.first = self.beta1 * self.first + (1 - self.beta1) * gradient
        self.second = self.beta2 * self.second + (1 - self.beta2) * gradient.square()
        corrected: Tensor = (self.second / (1 - self.beta2**self.step)).sqrt() + self.eps
        return self.lr / (1 - self.beta1**self.step) / corrected

    def __call__(self, values: Tensor, gradient: Tensor) -> Tensor:
        rates = self.rates(gradient)  # which also moves the first moment
        return values - rates * self.first


class AdaMod(Adam):
    """Adam whose learning rates are bounded by their own running mean (Ding et al., 2019)."""

    lr, beta1, beta3 = 6e-3, 0.99, 0.6

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self.mean = torch.zeros_like(values)

    def rates(self, gradient: Tensor) -> Tensor:
        rates = super().rates(gradient)
        self.mean = self.beta3 * self.mean + (1 - self.beta3) * rates
        return torch.minimum(rates, self.mean)


LOSSES = {"tent": (tent, Adam), "shot": (shot, AdaMod)}


class DENT(Defense):
    """At each query, scale and shift of every batch norm are adapted to the image, and forgotten.

    `steps` steps lower the entropy of the answer, from the trained values, separately for each image;
    the statistics of the batch norms stay. Works on any network with BatchNorm2d. Costs `steps` forward and
    backward passes and one more forward: about 3 `steps` + 1 times the undefended network.

    loss: "tent", with Adam at a learning rate of 0.001, as the paper has it; or "shot", with AdaMod at 0.006, as
    DENT's own release has it: its term for diversity ties the images of a batch together, so that it is
    not rowwise, and runs on all images at once.

    One call at a time: it works by hooks on the model's layers, which are gone when it returns.
    """

    def __init__(self, model: nn.Module, *, loss: str = "tent", steps: int = 6) -> None:
        super().__init__(model)
        lookup(LOSSES, loss, "loss")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"expected steps as an integer >= 0, but got {steps!r}")
        if not _adapted(model):
            raise ValueError("expected a network with BatchNorm2d that has scale and shift, but it has none")
        self.loss, self.steps = loss, steps
        self.rowwise = self.rowwise and loss == "tent"

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) after adaptation."""
        loss, optimizer = LOSSES[self.loss]
        layers = _adapted(self.model)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone()
            # scale and shift of all layers, one row an image: (N, 2 C_1 + 2 C_2 + ...)
            start = torch.cat([p.detach().clone() for layer in layers for p in (layer.weight, layer.bias)])
            values = start.repeat(len(x), 1)
            update = optimizer(values)
            for _ in range(self.steps):
                values.requires_grad_()
                with _affine(layers, values):
                    # differs from the release: a sum over rows, not a mean, so that rows stay apart to the last bit
                    (gradient,) = torch.autograd.grad(loss(as_log_scores(self.model(x), self.output)), values)
                values = update(values.detach(), gradient)
        with torch.no_grad(), _affine(layers, values):
            scores: Tensor = self.model(x)
        return scores


def _adapted(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The layers that are adapted."""
    found = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [module for module in found if module.affine and module.track_running_stats]


@contextmanager
def _affine(layers: list[nn.BatchNorm2d], values: Tensor) -> Iterator[None]:
    """Within the block, batch norms take scale and shift from the rows of `values` (N, ...), statistics as trained."""
    handles: list[RemovableHandle] = []
    at = 0
    for layer in layers:
        channels = layer.num_features
        scale, shift = values[:, at : at + channels], values[:, at + channels : at + 2 * channels]
        at += 2 * channels

        def adapted(
            module: nn.BatchNorm2d, given: tuple[Tensor], _: Tensor, scale: Tensor = scale, shift: Tensor = shift
        ) -> Tensor:
            normal = F.batch_norm(given[0], module.running_mean, module.running_var, eps=module.eps)
            return normal * scale[:, :, None, None] + shift[:, :, None, None]

        handles.append(layer.register_forward_hook(adapted))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
