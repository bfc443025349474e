"""Coarse scores: a service shows rounded probabilities, a few of them, or the label alone.

Rounding and labels alone are countermeasures of Tramèr et al. (USENIX Security 2016) against theft of the model; ART
has all but the few highest as postprocessors. All show probabilities, whatever the model gives, and cost no forward
pass.
"""

import torch
from torch import Tensor, nn

from queryfoil.checks import lookup, require, require_whole
from queryfoil.defenses.defense import Defense
from queryfoil.defenses.scores import log_scores, show, single

RESTS = {
    "zero": "hidden classes have 0, and the shown ones sum to 1",
    "equal": "shown classes keep their probability, the hidden ones share equally what remains",
}
ROUNDING = 1e-12  # by which a probability may miss the threshold after it went through its logarithm


class RoundedScores(Defense):
    """Probabilities rounded to `decimals` decimals (1 to 6).

    keep_label: whole units of 10^-decimals, so that they sum to 1 and the top class is above the others by at
        least a unit. All are rounded down; the units that are left go to those with the largest remainders (of equal
        ones to the top class first, then to the lower index), so that no class moves by a unit or more and the order
        stays. Where classes are level with the top one then, the last of them gives it a unit. With False each is
        rounded to the nearest, as ART does it: rows need not sum to 1, and of a tie for the top the lower index
        answers, which may be another label.

    >>> RoundedScores(nn.Flatten(), decimals=1)(Tensor([[0.51, 0.48, 0.01]]).log())
    tensor([[0.6000, 0.4000, 0.0000]])
    >>> RoundedScores(nn.Flatten(), decimals=1, keep_label=False)(Tensor([[0.49, 0.505, 0.005]]).log())
    tensor([[0.5000, 0.5000, 0.0000]])
    """

    def __init__(self, model: nn.Module, *, decimals: int = 3, keep_label: bool = True) -> None:
        super().__init__(model)
        self._given, self.output = self.output, "probs"
        require("decimals", decimals, "as a whole number from 1 to 6", lambda d: d in range(1, 7))
        self.decimals, self.keep_label = int(decimals), keep_label
        self.keeps_label = keep_label

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (N, K)."""
        z, top, dtype = _asked(self.model, x, self._given)
        one = 10**self.decimals
        units = z.softmax(-1) * one
        units = _whole(units, top, one) if self.keep_label else units.round()
        shown: Tensor = (units / one).to(dtype)
        return shown


def _whole(units: Tensor, top: Tensor, total: int) -> Tensor:
    """Numbers (N, K) that sum to `total` as whole ones that do so too, `top` (N, 1) the greatest of them."""
    whole = units.floor()
    rest = units - whole
    first = rest.gather(-1, top)
    rest = rest.scatter(-1, top, torch.nextafter(first, torch.full_like(first, torch.inf)))  # first of equal ones
    rank = rest.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    whole = whole + (rank < total - whole.sum(-1, keepdim=True))
    # the last of those that are level with the top class
    rival = whole.scatter(-1, top, -1).flip(-1).argmax(-1, keepdim=True)
    rival = whole.shape[-1] - 1 - rival
    moved = (whole.gather(-1, rival) == whole.gather(-1, top)).to(whole)
    return whole.scatter_add(-1, top, moved).scatter_add(-1, rival, -moved)


class TopK(Defense):
    """The probabilities of the `k` highest classes alone; of ties the lower index.

    Where there are no more than k classes, all are shown. Two suffice for the margin, which is as it was: from k = 2 on
    this takes nothing from an attacker who follows it.

    rest: "zero": hidden classes have 0, and the shown ones sum to 1, which raises the confidence; or "equal":
        shown classes keep their probability, the hidden ones share equally what remains.

    >>> z = Tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    >>> TopK(nn.Flatten(), k=2)(z), TopK(nn.Flatten(), k=1, rest="equal")(z)
    (tensor([[0.6250, 0.3750, 0.0000, 0.0000]]), tensor([[0.5000, 0.1667, 0.1667, 0.1667]]))
    """

    keeps_label = True

    def __init__(self, model: nn.Module, *, k: int = 5, rest: str = "zero") -> None:
        super().__init__(model)
        self._given, self.output = self.output, "probs"
        require_whole("k", k)
        lookup(RESTS, rest, "rest")
        self.k, self.rest = int(k), rest

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (N, K)."""
        z, top, dtype = _asked(self.model, x, self._given)
        rank = z.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return show(_only(z, rank < self.k, self.rest), top, "probs", dtype)


class LabelOnly(Defense):
    """The label alone, as a probability of 1: an attack that follows scores gropes in the dark.

    Chance is left to it, and to others their way along the boundary: attacks that see labels alone lose nothing. Behind
    scores that mislead, such as AAA's, one that believes them may do worse still. The confidence is always 1.

    >>> LabelOnly(nn.Flatten())(Tensor([[0.5, 2.0, 1.0]]))
    tensor([[0., 1., 0.]])
    """

    keeps_label = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._given, self.output = self.output, "probs"

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (N, K) of 0 and 1."""
        z, top, dtype = _asked(self.model, x, self._given)
        return torch.zeros_like(z, dtype=dtype).scatter(-1, top, 1.0)


class HighConfidence(Defense):
    """Only probabilities of at least `threshold`, in (0, 1].

    keep_label: the top class is always shown. With False it is ART's: all below are 0, nothing is normalized, and
        a row of zeros means the first class.
    rest: as for `TopK`; for keep_label=True. With "zero" a top class that is shown alone has a probability of 1.

    >>> z = Tensor([[0.6, 0.3, 0.1]]).log()
    >>> HighConfidence(nn.Flatten())(z), HighConfidence(nn.Flatten(), threshold=0.7, keep_label=False)(z)
    (tensor([[0.6667, 0.3333, 0.0000]]), tensor([[0., 0., 0.]]))
    """

    def __init__(
        self, model: nn.Module, *, threshold: float = 0.25, rest: str = "zero", keep_label: bool = True
    ) -> None:
        super().__init__(model)
        self._given, self.output = self.output, "probs"
        require("threshold", threshold, "> 0 and <= 1", lambda value: 0 < value <= 1)
        lookup(RESTS, rest, "rest")
        if not keep_label and rest != "zero":
            raise ValueError(
                f"expected rest 'zero' for keep_label=False, which shows 0 for the others, but got {rest!r}"
            )
        self.threshold, self.rest, self.keep_label = float(threshold), rest, keep_label
        self.keeps_label = keep_label

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (N, K)."""
        z, top, dtype = _asked(self.model, x, self._given)
        probs = z.softmax(-1)
        high = probs >= self.threshold - ROUNDING
        if not self.keep_label:
            return torch.where(high, probs, 0).to(dtype)
        return show(_only(z, high.scatter(-1, top, True), self.rest), top, "probs", dtype)


def _asked(model: nn.Module, x: Tensor, output: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """A model's log-scores (N, K), their top class (N, 1), and the type of what is shown."""
    scores = model(x)
    z = log_scores(scores, output)
    return z, z.argmax(-1, keepdim=True), single(scores.dtype)


def _only(scores: Tensor, shown: Tensor, rest: str) -> Tensor:
    """Log-scores (N, K) of the classes in `shown` (N, K), and of the others as `rest` says."""
    if rest == "zero":
        return scores.masked_fill(~shown, -torch.inf)
    hidden = scores.masked_fill(shown, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(shown, scores, hidden - (~shown).sum(-1, keepdim=True).log())
