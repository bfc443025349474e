"""AAA as a module around any trained model (Chen et al., NeurIPS 2022)."""

import warnings

import torch
from torch import Tensor, nn

from queryfoil.defenses.calibration import Fit, fit
from queryfoil.defenses.defense import Defense
from queryfoil.defenses.disguise import LR, STEPS, TWO_CLASSES, check_settings, disguise
from queryfoil.oracle import as_log_scores, from_log_scores


class AAA(Defense):
    """AAA: same answer, misleading margin, calibrated confidence.

    `model` maps images to scores (N, K) and declares what they are by an attribute `output`: "logits"
    (also without one), "log_probs" or "probs"; AAA returns the same kind. Probabilities are protected
    through their logarithm. The other arguments are those of `disguise`; `AAA.from_fit` takes them from
    a `Fit`. Weights and mode of the model are never touched. Costs a few operations on the scores (under 2 % of a
    small network's forward); with the solver "adam", `steps` forward and backward passes through them.

    >>> import torch
    >>> network = nn.Linear(4, 10)
    >>> protected = AAA(network, tau=2.0, temperature=1.5)
    >>> x = torch.rand(8, 4)
    >>> torch.equal(protected(x).argmax(1), network(x).argmax(1))
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        curve: str = "linear",
        tau: float = 6.0,
        alpha: float | None = None,
        beta: float = 5.0,
        temperature: float = 1.0,
        solver: str = "exact",
        steps: int = STEPS,
        lr: float = LR,
    ) -> None:
        super().__init__(model)
        if self.output not in ("logits", "log_probs", "probs"):
            raise ValueError(f"expected a model's output to be logits, log_probs or probs, but got {self.output!r}")
        self.curve, self.tau, self.beta, self.temperature = curve, tau, beta, temperature
        self.alpha = check_settings(curve, tau, alpha, beta, temperature, solver, steps, lr)
        self.solver, self.steps, self.lr = solver, steps, lr
        self.keeps_label = solver == "exact"

    fit = staticmethod(fit)

    @classmethod
    def from_fit(cls, model: nn.Module, fit: Fit) -> "AAA":
        """Protect a model with what `fit` found on its held-out logits."""
        if fit.classes == 2:
            warnings.warn(TWO_CLASSES, stacklevel=2)
        return cls(model, **fit.settings())

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) for a batch x, of the kind and type that the model gives.

        Probabilities, or their logarithms, in half precision are returned in float32, as rounding them could
        change the answer.
        """
        scores = self.model(x)
        if scores.shape[-1] == 2:
            warnings.warn(TWO_CLASSES, stacklevel=2)
        shown = disguise(
            scores if self.output == "logits" else _single(as_log_scores(scores, self.output)),
            curve=self.curve,
            tau=self.tau,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            solver=self.solver,
            steps=self.steps,
            lr=self.lr,
        )
        return from_log_scores(shown, self.output)  # not cut back to half precision, which could tie the top two

    def extra_repr(self) -> str:
        adam = f", steps={self.steps}, lr={self.lr:g}" if self.solver == "adam" else ""
        return (
            f"curve={self.curve!r}, tau={self.tau:g}, alpha={self.alpha:g}, beta={self.beta:g}, "
            f"temperature={self.temperature:g}, solver={self.solver!r}{adam}"
        )


def _single(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
