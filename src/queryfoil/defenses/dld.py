"""DLD, the dashed line defense: one shown margin belongs to several raw ones (Fu, Guo and Luo, AISTATS 2026).

The raw margin m = L + r lies in the interval [L, L + tau), L a multiple of tau. What is shown lies on one of two lines:

    low:   L + h tau - h r          (falls from L + h tau to L: the trend is reversed)
    high:  L + h tau + (1 - h) r    (rises from L + h tau to L + tau: the trend is kept)

Each interval is cut into dashes of width s tau; of each the last share rho is high, the rest low. Nothing here sees an
image, a label or a network.
"""

import torch
from torch import Tensor, nn

from queryfoil.checks import require, require_positive
from queryfoil.defenses.defense import Defense
from queryfoil.defenses.disguise import MIN_MARGIN, check_logits
from queryfoil.defenses.scores import log_scores, show, single

END = 1e-9  # of a dash: nearer to an end of it, rounding would decide; the ends are low


def dashed(
    logits: Tensor,
    *,
    tau: float = 6.0,
    low_slope: float = 0.3,
    step: float = 0.04,
    high_ratio: float = 0.5,
    canonical: bool = True,
) -> Tensor:
    """Rewrite logits (..., K), K >= 2, so that the margin does not tell whether a step was good.

    tau: length of the intervals, > 0, in units of logits.
    low_slope: h in (0, 1); the low line falls by h, the high line rises by 1 - h.
    step: s in (0, 1], the width of a dash in units of tau.
    high_ratio: rho in [0, 1], the share of a dash that is high.
    canonical: shift each row so that the top logit is 0. With False only the top logit is rewritten, as in the release,
        and the sum of the logits, which networks trained with weight decay hardly vary, tells the raw margin. The
        differences of the other logits stay raw in either case.

    The label is kept: a tie for the top goes to the lower index, whose margin is h tau; margins under 2e-5 are shown as
    2e-5; and where logits are so large that rounding would eat the margin, the top is the next number above the second.
    Each row is independent of the others; computed in double precision, returned in the type that came. ValueError for
    settings out of range, K < 2, integer input, NaN or infinity.

    >>> dashed(torch.tensor([[4.4, 0.0, -3.0], [0.2, 0.0, 0.0]]))  # r / tau = 0.733 is low, 0.033 high
    tensor([[ 0.0000, -0.4800, -3.4800],
            [ 0.0000, -1.9400, -1.9400]])
    """
    check_settings(tau, low_slope, step, high_ratio)
    check_logits(logits)
    z = logits.detach().double()
    top = z.argmax(-1, keepdim=True)
    best, second = z.gather(-1, top), z.scatter(-1, top, -torch.inf).amax(-1, keepdim=True)
    shown = torch.maximum(best + _shift(best - second, tau, low_slope, step, high_ratio), second + MIN_MARGIN)
    z = z.scatter(-1, top, shown)
    return show(z - shown if canonical else z, top, "logits", logits.dtype)


def dashed_margin(
    margin: Tensor, *, tau: float = 6.0, low_slope: float = 0.3, step: float = 0.04, high_ratio: float = 0.5
) -> Tensor:
    """The margin that `dashed` shows for a raw margin >= 0.

    >>> dashed_margin(torch.tensor([0.0, 0.1, 0.2, 5.98, 6.1]))
    tensor([1.8000, 1.7700, 1.9400, 5.9860, 7.7700])
    """
    check_settings(tau, low_slope, step, high_ratio)
    m = margin.double()
    return (m + _shift(m, tau, low_slope, step, high_ratio)).to(margin.dtype)


def check_settings(tau: float, low_slope: float, step: float, high_ratio: float) -> None:
    """ValueError for settings that make no sense."""
    require_positive("tau", tau)
    # with 0 the low line would end in a tie, with 1 the high line would be flat
    require("low_slope", low_slope, "> 0 and < 1", lambda h: 0 < h < 1)
    require("step", step, "> 0 and <= 1, in units of tau", lambda s: 0 < s <= 1)
    require("high_ratio", high_ratio, "from 0 to 1", lambda rho: 0 <= rho <= 1)


def _shift(margin: Tensor, tau: float, low_slope: float, step: float, high_ratio: float) -> Tensor:
    """What is added to a raw margin."""
    rest = (margin - (margin / tau).floor() * tau).clamp_min(0)
    # differs from the release: it sums up the ends of the dashes, whose rounding errors add up; the fraction has none
    dash = rest / tau / step
    place = dash - dash.floor()
    high = (place > 1 - high_ratio + END) & (place < 1 - END)
    return low_slope * (tau - rest) - torch.where(high, 0, rest)


class DLD(Defense):
    """The dashed line defense: same answer, a margin that tells little of the trend. Costs no forward pass.

    The arguments are those of `dashed`; `canonical` makes no difference to probabilities, which have no offset.
    Probabilities are protected through their logarithm. Half precision is returned as single. No aim at
    calibration. Who knows tau and h reads the raw margin off what is shown.

    >>> DLD(nn.Flatten(), tau=2.0)(Tensor([[5.0, 4.0, 0.0]]))  # the raw margin of 1 is shown as 0.3
    tensor([[ 0.0000, -0.3000, -4.3000]])
    """

    keeps_label = True

    def __init__(
        self,
        model: nn.Module,
        *,
        tau: float = 6.0,
        low_slope: float = 0.3,
        step: float = 0.04,
        high_ratio: float = 0.5,
        canonical: bool = True,
    ) -> None:
        super().__init__(model)
        check_settings(tau, low_slope, step, high_ratio)
        self.tau, self.low_slope, self.step, self.high_ratio = (
            float(tau),
            float(low_slope),
            float(step),
            float(high_ratio),
        )
        self.canonical = canonical

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the kind that the model gives."""
        scores = self.model(x)
        z = log_scores(scores, self.output)
        rewritten = dashed(
            z,
            tau=self.tau,
            low_slope=self.low_slope,
            step=self.step,
            high_ratio=self.high_ratio,
            canonical=self.canonical,
        )
        return show(rewritten, z.argmax(-1, keepdim=True), self.output, single(scores.dtype))
