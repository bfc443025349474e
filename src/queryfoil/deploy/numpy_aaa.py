"""AAA, solved exactly, with NumPy alone: `queryfoil export scores OUT.py` writes this file with a fit's parameters."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryfoil.deploy.numpy_scores import log_scores, show

GIVEN, SHOWN = "logits", "logits"  # kinds of the scores that come, and of those that are shown
CLASSES = 10
CURVE = "linear"  # or "sine"
TAU, ALPHA, BETA, TEMPERATURE = 6.0, 1.0, 5.0, 1.0

MIN_MARGIN = 2e-5  # of what is shown
MIN_REST = 1e-5  # of the sum of exp(z'_j - z'_second) over the classes after the second
MIN_FACTOR = 1e-11  # of gaps, the largest of which are to count as nothing even by it
NO_GAP = -1e-30  # in place of 0
NEWTON_STEPS = 7


def protect(scores: NDArray[Any]) -> NDArray[Any]:
    """Scores (N, K), floating-point, of the kind GIVEN, as they are shown (N, K), of the kind SHOWN.

    The label of each row stays, and each row is independent of the others. Half precision gives single. A row that is
    not finite, or has a probability outside [0, 1], is shown as NaN. ValueError for another number of classes or
    dimensions, or scores that are not floating-point.
    """
    with np.errstate(all="ignore"):  # what rows that are not finite would tell of
        z = log_scores(scores, GIVEN, CLASSES)
        return show(disguise(z, CURVE, TAU, ALPHA, BETA, TEMPERATURE), SHOWN, z.dtype)


def disguise(z: NDArray[Any], curve: str, tau: float, alpha: float, beta: float, temperature: float) -> NDArray[Any]:
    """Log-scores (N, K) with a misleading margin and a calibrated confidence; NaN for a row that is not finite."""
    rows, classes = np.arange(len(z)), z.shape[1]
    least = -float(np.finfo(z.dtype).max)
    first = z.argmax(1)
    left = z.copy()
    left[rows, first] = -np.inf
    runner_up = left.argmax(1)
    second = left[rows, runner_up][:, None]
    below = np.clip(z - second, least, NO_GAP)  # minus the gaps of the classes after the second
    below[rows, first] = below[rows, runner_up] = NO_GAP
    margin = z[rows, first][:, None] - second
    target = np.maximum(_target(margin, curve, tau, alpha), MIN_MARGIN)
    # logit of the calibrated confidence, from 1 + the sum over the classes after the second
    logit_p = margin / temperature - np.log(np.exp(below / temperature).sum(1, keepdims=True) - 1)
    shown = np.broadcast_to(-_margin(target, logit_p, beta, math.log(classes - 1)), z.shape).copy()
    if classes > 2:
        share = np.log(np.clip(np.exp(-shown[:, :1] - logit_p) - 1, MIN_REST, classes - 2))
        shown += _rest(below, rows, first, runner_up, share, classes - 2)
    shown[rows, first] = 0
    shown[~np.isfinite(z).all(1)] = np.nan
    np.maximum(shown, least, out=shown)
    return shown


def _target(margin: NDArray[Any], curve: str, tau: float, alpha: float) -> NDArray[Any]:
    """The margin (N, 1) to be shown for a margin."""
    periods = np.floor(margin / tau)
    attractor = (periods + 0.5) * tau
    linear, sine = alpha * (attractor - margin), alpha * tau * np.sin(2 * math.pi * (margin / tau - periods))
    target: NDArray[Any] = attractor + linear if curve == "linear" else margin + sine
    return target


def _margin(target: NDArray[Any], logit_p: NDArray[Any], beta: float, spread: float) -> NDArray[Any]:
    """The margin (N, 1) nearest to the target, as far as the confidence that it leaves is worth more."""
    if beta <= 4:
        return target
    q = math.sqrt(1 - 4 / beta)
    r = math.log((1 + q) ** 2 * beta / 4)  # where the logistic function is as steep as 1 / beta
    wide = np.maximum(target, np.minimum(logit_p, r))
    narrow = np.minimum(np.maximum(np.maximum(logit_p, -r) + spread, MIN_MARGIN), wide)
    gain = 1 / (1 + np.exp(spread - wide)) - 1 / (1 + np.exp(spread - narrow))
    best: NDArray[Any] = np.where(beta * gain > wide - narrow, narrow, wide)
    return best


def _rest(
    below: NDArray[Any],
    rows: NDArray[Any],
    first: NDArray[Any],
    runner_up: NDArray[Any],
    share: NDArray[Any],
    others: int,
) -> NDArray[Any]:
    """Minus the gaps (N, K), by a factor and lowered by a shift, such that their exponentials sum to exp(share).

    The logarithm of the sum is convex in the factor and falls, so Newton's steps from its tangent at 0 rise to the
    solution without passing it. The second class stays where it is.
    """
    # as a factor of at least MIN_FACTOR, so the leaders never count
    c = np.clip((share - math.log(others)) / (below / others).sum(1, keepdims=True), MIN_FACTOR, 1)
    below[rows, first] = below[rows, runner_up] = -np.finfo(below.dtype).max
    for _ in range(NEWTON_STEPS):
        full, terms = _log_sum(c * below)
        slope = (terms * below).sum(1, keepdims=True) / terms.sum(1, keepdims=True)
        c = np.clip(c - (full - share) / slope, MIN_FACTOR, 1)
    scaled = c * below
    shown: NDArray[Any] = scaled - np.maximum(_log_sum(scaled)[0] - share, 0)
    shown[rows, runner_up] = 0
    return shown


def _log_sum(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logarithm of the sum of exponentials (N, 1), and the exponentials by a common factor (N, K)."""
    top = x.max(1, keepdims=True)
    terms = np.exp(x - top)
    return top + np.log(terms.sum(1, keepdims=True)), terms
