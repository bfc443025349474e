"""User side: does the confidence tell right answers from wrong ones?

A user who may refuse to decide (or ask a human) sorts the answers by confidence and trusts the upper ones. All of
this depends on the order of the confidences alone, never on their values; images of equal confidence count as if in
random order.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from queryfoil.metrics.inputs import Bools, Floats, checked_probs, top


class Levels(NamedTuple):
    """Distinct confidences from the highest down: how many images have each, and how many of these are right."""

    size: NDArray[np.int64]
    right: NDArray[np.int64]

    @property
    def wrong(self) -> NDArray[np.int64]:
        return self.size - self.right


def _levels(confidence: Floats, correct: Bools) -> Levels:
    order = np.argsort(confidence, kind="stable")[::-1]
    ordered = confidence[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    right = np.add.reduceat(correct[order].astype(np.int64), starts)
    return Levels(np.diff(np.append(starts, len(order))), right)


def auroc(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Chance that a right answer has a higher confidence than a wrong one, ties counting half. In [0, 1].

    The area under the ROC curve of telling right from wrong (Hendrycks and Gimpel, 2017); 0.5 is worth nothing. NaN
    where all answers are right, or all wrong.

    >>> auroc([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]], [0, 0, 1, 0])
    0.5
    """
    return _auroc(*top(probs, labels))


def _auroc(confidence: Floats, correct: Bools) -> float:
    found = _levels(confidence, correct)
    rights, wrongs = int(found.right.sum()), int(found.wrong.sum())
    below = wrongs - found.wrong.cumsum()
    return float((found.right * (below + found.wrong / 2)).sum() / (rights * wrongs)) if rights * wrongs else np.nan


def fpr_at_95_tpr(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Share of the wrong answers that are trusted where at least 95 % of the right ones are. In [0, 1].

    The threshold is the highest confidence that lets 95 % through, and all images at it pass. NaN where all answers are
    right, or all wrong.

    >>> fpr_at_95_tpr([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], [0, 1, 0, 1])
    0.5
    """
    return _fpr_at_95_tpr(*top(probs, labels))


def _fpr_at_95_tpr(confidence: Floats, correct: Bools) -> float:
    found = _levels(confidence, correct)
    rights, wrongs = int(found.right.sum()), int(found.wrong.sum())
    enough = 100 * found.right.cumsum() >= 95 * rights  # in whole numbers, as 0.95 is none in binary
    return float(found.wrong.cumsum()[enough.argmax()] / wrongs) if rights * wrongs else np.nan


def aupr_of_errors(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Area under precision and recall of finding the wrong answers by low confidence. In (0, 1].

    As average precision: the sum over thresholds of the rise in recall times the precision. A confidence that
    tells nothing gets the error rate, so compare only where that is the same. NaN where no answer is wrong.

    >>> aupr_of_errors([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], [0, 1, 0, 1])
    0.8333333333333333
    """
    return _aupr_of_errors(*top(probs, labels))


def _aupr_of_errors(confidence: Floats, correct: Bools) -> float:
    found = _levels(confidence, correct)
    wrong, size = found.wrong[::-1], found.size[::-1]
    wrongs = int(wrong.sum())
    return float((wrong * (wrong.cumsum() / size.cumsum())).sum() / wrongs) if wrongs else np.nan


class RiskCoverage(NamedTuple):
    """Share of the images that are answered, 1/N to 1, and the error rate among them: (N,) each."""

    coverage: Floats
    risk: Floats


def risk_coverage(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> RiskCoverage:
    """Error rate among the most confident images, for every number of them: the curve to plot.

    Of images of equal confidence, the mean over all orders.

    >>> risk_coverage([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]], [0, 0, 1, 1]).risk.round(3).tolist()
    [0.0, 0.25, 0.333, 0.5]
    """
    risk = _risks(*top(probs, labels))
    return RiskCoverage(np.arange(1, len(risk) + 1) / len(risk), risk)


def _risks(confidence: Floats, correct: Bools) -> Floats:
    found = _levels(confidence, correct)
    answered = np.arange(1, len(confidence) + 1)
    before, wrong_before = (np.repeat(v.cumsum() - v, found.size) for v in (found.size, found.wrong))
    inside = np.repeat(found.wrong, found.size) * (answered - before) / np.repeat(found.size, found.size)
    return np.asarray((wrong_before + inside) / answered, dtype=np.float64)


def aurc(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Area under `risk_coverage`: the mean of its risks (Geifman et al., 2019). In [0, 1], low is good.

    It is low for an accurate model whatever its confidence; `e_aurc` takes that out.

    >>> aurc([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], [0, 0, 1, 0])
    0.14583333333333331
    """
    return _aurc(*top(probs, labels))


def _aurc(confidence: Floats, correct: Bools) -> float:
    return float(_risks(confidence, correct).mean())


def e_aurc(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """`aurc` above that of the best order of the same answers, all errors last. In [0, 1), 0 is perfect.

    >>> round(e_aurc([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], [0, 0, 1, 0]), 4)
    0.0833
    >>> e_aurc([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], [0, 0, 0, 1])
    0.0
    """
    return _e_aurc(*top(probs, labels))


def _e_aurc(confidence: Floats, correct: Bools) -> float:
    answered = np.arange(1, len(correct) + 1)
    best = np.maximum(answered - correct.sum(), 0) / answered
    return _aurc(confidence, correct) - float(best.mean())


def risk_at(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor, coverage: float = 0.8) -> float:
    """Error rate among the most confident images, the fewest that are at least this share of all. In [0, 1].

    >>> risk_at([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.5, 0.5]], [0, 0, 1, 0, 1])
    0.25
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"expected a coverage above 0 and up to 1, but got {coverage}")
    return _risk_at(*top(probs, labels), coverage)


def _risk_at(confidence: Floats, correct: Bools, coverage: float = 0.8) -> float:
    answered = int(np.ceil(round(coverage * len(confidence), 6)))  # rounded, as 0.55 * 100 is above 55 in binary
    return float(_risks(confidence, correct)[max(answered, 1) - 1])


def confidence_levels(probs: ArrayLike | Tensor, tolerance: float = 1e-6) -> int:
    """How many values the top confidence takes on these images, 1 to N; a level holds what is within the tolerance.

    Rounded or stepped scores show few. It grows with the number of images: compare at the same N.

    >>> confidence_levels([[0.9, 0.1], [0.9000001, 0.0999999], [0.8, 0.2]])
    2
    """
    if not tolerance >= 0:
        raise ValueError(f"expected a tolerance of 0 or more, but got {tolerance}")
    confidence = np.sort(checked_probs(probs).max(1))
    count, start = 0, 0
    while start < len(confidence):
        start = int(np.searchsorted(confidence, confidence[start] + tolerance, side="right"))
        count += 1
    return count


def tied_share(probs: ArrayLike | Tensor) -> float:
    """Share of the images whose top confidence is exactly that of another one. In [0, 1].

    >>> tied_share([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    0.5
    """
    return float(tied(checked_probs(probs).max(1)).mean())


def tied(confidence: Floats) -> Bools:
    """Which of the confidences (N,) occur more than once."""
    _, index, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    return np.asarray(counts[index] > 1)


SELECTION: dict[str, Callable[[Floats, Bools], float]] = {
    "auroc": _auroc,
    "fpr_at_95_tpr": _fpr_at_95_tpr,
    "aupr_of_errors": _aupr_of_errors,
    "aurc": _aurc,
    "e_aurc": _e_aurc,
    "risk_at_80_coverage": _risk_at,
}
"""Figures of telling right from wrong as functions of confidence (N,) and whether right (N,)."""
