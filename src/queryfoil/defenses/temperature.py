"""Temperature scaling (Guo et al., ICML 2017): calibration alone, no defense of the margin's trend."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from queryfoil import metrics
from queryfoil.checks import is_real, lookup
from queryfoil.defenses.calibration import check_held_out
from queryfoil.defenses.defense import Defense
from queryfoil.oracle import as_log_scores, from_log_scores

FROM, TO = 1e-3, 1e3
"""Temperatures that are searched."""


@dataclass(frozen=True)
class TemperatureFit:
    """What was found on n held-out images, and by which criterion."""

    temperature: float
    by: str
    n: int


def fit(logits: Tensor, labels: Tensor, *, by: str = "nll") -> TemperatureFit:
    """The temperature that is best on held-out logits (N, K) and labels (N,), by "nll" or "ece"."""
    return TemperatureFit(lookup(BY, by, "criterion")(logits, labels), by, len(labels))


class TemperatureScaling(Defense):
    """The model's logits divided by a temperature; probabilities are raised to its inverse and normalized.

    temperature: > 0; above 1 it lowers the confidence. Keeps the label. Costs no forward pass.

    >>> TemperatureScaling(nn.Flatten(), temperature=2.0)(Tensor([[1.0, 4.0]]))
    tensor([[0.5000, 2.0000]])
    """

    keeps_label = True

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        super().__init__(model)
        if not is_real(temperature) or not 0 < temperature < float("inf"):
            raise ValueError(f"expected temperature > 0, but got {temperature!r}")
        self.temperature = float(temperature)

    fit = staticmethod(fit)

    @classmethod
    def from_fit(cls, model: nn.Module, fit: TemperatureFit) -> Self:
        """The model at the temperature that was found."""
        return cls(model, temperature=fit.temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K), in single precision at least, as the division could tie the top two otherwise."""
        scores = as_log_scores(self.model(x), self.output)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        top = scores.argmax(-1, keepdim=True)
        shown = from_log_scores(scores.double() / self.temperature, self.output).to(scores)
        others = shown.scatter(-1, top, -torch.inf).amax(-1, keepdim=True)
        above = torch.nextafter(others, torch.full_like(others, torch.inf))  # rounded to a tie, the label would change
        return shown.scatter(-1, top, torch.maximum(shown.gather(-1, top), above))


def temperature_by_nll(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the lowest negative log-likelihood on held-out logits (N, K) and labels (N,).

    That is convex in 1 / T; its slope is halved to a relative width of 1e-6, from 0.001 to 1000. A network that is
    always right gets 0.001, one that is always wrong 1000, and one whose logits are all equal 1.
    """
    check_held_out(logits, labels)
    z = logits.double()
    right = z.gather(1, labels.to(z.device, torch.int64)[:, None]).squeeze(1)

    def slope(inverse: float) -> float:
        """Of the negative log-likelihood, in 1 / T."""
        return float(((z * inverse).softmax(1).mul(z).sum(1) - right).mean())

    if bool((z == z[:, :1]).all()):
        return 1.0
    low, high = math.log(1 / TO), math.log(1 / FROM)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def temperature_by_ece(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the lowest ECE (15 bins) on held-out logits, among the paper's release's: t and 1 / t.

    t = 1, 0.001, 0.002, ..., 0.999; of equal ones the first (the release never tries 1).
    """
    check_held_out(logits, labels)
    y = labels.cpu().numpy()
    correct = logits.argmax(1).cpu().numpy() == y
    steps = np.arange(1, 1000) / 1000
    grid = np.concatenate([[1.0], np.stack([steps, 1 / steps], 1).ravel()])
    errors = [
        metrics.binned_gap(metrics.probabilities(logits.double().cpu() / t, "logits").max(1), correct) for t in grid
    ]
    return float(grid[int(np.argmin(errors))])


BY = {"nll": temperature_by_nll, "ece": temperature_by_ece}
