"""`op` for who does not know in what units the scores are: its threshold is a share of the first loss that is shown."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from queryfoil.checks import require_positive


@dataclass(frozen=True)
class OppositeShare:
    """Accept where the loss rises, or falls by more than a share of its absolute value at the start of the search.

    As `acceptance.Opposite` (paper, section 4: op-Square), whose threshold is half the defense's tau, in units of the
    loss; this one fits scores of any scale, and needs no tau. share: > 0; with the margin as the loss, of the first
    margin shown after the attack's own first move.

    >>> import torch
    >>> rule = OppositeShare(share=0.5)
    >>> current, chance = torch.tensor([4.0, 4.0, 4.0]), torch.zeros(3)
    >>> rule.decide(current, torch.tensor([4.5, 3.0, 1.5]), rule.start(current), chance)[0]
    tensor([ True, False,  True])
    """

    share: float = 0.5

    name: ClassVar[str] = "op_share"

    def __post_init__(self) -> None:
        require_positive("share", self.share)

    def start(self, losses: Tensor) -> Tensor:
        return self.share * losses.abs().double()[:, None]  # the threshold of each image

    def decide(self, current: Tensor, proposed: Tensor, memory: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        rise = (proposed - current).double()
        return (rise > 0) | (rise < -memory[:, 0]), memory
