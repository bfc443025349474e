"""Ensembles, such as that of TRS (Yang et al., NeurIPS 2021)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

SMALLEST = 1e-38
"""Probabilities are kept above it, so that their logarithms are finite. The release has 1e-40, which float32 cannot
hold to full precision."""


class Ensemble(nn.Module):
    """The logarithm of the mean of its members' probabilities.

    `members` give logits. Trained with the objective `TRS` of `queryfoil.train.objectives`, it is the defense TRS.
    Costs as much as all members together.

    >>> class Member(nn.Flatten):
    ...     output = "logits"
    >>> Ensemble([Member(), Member()])(torch.tensor([[[[0.0]], [[0.0]]]])).exp()
    tensor([[0.5000, 0.5000]])
    """

    output = "log_probs"
    keeps_label = False

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if len(self.members) < 2:
            raise ValueError(f"expected at least 2 members, but got {len(self.members)}")
        for member in self.members:
            if getattr(member, "output", "logits") != "logits":
                raise ValueError(f"expected members that give logits, but one gives {member.output}")
        self.deterministic = all(getattr(member, "deterministic", True) for member in self.members)
        self.rowwise = all(getattr(member, "rowwise", True) for member in self.members)
        self.training = self.members[0].training

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, K)."""
        probs = torch.stack([member(x).softmax(-1) for member in self.members])
        return probs.mean(0).clamp_min(SMALLEST).log()
