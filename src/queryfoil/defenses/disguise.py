"""AAA on logits: the same answer, a margin whose trend is locally reversed, a calibrated confidence.

Chen et al., "Adversarial Attack on Attackers" (NeurIPS 2022), section 4. For each row of logits z
with margin m0 (top minus second), the rewritten logits z' minimize

    |margin(z') - target(m0)| + beta |max softmax(z') - max softmax(z / T)|          (eq. 6)

where `target` is a sawtooth or a sine around attractors that lie tau apart (eq. 4 and 5). The objective
depends on z' only through its margin and its top probability, which gives the closed form of `_exact`;
`_adam` is the paper's own solver. Nothing here sees an image, a label or a network.
"""

import math

import torch
from torch import Tensor

from queryfoil.checks import is_real, lookup

ALPHA = {"linear": 1.0, "sine": 0.7}
"""The paper's reverse step of each curve."""

STEPS, LR = 100, 0.1
SMALLEST_SETTING = 1e-6  # of tau, temperature and lr: less than a float32 can tell apart in logits
MIN_MARGIN = 2e-5  # of the rewritten logits: a clear answer even in half precision
MIN_REST = 1e-5  # of the sum of exp(z'_j - z'_second) over the classes after the second
TWO_CLASSES = (
    "with two classes the confidence is a function of the margin, so AAA cannot both mislead an attacker and "
    "show a calibrated confidence; expect one to suffer"
)

UNREACHED = 1e13  # gap of a class whose exp(-factor * gap) is to count as zero for every factor ...
MIN_FACTOR = 1e-11  # ... from this one on
NEWTON_STEPS = 10


def disguise(
    logits: Tensor,
    *,
    curve: str = "linear",
    tau: float = 6.0,
    alpha: float | None = None,
    beta: float = 5.0,
    temperature: float = 1.0,
    solver: str = "exact",
    steps: int = STEPS,
    lr: float = LR,
) -> Tensor:
    """Rewrite logits (..., K), K >= 2, so that score-based query attacks are led astray.

    curve: "linear" (eq. 5, first line) or "sine" (second line).
    tau: period of the curve, > 0, in units of logits.
    alpha: reverse step, >= 0; None is the paper's (1 linear, 0.7 sine). Targets below zero (linear
        alpha > 1, sine alpha > 0.73 or so) are clipped to the smallest margin, a flat edge.
    beta: weight of the calibration term, >= 0.
    temperature: T > 0 of the confidence to be shown; `fit` finds it.
    solver: "exact" is the global minimum in closed form: keeps the label and the ranking (z_a > z_b
        gives z'_a >= z'_b, strictly for the top), breaks a tie for the top by the lower index, and
        shows a top logit of 0. "adam" is the paper's: `steps` Adam steps of size `lr` from z, which
        can flip labels near margin 0. `steps` and `lr` have no effect on "exact" and are refused.

    Each row is independent of the others. float16 and bfloat16 are computed in float32 and returned
    in their own type. ValueError for settings out of range, K < 2, integer input, NaN or infinity.

    >>> z = torch.tensor([[4.0, 0.0, -3.0]])
    >>> top2 = disguise(z, temperature=2.0).topk(2).values[0]
    >>> round(float(top2[0] - top2[1]), 3)  # target 2 x 3 - 4 = 2
    2.0
    """
    alpha = check_settings(curve, tau, alpha, beta, temperature, solver, steps, lr)
    check_logits(logits)
    z = logits.detach()
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if solver == "adam":
        out = _adam(z, curve, tau, alpha, beta, temperature, steps, lr)
    else:
        out = _exact(z, curve, tau, alpha, beta, temperature)
    return out.clamp_min(torch.finfo(logits.dtype).min).to(logits.dtype)


