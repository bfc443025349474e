"""DENT: dynamic inference (Wang et al., 2021)."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil.checks import lookup
from queryfoil.defenses.defense import Defense
from queryfoil.oracle import as_log_scores


def tent(scores: Tensor) -> Tensor:
    """Entropy of the probabilities, summed over rows, over `BATCH` (Wang et al., ICLR 2021)."""
    log_p = scores.log_softmax(1)
    return -(log_p.exp() * log_p).sum() / BATCH


def shot(scores: Tensor) -> Tensor:
    """Entropy of the probabilities minus that of their mean over the batch (Liang et al., ICML 2020)."""
    p = scores.softmax(1)
    mean = p.mean(0)
    return -(p * (p + 1e-5).log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()


BATCH = 128
"""Images of a batch in the release, whose `tent` is a mean over them: a constant here, so that rows stay apart."""


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
        return self.lr / (1 - self.beta1**self.step) / self.spread()

    def spread(self) -> Tensor:
        """What a learning rate is divided by: the root of the mean square of the gradients, about."""
        return (self.second / (1 - self.beta2**self.step)).sqrt() + self.eps

    def __call__(self, values: Tensor, gradient: Tensor) -> Tensor:
        rates = self.rates(gradient)  # which also moves the first moment
        return values - rates * self.first


class AdaMod(Adam):
    """Adam whose learning rates are bounded by their own running mean (Ding et al., 2019)."""

    lr, beta1, beta3 = 6e-3, 0.99, 0.6

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self.mean = torch.zeros_like(values)

    def spread(self) -> Tensor:
        spread: Tensor = self.second.sqrt() + self.eps  # eps before the correction, as in its release
        return spread / math.sqrt(1 - self.beta2**self.step)

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
    not rowwise. It fades as images are finished: one that is asked alone is not adapted at all.

    One call at a time, others wait: it puts other batch norms in the model's place until it returns.
    """

    def __init__(self, model: nn.Module, *, loss: str = "tent", steps: int = 6) -> None:
        super().__init__(model)
        lookup(LOSSES, loss, "loss")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"expected steps as an integer >= 0, but got {steps!r}")
        if not _adapted(model):
            raise ValueError("expected a network with BatchNorm2d that has scale and shift, but it has none")
        if inside := [type(m).__name__ for m in model.modules() if isinstance(m, DENT) or _is_post_processed(m)]:
            raise ValueError(
                f"expected a network that DENT can adapt through its scores, but {inside[0]} stands between; put "
                f"{inside[0]} around DENT"
            )
        self.loss, self.steps, self._turn = loss, steps, Turn()
        self.rowwise = self.rowwise and loss == "tent"

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) after adaptation."""
        loss, optimizer = LOSSES[self.loss]
        layers = _adapted(self.model)
        with self._turn.lock, torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone()
            # scale and shift of all layers, one row an image: (N, 2 C_1 + 2 C_2 + ...), in single precision at least
            start = torch.cat([p.detach().clone() for layer in layers for p in (layer.weight, layer.bias)])
            values = start.to(torch.promote_types(start.dtype, torch.float32)).repeat(len(x), 1)
            update = optimizer(values)
            for _ in range(self.steps):
                values.requires_grad_()
                with _affine(layers, values):
                    (gradient,) = torch.autograd.grad(loss(self._scores(x)), values)
                values = update(values.detach(), gradient)
            with torch.no_grad(), _affine(layers, values):
                scores: Tensor = self.model(x)
        return scores

    def _scores(self, x: Tensor) -> Tensor:
        """Log-scores (N, K) in single precision at least; ValueError if they do not depend on the batch norms."""
        scores = as_log_scores(self.model(x), self.output)
        if not scores.requires_grad:
            raise ValueError("expected a network whose scores have gradients, but its forward turns them off")
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _adapted(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The layers that are adapted."""
    found = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [module for module in found if module.affine and module.track_running_stats]


class Turn:
    """A lock that copies of a module do not share, and files do not hold."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Turn":
        return Turn()

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        return Turn, ()


def _is_post_processed(module: nn.Module) -> bool:
    return any(kind.__name__ == "AAA" for kind in type(module).__mro__)


@contextmanager
def _affine(layers: list[nn.BatchNorm2d], values: Tensor) -> Iterator[None]:
    """Within the block, batch norms take scale and shift from the rows of `values` (N, ...), statistics as trained."""
    at = 0
    for layer in layers:
        channels = layer.num_features
        scale, shift = values[:, at : at + channels], values[:, at + channels : at + 2 * channels]
        at += 2 * channels

        def adapted(x: Tensor, layer: nn.BatchNorm2d = layer, scale: Tensor = scale, shift: Tensor = shift) -> Tensor:
            normal = F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)
            return normal * scale[:, :, None, None].to(x) + shift[:, :, None, None].to(x)

        layer.forward = adapted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
