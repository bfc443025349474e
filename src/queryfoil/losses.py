"""What a score-based attacker minimizes: functions of scores (N, K) and the goal, giving (N,).

`scores` are logits or log-probabilities; the oracle turns probabilities into their logarithm first.
The goal is to leave the label (targets None) or to reach the target.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def margin(scores: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Logit margin (paper, eq. 1): label minus best other; targeted: best other minus target.

    The goal is reached where it is <= 0: a tie for the top counts for the attacker.

    >>> margin(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
    tensor([2.])
    >>> margin(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]), torch.tensor([2]))
    tensor([3.])
    """
    wanted = (labels if targets is None else targets)[:, None]
    chosen = scores.gather(1, wanted).squeeze(1)
    others = scores.scatter(1, wanted, -torch.inf).amax(1)
    return chosen - others if targets is None else others - chosen


def probability_margin(scores: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """The margin of the probabilities, in [-1, 1] (paper, appendix A)."""
    return margin(scores.softmax(1), labels, targets)


def probability(scores: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Probability of the label; targeted: minus that of the target (SimBA's loss).

    >>> probability(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.5000])
    """
    probs = scores.softmax(1)
    if targets is None:
        return probs.gather(1, labels[:, None]).squeeze(1)
    return -probs.gather(1, targets[:, None]).squeeze(1)


def cross_entropy(scores: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Log-probability of the label; targeted: minus that of the target. Both fall as the attack succeeds.

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor([-0.6931])
    """
    log_probs = scores.log_softmax(1)
    if targets is None:
        return log_probs.gather(1, labels[:, None]).squeeze(1)
    return -log_probs.gather(1, targets[:, None]).squeeze(1)


Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]

SPAN = {"probability": 1.0, "probability_margin": 2.0}
"""By how much a loss can change at most, where that is bounded."""

LOSSES: dict[str, Loss] = {
    "margin": margin,
    "probability_margin": probability_margin,
    "probability": probability,
    "cross_entropy": cross_entropy,
}