def check_settings(
    curve: str,
    tau: float,
    alpha: float | None,
    beta: float,
    temperature: float,
    solver: str,
    steps: int,
    lr: float,
) -> float:
    """ValueError for settings that make no sense; gives the alpha to use."""
    usual = lookup(ALPHA, curve, "curve")
    alpha = usual if alpha is None else alpha
    lookup({"exact": 0, "adam": 0}, solver, "solver")
    for name, value, low, strict in (
        ("tau", tau, 0.0, True),
        ("alpha", alpha, 0.0, False),
        ("beta", beta, 0.0, False),
        ("temperature", temperature, 0.0, True),
        ("steps", steps, 0, False),
        ("lr", lr, 0.0, True),
    ):
        if not is_real(value):
            raise ValueError(f"expected {name} as a number, but got {value!r}")
        if not math.isfinite(value) or value < low or (strict and value == low):
            raise ValueError(f"expected {name} {'>' if strict else '>='} 0 and finite, but got {value}")
        if strict and value < SMALLEST_SETTING:
            raise ValueError(f"expected {name} of at least {SMALLEST_SETTING:g}, but got {value}")
    if steps != int(steps):
        raise ValueError(f"expected steps as a whole number, but got {steps}")
    if solver == "exact" and (steps, lr) != (STEPS, LR):
        raise ValueError(
            f"steps and lr belong to solver='adam' and have no effect on 'exact', but got steps={steps}, "
            f"lr={lr}; leave them out"
        )
    return alpha


