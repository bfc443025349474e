"""A reading fitted on a network of the attacker's own: what all the shown scores together tell about the raw margin.

A defense that hides the margin moves the best scores, and what it leaves of the others and of the confidence still
follows the raw margin. The attacker puts the same defense around a surrogate, of which he sees both sides, and
regresses the raw margin on features of the shown scores. The victim's raw scores are never needed.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from queryfoil.attacks.readings import _margin, _with_margin
from queryfoil.checks import require_positive

NEAREST = 9  # classes after the best whose distance to it is a feature
KNOTS = 24  # at which each of two curves may bend
DIGITS = 9  # of each weight


@dataclass(frozen=True)
class Leak:
    """The raw margin by a regression on all scores, fitted on a surrogate behind the same defense (see `fit_leak`).

    weights: numbers with commas between, a text that can stand in a plan: a constant; for the distance of each of the
    next classes, up to nine, to the best; for its log-odds; and for the bends of margin and log-odds at `spacing`,
    2 `spacing`, ... 24 `spacing`. spacing: > 0, in units of logits. A prediction p is shown as the margin
    (p + sqrt(p^2 + 4)) / 2, which rises with it and is above 0, so that the answer stays. ValueError for scores of
    another number of classes.

    >>> leak = Leak("0, 1" + 49 * ", 0")  # of two classes; predicts the margin
    >>> leak(torch.tensor([[1.5, 0.0]]))
    tensor([[2., 0.]])
    """

    weights: str = ""
    spacing: float = 0.5

    name: ClassVar[str] = "leak"

    def __post_init__(self) -> None:
        require_positive("spacing", self.spacing)
        if self.distances < 1 or self.distances > NEAREST or not all(map(math.isfinite, self.numbers)):
            raise ValueError(
                f"expected weights of leak as {_count(1)} to {_count(NEAREST)} finite numbers with commas between, "
                f"but got {self.weights[:40]!r}; take those of `attacks.leak.fit_leak`"
            )

    @property
    def numbers(self) -> list[float]:
        """The weights; none where the text is none of numbers."""
        try:
            return [float(part) for part in self.weights.split(",")]
        except ValueError:
            return []

    @property
    def distances(self) -> int:
        """How many classes after the best have a weight."""
        return len(self.numbers) - _count(0)

    def predict(self, scores: Tensor) -> Tensor:
        """The raw margin (N,) that scores (N, K) speak for, in double precision; it may be of either sign."""
        if min(scores.shape[1] - 1, NEAREST) != self.distances:
            classes = f"{self.distances + 1}" if self.distances < NEAREST else f"at least {NEAREST + 1}"
            raise ValueError(f"expected {classes} classes, for which leak was fitted, but got {scores.shape[1]}")
        weights = torch.tensor(self.numbers, dtype=torch.float64, device=scores.device)
        return (features(scores, self.spacing) * weights[1:]).sum(1) + weights[0]

    def __call__(self, scores: Tensor) -> Tensor:
        p = self.predict(scores)
        # the same quotient, where p + sqrt(p^2 + 4) would lose its digits
        return _with_margin(scores, torch.where(p > 0, p + (p * p + 4).sqrt(), 4 / ((p * p + 4).sqrt() - p)) / 2)


def features(scores: Tensor, spacing: float) -> Tensor:
    """What `Leak` weighs: (N, F), in double precision; no shift of the scores changes it.

    >>> features(torch.tensor([[1.0, 0.0]]), 0.5)[0, :5].tolist()  # distance, log-odds, bends of the margin
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    best = scores.double().sort(1, descending=True).values
    distance = best[:, :1] - best[:, 1:]
    odds = -distance.neg().logsumexp(1, keepdim=True)
    knots = spacing * torch.arange(1, KNOTS + 1, dtype=torch.float64, device=scores.device)
    bends = [(curve - knots).clamp_min(0) for curve in (distance[:, :1], odds)]
    return torch.cat([distance[:, :NEAREST], odds, *bends], 1)


def fit_leak(raw: Tensor, shown: Tensor, *, spacing: float = 0.5, ridge: float = 1e-3) -> Leak:
    """A reading from a surrogate's scores (N, K): `raw`, and `shown` by the defense, of the same images.

    Ridge regression of the raw margin on standardized features, in closed form; `ridge` > 0 is the penalty of a
    weight's square, relative to the mean square of an error. Log-probabilities do as well as logits. ValueError for
    scores of different shapes, K < 2, or of another kind.

    >>> from queryfoil import data, disguise, losses, models
    >>> images = data.load("fashion-mnist", "calibration").images[:300]
    >>> with torch.no_grad():
    ...     raw = models.load("fashion-resnext")(images)
    >>> leak = fit_leak(raw[:200], disguise(raw[:200]))
    >>> errors = leak.predict(disguise(raw[200:])) - losses.margin(raw[200:], raw[200:].argmax(1))
    >>> float(errors.abs().median()) < 0.5  # of margins about 6, hidden by up to 6
    True
    """
    for name, scores in (("raw", raw), ("shown", shown)):
        if scores.shape != raw.shape or scores.ndim != 2 or scores.shape[1] < 2 or len(scores) < 2:
            raise ValueError(
                f"expected raw and shown scores (N, K) of the same images, N >= 2 and K >= 2, but got {name} "
                f"{tuple(scores.shape)}"
            )
        if not scores.is_floating_point() or not bool(scores.isfinite().all()):
            raise ValueError(f"expected finite scores, but {name} has NaN, infinite or whole ones")
    require_positive("spacing", spacing)
    require_positive("ridge", ridge)
    x, y = features(shown, spacing), _margin(raw)
    mean, spread = x.mean(0), x.std(0)
    spread = torch.where(spread > 1e-9, spread, torch.inf)  # a feature that says nothing has weight 0
    z = (x - mean) / spread
    normal = z.T @ z / len(z) + ridge * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    weights = torch.linalg.solve(normal, z.T @ (y - y.mean()) / len(z)) / spread
    constant = y.mean() - mean @ weights
    return Leak(", ".join(f"{number:.{DIGITS}g}" for number in [float(constant), *weights.tolist()]), spacing)


def _count(distances: int) -> int:
    """Of weights, for so many distances: with the constant, the log-odds, and the bends of two curves."""
    return distances + 2 + 2 * KNOTS
