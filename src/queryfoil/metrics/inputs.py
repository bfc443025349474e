"""What the user side is computed from: probabilities (N, K) and labels (N,), checked; float64."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def probabilities(scores: ArrayLike | Tensor, kind: str) -> Floats:
    """Probabilities (N, K) from scores of kind "logits", "log_probs" or "probs"; nothing is guessed.

    >>> probabilities([[0.0, 0.0]], "logits").tolist()
    [[0.5, 0.5]]
    """
    values = np.asarray(scores, dtype=np.float64)
    if kind == "probs":
        return values
    if kind not in ("logits", "log_probs"):
        raise ValueError(f"expected kind logits, log_probs or probs, but got {kind!r}")
    exps = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exps / exps.sum(axis=-1, keepdims=True), dtype=np.float64)


def checked(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> tuple[Floats, NDArray[np.int64]]:
    """Probabilities (N, K) and labels (N,) as arrays; ValueError unless they are that."""
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    if y.size and y.dtype.kind not in "iu":
        raise ValueError(f"expected integer labels, but got {y.dtype}")
    if p.ndim != 2 or y.shape != p.shape[:1] or not y.size:
        raise ValueError(f"expected probs (N, K) and labels (N,), N >= 1, but got {p.shape} and {y.shape}")
    checked_probs(p)
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"expected labels in 0..{p.shape[1] - 1}, but got {y.min()}..{y.max()}")
    return p, y


def checked_probs(probs: ArrayLike | Tensor) -> Floats:
    """Probabilities (N, K) as an array; ValueError unless they are that."""
    p = np.asarray(probs, dtype=np.float64)
    if p.ndim != 2 or not p.size:
        raise ValueError(f"expected probs (N, K), N >= 1 and K >= 1, but got {p.shape}")
    if not (np.isfinite(p).all() and p.min() >= 0 and np.abs(p.sum(1) - 1).max() < 1e-3):
        raise ValueError(
            "expected rows of probabilities that sum to 1, but got other values; "
            "turn logits into probabilities with probabilities(scores, 'logits') first"
        )
    return p


def top(probs: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> tuple[Floats, Bools]:
    """Confidence, the top probability (N,), and whether the top class is the label (N,).

    >>> confidence, correct = top([[0.8, 0.2], [0.7, 0.3]], [0, 1])
    >>> confidence.tolist(), correct.tolist()
    ([0.8, 0.7], [True, False])
    """
    p, y = checked(probs, labels)
    return p.max(1), p.argmax(1) == y