def check_logits(logits: Tensor) -> None:
    """ValueError unless the logits are floating point, finite and (..., K) with K >= 2."""
    if not logits.is_floating_point():
        raise ValueError(f"expected floating-point logits, but got {logits.dtype}")
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(f"expected logits (..., K) with K >= 2 classes, but got {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite()).sum())
        raise ValueError(f"expected finite logits, but {bad} of {logits.numel()} are NaN or infinite")


def target_margin(margin: Tensor, curve: str, tau: float, alpha: float) -> Tensor:
    """The margin to be shown for a raw margin >= 0 (eq. 4 and 5; half-open intervals by floor).

    >>> m = torch.tensor([1.0, 4.0, 6.1])
    >>> target_margin(m, "linear", 6.0, 1.0), target_margin(m, "sine", 6.0, 0.7)
    (tensor([ 5.0000,  2.0000, 11.9000]), tensor([4.6373, 0.3627, 6.5390]))
    """
    attractor = ((margin / tau).floor() + 0.5) * tau
    offset = margin - attractor
    if curve == "linear":
        return attractor - alpha * offset
    return margin - alpha * tau * torch.sin(math.pi * (1 - 2 * offset / tau))


def _exact(z: Tensor, curve: str, tau: float, alpha: float, beta: float, temperature: float) -> Tensor:
    """The global minimum of eq. 6 with sigma = max softmax; derivation in docs/exact-solver.md."""
    classes = z.shape[-1]
    top, first = z.max(-1, keepdim=True)
    second, runner_up = z.scatter(-1, first, -torch.inf).max(-1, keepdim=True)
    margin = top - second
    # how far each class after the second lies below it; the two leaders are put out of reach
    gap = (second - z).scatter(-1, first, UNREACHED).scatter(-1, runner_up, UNREACHED)
    target = target_margin(margin, curve, tau, alpha).clamp_min(MIN_MARGIN)
    # logit of the calibrated confidence p = max softmax(z / T), never through p itself
    logit_p = margin / temperature - _decay(gap, 1 / temperature).sum(-1, keepdim=True).log1p()
    m = _best_margin(target, logit_p, beta, math.log(classes - 1))
    if classes == 2:
        rest = (-m).expand_as(z)
    else:
        # the classes after the second share R = sum of exp(z'_j - z'_second); F is that of the raw gaps
        share = torch.expm1(m - logit_p).clamp(MIN_REST, classes - 2)
        terms = _decay(gap, 1.0)
        full = terms.sum(-1, keepdim=True)
        factor = _gap_factor(gap, terms, full, share, classes - 2)
        rest = -m - (full / share).log().clamp_min(0) - factor * gap
    return rest.scatter(-1, first, 0.0).scatter(-1, runner_up, -m)


def _decay(gap: Tensor, factor: Tensor | float) -> Tensor:
    """exp(-factor * gap) in a new tensor, but 1e-35 in place of less: denormal results are slow.

    Of torch's functions only those are used here whose result for an entry does not depend on its
    place in memory: exp is one, exp2 and sigmoid are not (their vector and scalar code differ in the last bit).
    """
    return (gap * -factor).clamp_min_(-80).exp_()


def _best_margin(target: Tensor, logit_p: Tensor, beta: float, spread: float) -> Tensor:
    """argmin over m of |m - target| + beta * distance of p to the top probabilities that m allows.

    Those lie between sigmoid(m - spread), the others tied with the second (spread = ln(K - 1)), and
    sigmoid(m), the others gone. Up to beta = 4 the margin always wins; above, four more candidates.
    """
    if beta <= 4:
        return target
    q = math.sqrt(1 - 4 / beta)
    r = math.log((1 + q) ** 2 * beta / 4)  # = ln((1 + q) / (1 - q)), also where q rounds to 1
    fixed = torch.tensor([r, spread - r], dtype=target.dtype, device=target.device)
    m = torch.cat([target, logit_p, logit_p + spread, fixed.expand(*target.shape[:-1], 2)], -1)
    m = m.clamp_min(MIN_MARGIN)
    p, highest, lowest = (1 / (1 + torch.exp(-x)) for x in (logit_p, m, m - spread))
    distance = (p - highest).clamp_min(0) + (lowest - p).clamp_min(0)
    best = ((m - target).abs() + beta * distance).argmin(-1, keepdim=True)
    return m.gather(-1, best)


def _gap_factor(gap: Tensor, terms: Tensor, full: Tensor, share: Tensor, others: int) -> Tensor:
    """The factor c in [0, 1] with sum exp(-c gap) = share, or 1 where the raw gaps leave more than that.

    The logarithm of the sum is convex in c and falls, so its tangents at 0 and at 1 both meet that of
    `share` left of the solution, and Newton's steps from there rise to it without passing it. `terms`
    are exp(-gap), and `full` is their sum; `terms` is used up.
    """
    total = torch.where(gap < UNREACHED, gap, 0).sum(-1, keepdim=True)
    from_zero = (others / share).log() * others / total
    from_one = 1 + (full / share).log() * full / (terms * gap).sum(-1, keepdim=True)
    from_one = torch.where(full > 1e-18, from_one, 0)  # else there is nothing left of the raw gaps to go by
    c = torch.maximum(from_zero.nan_to_num(1.0), from_one).clamp(MIN_FACTOR, 1)
    for _ in range(NEWTON_STEPS):
        terms = torch.mul(gap, -c, out=terms).clamp_min_(-80).exp_()
        left = terms.sum(-1, keepdim=True)
        slope = terms.mul_(gap).sum(-1, keepdim=True).clamp_min(1e-30)
        c = (c + (left / share).log() * left / slope).clamp(MIN_FACTOR, 1)
    return c


def _adam(
    z: Tensor, curve: str, tau: float, alpha: float, beta: float, temperature: float, steps: int, lr: float
) -> Tensor:
    """The paper's solver (Alg. 1), as released but with a sum over rows instead of a mean.

    # differs from the release: the mean scales each row's gradient by 1/B against Adam's eps, which
    # makes a row depend on its batch. The margin is that of the current top two; the probability is
    # that of the original top class.
    """
    with torch.inference_mode(False), torch.enable_grad():
        raw = z.clone()
        top2 = raw.topk(2, dim=-1)
        first = top2.indices[..., :1]
        target = target_margin(top2.values[..., 0] - top2.values[..., 1], curve, tau, alpha)
        p = (raw / temperature).softmax(-1).gather(-1, first).squeeze(-1)
        shown = raw.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([shown], lr=lr)
        for _ in range(int(steps)):
            leaders = shown.topk(2, dim=-1).values
            margin = leaders[..., 0] - leaders[..., 1]
            confidence = shown.softmax(-1).gather(-1, first).squeeze(-1)
            loss = (margin - target).abs().sum() + beta * (confidence - p).abs().sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return shown.detach()
