"""Terraces: a few levels of confidence, as few as an honest user can do with, and none where no errors are.

Within a terrace all shown scores are the same, so that no loss has a trend to follow, to reverse, to invert or to
average: only the borders can be felt. They lie where they help most to tell right answers from wrong ones. In a class
without any, what is shown depends on the answer alone, and a search that sees scores is as blind as one that sees
labels. docs/terraces.md derives it, and says what it gives up.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from queryfoil.defenses.defense import Defense
from queryfoil.defenses.disguise import check_logits
from queryfoil.defenses.scores import single
from queryfoil.defenses.terrace_fit import TerraceFit, check_terraces, fit
from queryfoil.oracle import as_log_scores, from_log_scores

NOWHERE = torch.inf  # the border of a group that has fewer than another
TABLES = ("group", "borders", "levels")


def terraced(logits: Tensor, key: TerraceFit) -> Tensor:
    """Rewrite logits (..., K) as the levels that `fit` found for a model of K classes.

    What is shown depends on the top class, on the interval of its margin, and on which classes follow it, as far as
    the fit shows them: they keep their order, and all other classes are level. The label is kept; a tie for the top
    goes to the lower index. Each row is independent of the others; computed in double precision, returned in the type
    that came, or in single precision where that is half. ValueError for another number of classes, integer input, NaN
    or infinity.

    >>> generator = torch.Generator().manual_seed(0)
    >>> logits = 3 * torch.randn(2000, 4, generator=generator)
    >>> key = fit(logits, logits.softmax(1).multinomial(1, generator=generator).squeeze(1), allowed=0.03)
    >>> len(terraced(logits, key).softmax(1).amax(1).unique()) < 25
    True
    """
    check_logits(logits)
    _check_classes(logits, len(key.group))
    group, borders, levels = (part.to(logits.device) for part in _tables(key.group, key.borders, key.shares))
    return _terraced(logits.detach().double(), group, borders, levels).to(single(logits.dtype))


def _check_classes(scores: Tensor, classes: int) -> None:
    if scores.shape[-1] != classes:
        raise ValueError(
            f"expected scores of {classes} classes, as the terraces were fitted to, but got {scores.shape[-1]}; fit "
            "them to this model"
        )


def _tables(
    group: Sequence[int], borders: Sequence[Sequence[float]], shares: Sequence[Sequence[Sequence[float]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Group of each class (K,), borders (G, B) and log-shares (G, B + 1, ranks + 1), the last that of all others."""
    most, rest = max(map(len, borders)), len(group) - len(shares[0][0])
    cuts = [[*own, *[NOWHERE] * (most - len(own))] for own in borders]
    levels = [[[*row, (1 - sum(row)) / rest] for row in [*own, *[own[-1]] * (most + 1 - len(own))]] for own in shares]
    double = torch.float64
    return (
        torch.tensor(group),
        torch.tensor(cuts, dtype=double).view(len(cuts), most),
        torch.tensor(levels, dtype=double).log(),
    )


def _terraced(z: Tensor, group: Tensor, borders: Tensor, levels: Tensor) -> Tensor:
    """Log-shares (..., K) for log-scores in double precision; NaN for a row that is not finite."""
    ranks = levels.shape[-1] - 1
    place, left = [], z
    for _ in range(max(ranks, 2)):
        place.append(left.argmax(-1, keepdim=True))
        left = left.scatter(-1, place[-1], -torch.inf)
    margin = z.gather(-1, place[0]) - z.gather(-1, place[1])
    mine = group[place[0].squeeze(-1)]
    interval = (borders[mine] <= margin).sum(-1)
    shares = levels[mine, interval]
    shown = shares[..., -1:].expand_as(z)
    for rank in range(ranks):
        shown = shown.scatter(-1, place[rank], shares[..., rank : rank + 1])
    return shown.where(z.isfinite().all(-1, keepdim=True), torch.nan)


class Terraces(Defense):
    """A few calibrated levels of confidence, with borders only where errors are. Costs no forward pass.

    `model` maps images to scores (N, K) and declares their kind by `output`, which is also what is shown; probabilities
    are read through their logarithm. group: of each class, which of the groups (0, 1, ...). borders: of each group,
    margins > 0 in rising order, in units of logits. shares: of each group and interval between borders the
    probabilities of the classes in the first places; the other classes share equally what is left. `Terraces.fit` finds
    them on held-out images. A service keeps them to itself, but nothing depends on their being secret.

    Works under `torch.export` for logits. A row of scores that is not finite is shown as NaN. Borders and levels stay
    in double precision in a module made half; they are no part of its `state_dict`: save the fit.

    >>> two = Terraces(nn.Flatten(), group=[0, 0, 0], borders=[[1.0]], shares=[[[0.6], [0.9]]])
    >>> two(torch.tensor([[4.0, 0.0, -3.0], [2.0, 1.5, 0.0]])).softmax(1)
    tensor([[0.9000, 0.0500, 0.0500],
            [0.6000, 0.2000, 0.2000]])
    """

    keeps_label = True
    group: Tensor
    borders: Tensor
    levels: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        group: Sequence[int],
        borders: Sequence[Sequence[float]],
        shares: Sequence[Sequence[Sequence[float]]],
    ) -> None:
        super().__init__(model)
        check_terraces(group, borders, shares)
        for name, part in zip(TABLES, _tables(group, borders, shares), strict=True):
            self.register_buffer(name, part, persistent=False)

    fit = staticmethod(fit)

    @classmethod
    def from_fit(cls, model: nn.Module, fit: TerraceFit) -> Self:
        """Protect a model with what `fit` found on its held-out scores."""
        return cls(model, group=fit.group, borders=fit.borders, shares=fit.shares)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the tables with the model, but never to a type that would round them."""
        exact = {name: getattr(self, name) for name in TABLES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in exact.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the kind that the model gives, in single precision at least."""
        scores = self.model(x)
        _check_classes(scores, len(self.group))
        z = as_log_scores(scores.double(), self.output)
        shown = _terraced(z, self.group, self.borders, self.levels)
        return from_log_scores(shown, self.output).to(single(scores.dtype))

    def extra_repr(self) -> str:
        borders = [[float(f"{b:.4g}") for b in own if b < NOWHERE] for own in self.borders.tolist()]
        places = self.levels.shape[-1] - 1
        return f"group={len(self.group)} classes in {len(borders)}, borders={borders}, shares={places} places"
