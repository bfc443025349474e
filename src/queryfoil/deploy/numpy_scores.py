"""Scores in and out of a protection, with NumPy alone: a part of what `queryfoil export scores OUT.py` writes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1.1754943508222875e-38  # probability: that of single precision; its logarithm stands for that of 0


def log_scores(scores: NDArray[Any], given: str, classes: int) -> NDArray[Any]:
    """Log-scores (N, K), in single precision at least; NaN for what is no probability. ValueError for other arrays."""
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape[1] != classes:
        raise ValueError(f"expected scores (N, {classes}), as the protection was fitted to, but got {scores.shape}")
    if not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(f"expected floating-point scores, but got {scores.dtype}")
    scores = scores.astype(np.result_type(scores.dtype, np.float32), copy=False)
    if given == "probs":
        right = (scores >= 0) & (scores <= 1 + 1e-3)
        return np.where(right, np.log(np.where(right, np.maximum(scores, SMALLEST), 1)), np.nan)
    return np.where(scores == -np.inf, np.log(SMALLEST), scores) if given == "log_probs" else scores


def show(z: NDArray[Any], kind: str, dtype: Any) -> NDArray[Any]:
    """Log-scores (N, K) as the kind and type that is shown."""
    if kind != "logits":
        z = z - z.max(1, keepdims=True)
        terms = np.exp(z)
        total = terms.sum(1, keepdims=True)
        z = terms / total if kind == "probs" else z - np.log(total)
    return z.astype(dtype, copy=False)
