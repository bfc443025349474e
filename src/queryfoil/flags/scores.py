"""F5 and F10: is there something to follow in the scores, and does something in them lead the right way?"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from queryfoil.attacks.square import Square
from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.subject import Subject, lead, percent, top_lead
from queryfoil.metrics.ranks import spearman_of_images

LEVELS = 0.05  # distinct margins, of all
TIES = 0.01
FEWEST = 5  # tied images, of few
ZEROS = 0.2

POINTS = 16  # on a segment
SEGMENTS = 64
LEAST = 0.05
"""By how much the undefended margin must vary along a segment, of its largest value there, to show a trend."""
LEAK = 0.2
REVERSED = -0.2

FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "top score": lambda z, y: z.gather(1, y[:, None]).squeeze(1),
    "confidence": lambda z, y: z.softmax(1).gather(1, y[:, None]).squeeze(1),
    "cross-entropy": lambda z, y: z.log_softmax(1).gather(1, y[:, None]).squeeze(1),
    "sum of all scores": lambda z, y: z.sum(1),
    "second score less the mean of the rest": lambda z, y: _rest(z, y)[0],
    "mean of all but the best": lambda z, y: _rest(z, y)[1],
    "margin over the distance to the third (scale-free)": lambda z, y: _scale_free(z, y),
    "sum of all but the best, and the second (class sum)": lambda z, y: (
        z.sum(1) - z.gather(1, y[:, None]).squeeze(1) + _rest(z, y)[2]
    ),
}
"""What an attacker may look at in place of the margin: functions of scores (n, K) and the label (n,), giving (n,)."""


def degenerate_scores(subject: Subject) -> Flag:
    """F5: values that the margin takes, ties among them, and steps of Square that change nothing.

    Raised below a distinct margin for every 20 images, above 1 % (and five) that are tied with another's, or above
    20 % of steps that leave the loss as it is.
    """
    task = subject.task
    x, rows = subject.near
    margins = torch.cat([top_lead(subject.clean), top_lead(subject.shown(x, rows, query=1))])
    n = len(margins)
    values, counts = torch.unique(margins, return_counts=True)
    ties = int(counts[counts > 1].sum())
    tied, many = ties / n, ties >= FEWEST
    near = int(torch.isin(margins[len(subject.clean) :], values[counts > 1]).sum())
    square = Square()
    start = square.start(task)
    moved = square.propose(task, start, 0)
    before, after = (task.objective(subject.shown(sent, query=number)) for number, sent in ((2, start), (3, moved)))
    zeros = float((before == after).double().mean())
    found = []
    found += [f"{len(values)} distinct margins are below 5 %"] if len(values) < LEVELS * n else []
    found += [f"ties are above {percent(TIES)}"] if tied > TIES and many else []
    found += [f"steps that change nothing are above {percent(ZEROS)}"] if zeros > ZEROS else []
    measured = (
        f"{len(values)} distinct margins of {n} images, {percent(tied)} of them tied with another's "
        f"({near} of the {len(x)} images near the boundary); {percent(zeros)} of "
        f"{len(task.ids)} first steps of Square leave the loss as it is. Raised below 5 % distinct, above "
        f"{percent(TIES)} ties or {percent(ZEROS)} idle steps" + (f": {'; '.join(found)}" if found else "")
    )
    return judged("F5", bool(found), measured, images=n, distinct=len(values), tied=tied, zero_steps=zeros)


def trend(subject: Subject) -> Flag:
    """F10: along segments within the ball, how the shown margin and other features go with the undefended margin.

    Segments lead from images to Square's first proposals; each point is a query of its own. Rank correlations
    (Spearman), averaged over the segments along which the undefended margin varies. Raised where the shown margin's is
    below -0.2, or a feature's is stronger by more than 0.2.
    """
    if subject.raw is None:
        return not_judged("F10", "the undefended model; pass raw=")
    part = subject.first(SEGMENTS)
    task = part.task
    labels = part.true(task.images).argmax(1)
    end = Square().start(task)
    steps = torch.linspace(0, 1, POINTS)
    points = [task.images + step * (end - task.images) for step in steps.tolist()]
    raw = [part.true(x) for x in points]
    shown = [part.shown(x, query=i + 1) for i, x in enumerate(points)]  # an attacker has no draw twice
    true = torch.stack([lead(z, labels) for z in raw], 1).cpu().numpy()  # (n, POINTS)
    varies = np.ptp(true, axis=1) > LEAST * np.abs(true).max(1)
    if varies.sum() < 8:
        return not_judged("F10", f"8 images along whose segments the undefended margin varies, of {len(varies)}")
    margin = _correlation(torch.stack([lead(z, labels) for z in shown], 1), true, varies)
    found = {
        name: _correlation(torch.stack([feature(z.double(), labels) for z in shown], 1), true, varies)
        for name, feature in FEATURES.items()
        if shown[0].shape[1] > 2 or "third" not in name
    }
    best = max(found, key=lambda name: abs(found[name]))
    strongest = abs(found[best])
    reversed_, leaks = margin < REVERSED, strongest > abs(margin) + LEAK
    verdict = (["reversed: search in the opposite direction"] if reversed_ else []) + (
        [f"leaked: look at the {best}"] if leaks else []
    )
    measured = (
        f"along {int(varies.sum())} segments in the ball, the shown margin has a mean rank correlation of "
        f"{margin:+.2f} with the undefended one; of other features, the {best} has the strongest, {found[best]:+.2f}"
        + f". Raised below {REVERSED:g}, or by a feature stronger by {LEAK:g}"
        + (f" – {'; '.join(verdict)}" if verdict else "")
    )
    return judged(
        "F10", reversed_ or leaks, measured,
        segments=int(varies.sum()), margin=margin, strongest_feature=strongest,
        **{f"rho of {name}": value for name, value in found.items()},
    )  # fmt: skip


def _correlation(values: Tensor, true: np.ndarray, kept: np.ndarray) -> float:
    """Mean over segments of the rank correlation; 0 for a segment along which nothing changes."""
    return float(np.mean(spearman_of_images(values.double().cpu().numpy()[kept], true[kept])))


def _rest(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the scores but the label's: the best less the mean of the rest, the mean, and the best (n,)."""
    others = z.scatter(1, labels[:, None], -torch.inf)
    second = others.amax(1)
    total = z.sum(1) - z.gather(1, labels[:, None]).squeeze(1)
    classes = z.shape[1]
    rest = (total - second) / max(classes - 2, 1)
    return second - rest, total / (classes - 1), second


def _scale_free(z: Tensor, labels: Tensor) -> Tensor:
    best = z.topk(3, 1).values
    return lead(z, labels) / (best[:, 0] - best[:, 2]).clamp_min(1e-12)
