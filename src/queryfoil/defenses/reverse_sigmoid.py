"""Reverse sigmoid: deceptive probabilities (Lee, Edwards, Molloy and Su, 2019)."""

import torch
from torch import Tensor, nn

from queryfoil.checks import require_positive
from queryfoil.defenses.defense import Defense
from queryfoil.defenses.scores import log_scores, show, single
from queryfoil.oracle import SMALLEST, from_log_scores

CLIP = 1e-9  # probabilities are kept that far from 0 and 1


def reversed_sigmoid(probs: Tensor, beta: float, gamma: float) -> Tensor:
    """Each probability p as clip(p - beta (sigmoid(gamma logit(p)) - 1/2), 0, 1), not normalized.

    It does not rise with p everywhere: of two probabilities near 1 the greater is shown lower, and so near 0.

    >>> reversed_sigmoid(torch.tensor([0.99, 0.999, 0.1, 1e-6]).double(), 1.0, 0.1)
    tensor([0.8771, 0.8329, 0.1547, 0.2992], dtype=torch.float64)
    """
    p = probs.clamp(CLIP, 1 - CLIP)
    logit = p.log() - torch.log1p(-p)
    return (p - beta * (1 / (1 + torch.exp(-gamma * logit)) - 0.5)).clamp(0, 1)


class ReverseSigmoid(Defense):
    """Probabilities minus beta (sigmoid(gamma logit(p)) - 1/2), and normalized. Costs no forward pass.

    Meant against theft of the model. Logits are shown as the logarithm of the new probabilities. Computed in double
    precision, returned in single at least.

    beta, gamma: > 0; 1 and 0.1 are those of ART.
    keep_label: where another class would come out highest, it and the top class change places; a tie at the top is
        resolved by a margin of 2e-5. With False it is the original, whose label changes: rarely for ten classes, for
        most unsure images of a thousand.
    """

    def __init__(self, model: nn.Module, *, beta: float = 1.0, gamma: float = 0.1, keep_label: bool = True) -> None:
        super().__init__(model)
        require_positive("beta", beta)
        require_positive("gamma", gamma)
        self.beta, self.gamma, self.keep_label = float(beta), float(gamma), keep_label
        self.keeps_label = keep_label

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the kind that the model gives."""
        scores = self.model(x)
        z = log_scores(scores, self.output)
        # some class has p <= 1/2, and is shown above 0: the sum is positive
        new = reversed_sigmoid(z.softmax(-1), self.beta, self.gamma)
        log_p = (new / new.sum(-1, keepdim=True)).clamp_min(SMALLEST).log()
        if not self.keep_label:
            return from_log_scores(log_p, self.output).to(single(scores.dtype))
        top, highest = z.argmax(-1, keepdim=True), log_p.argmax(-1, keepdim=True)
        best = log_p.gather(-1, highest)
        log_p = log_p.scatter(-1, highest, log_p.gather(-1, top)).scatter(-1, top, best)
        return show(log_p, top, self.output, single(scores.dtype))
