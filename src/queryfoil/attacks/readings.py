"""Readings: what an attacker who knows the defense makes of the scores before looking at them.

A reading is a function of scores (N, K), as logits or log-probabilities, to others of the same shape and order, so that
any attack with any loss can follow it.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from queryfoil.checks import require, require_positive

LEAST = 1e-6  # margin that a reading leaves, so that the answer stays the one that was given


class Reading(Protocol):
    """What `adaptive` puts between the scores and an attack."""

    name: ClassVar[str]

    def __call__(self, scores: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class InvertLinear:
    """Undo AAA-linear: the margin M of the interval with middle a was a + (a - M) / alpha.

    Exact for AAA's closed form, where calibration does not interfere; for alpha = 1 the curve is its own inverse.
    tau: the defense's period, > 0. alpha: its slope, in (0, 1], where intervals do not overlap.

    >>> InvertLinear(tau=6.0)(torch.tensor([[5.0, 0.0, -1.0]])).round(decimals=4)
    tensor([[ 1.,  0., -1.]])
    """

    tau: float = 6.0
    alpha: float = 1.0

    name: ClassVar[str] = "invert_linear"

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)
        require("alpha", self.alpha, "in (0, 1]", lambda v: 0 < v <= 1)

    def __call__(self, scores: Tensor) -> Tensor:
        margin = _margin(scores)
        middle = ((margin / self.tau).floor() + 0.5) * self.tau
        return _with_margin(scores, middle + (middle - margin) / self.alpha)


@dataclass(frozen=True)
class InvertDashed:
    """Undo DLD: of q, the margin within its interval, r = tau - q / h up to h tau, else (q - h tau) / (1 - h).

    tau: the defense's period, > 0. low_slope: its h, in (0, 1).

    >>> InvertDashed()(torch.tensor([[1.77, 0.0, -1.0]])).round(decimals=4)
    tensor([[ 0.1000,  0.0000, -1.0000]])
    """

    tau: float = 6.0
    low_slope: float = 0.3

    name: ClassVar[str] = "invert_dashed"

    def __post_init__(self) -> None:
        require_positive("tau", self.tau)
        require("low_slope", self.low_slope, "in (0, 1)", lambda v: 0 < v < 1)

    def __call__(self, scores: Tensor) -> Tensor:
        margin, h = _margin(scores), self.low_slope
        # M = L + h tau - h r lies in (L, L + h tau], M = L + h tau + (1 - h) r in (L + h tau, L + tau)
        start = ((margin / self.tau).ceil() - 1).clamp_min(0) * self.tau
        q = margin - start
        r = torch.where(q > h * self.tau, (q - h * self.tau) / (1 - h), self.tau - q / h)
        return _with_margin(scores, start + r.clamp(0, self.tau))


@dataclass(frozen=True)
class ScaleFree:
    """Every score by its place between the best (0) and the third (-1): no shift and no factor changes that.

    The margin becomes the loss of AutoAttack (Croce and Hein, ICML 2020), which sees through random factors. ValueError
    for two classes, which have no third.

    >>> ScaleFree()(torch.tensor([[4.0, 3.0, 2.0], [8.0, 6.0, 4.0]]))
    tensor([[ 0.0000, -0.5000, -1.0000],
            [ 0.0000, -0.5000, -1.0000]])
    """

    name: ClassVar[str] = "scale_free"

    def __call__(self, scores: Tensor) -> Tensor:
        if scores.shape[1] < 3:
            raise ValueError(f"expected at least 3 classes for the reading scale_free, but got {scores.shape[1]}")
        best = scores.topk(3, 1).values.double()
        width = (best[:, :1] - best[:, 2:]).clamp_min(1e-12)
        return ((scores.double() - best[:, :1]) / width).to(scores.dtype)


@dataclass(frozen=True)
class LogitSum:
    """The best score anew from the others: the sum over classes hardly varies, as weight decay keeps it so.

    Sees through any defense of logits that moves the best one alone; no parameter of it need be known.

    >>> LogitSum()(torch.tensor([[9.0, 1.0, -2.0, -3.0]]))
    tensor([[ 4.,  1., -2., -3.]])
    """

    name: ClassVar[str] = "logit_sum"

    def __call__(self, scores: Tensor) -> Tensor:
        # as a lead it may be of either sign: the constant sum is not known, and does not change comparisons
        top = scores.argmax(1, keepdim=True)
        return scores.scatter(1, top, scores.gather(1, top) - scores.sum(1, keepdim=True))


def _margin(scores: Tensor) -> Tensor:
    """The lead of the best class (N,), in double precision."""
    best = scores.topk(2, 1).values.double()
    return best[:, 0] - best[:, 1]


def _with_margin(scores: Tensor, margin: Tensor) -> Tensor:
    """Scores whose best class leads by a margin (N,), by moving it alone."""
    best = scores.topk(2, 1)
    top = best.values[:, 1:].double() + margin.clamp_min(LEAST)[:, None]
    return scores.scatter(1, best.indices[:, :1], top.to(scores.dtype))


READINGS: dict[str, type[Reading]] = {kind.name: kind for kind in (InvertLinear, InvertDashed, ScaleFree, LogitSum)}
