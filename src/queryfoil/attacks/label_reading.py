"""The reading of who looks at labels alone, whatever scores he is shown: what misleads in these does not reach him."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class LabelAlone:
    """1 for the class that is shown as the top, of equal ones the first, and 0 for the others.

    With it any attack is the same behind every deterministic defense that keeps labels.

    >>> import torch
    >>> LabelAlone()(torch.tensor([[0.2, 3.0, -1.0]]))
    tensor([[0., 1., 0.]])
    """

    name: ClassVar[str] = "label"

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.new_zeros(scores.shape).scatter(1, scores.argmax(1, keepdim=True), 1)
