"""User side: proper scores of the probabilities, lowest in expectation for the true ones."""

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from queryfoil.metrics.inputs import checked, top


def nll(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Negative log-likelihood, natural logarithm, mean over images; infinite where p_y = 0.

    >>> round(nll([[0.5, 0.5]], [0]), 4)
    0.6931
    """
    p, y = checked(probs, labels)
    with np.errstate(divide="ignore"):
        return float(-np.log(p[np.arange(len(y)), y]).mean())


def brier(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Multi-class Brier score in [0, 2]: mean over images of the sum over classes of (p_k - [k = y])^2.

    >>> brier([[0.5, 0.5]], [0])
    0.5
    """
    p, y = checked(probs, labels)
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean())


def top_label_brier(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Mean of (top probability - [top class is the label])^2, in [0, 1]: what some call the Brier score.

    >>> round(top_label_brier([[0.8, 0.2], [0.8, 0.2]], [0, 1]), 2)
    0.34
    """
    confidence, correct = top(probs, labels)
    return float(((confidence - correct) ** 2).mean())
