"""F11: does the shown margin jump where the label stays? Then the rule of the defense can be read off."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.subject import HALVINGS, Subject, between, percent, same, top_lead
from queryfoil.oracle import SMALLEST

LINES = 8
POINTS = 64
KEPT = 0.5
"""Share of a step that must be left after it was halved ten times: a slope would be a thousandth."""
TIMES = 5  # what a slope would leave
LEAST = (3, 2)  # jumps, on so many lines
ALIKE = 0.1  # by which sizes differ that count as one
VISIBLE = 0.05  # of the range of the shown margin along its line
TINY = 1e-3
HIDDEN = math.log(SMALLEST) + TINY
"""Log-probability up to which a class is one that was shown with a probability of 0."""

UNSTABLE = "an answer that repeats: images get another one when they are asked about again (see F3)"


class Shown(NamedTuple):
    """What is shown at points: margin, label, and whether the margin is one, as the second class is shown too (n,)."""

    margin: Tensor
    label: Tensor
    real: Tensor


def jumps(subject: Subject) -> Flag:
    """F11: 64 points on lines between images of different answers; each large step is halved ten times.

    What is left of a step after that is a jump; of a slope, about a thousandth. Raised by three jumps on two lines. A
    jump is at least half of its own first step, 5 % of what the margin varies along its line, and more than five times
    what the undefended margin does there (what is left of the median step, without the undefended model).

    Only steps with a margin count: where all classes but one are shown with a probability of 0, there is none, and what
    looks like one is the logarithm that stands for 0. Not judged where points get another answer when asked again.
    """
    a, b = (rows[:LINES] for rows in subject.pairs)
    if len(a) < LEAST[1]:
        return not_judged("F11", "images with different answers")
    if not subject.repeats:
        return not_judged("F11", UNSTABLE)
    if not getattr(subject.model, "rowwise", True):
        return not_judged("F11", "an answer that does not depend on the batch (see F2)")
    n = len(a)
    lines = torch.arange(n).repeat_interleave(POINTS - 1)
    low = (torch.arange(POINTS - 1) / (POINTS - 1)).repeat(n)
    high = (torch.arange(1, POINTS) / (POINTS - 1)).repeat(n)
    queries = itertools.count(1)

    def ask(share: Tensor) -> Tensor:
        x = between(subject.task.images[a[lines]], subject.task.images[b[lines]], share.view(-1, 1, 1, 1))
        return subject.shown(x, a[lines], next(queries))

    first = ask(low)
    if not bool(same(first, ask(low)).all()):
        return not_judged("F11", UNSTABLE)
    start, end = _shown(subject, first), _shown(subject, ask(high))
    left, right, label = start.margin, end.margin, start.label
    real = start.real & end.real
    kept = (label == end.label) & real
    if len(set(lines[real].tolist())) < LEAST[1]:
        return not_judged(
            "F11",
            f"a margin on {LEAST[1]} lines: nearly everywhere all classes but one are shown with a probability of 0",
        )
    before = (right - left).abs()
    visible = VISIBLE * _spans(left.where(start.real, torch.nan), n)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = _shown(subject, ask(middle))
        # towards the half with the larger step
        nearer = (found.margin - left).abs() >= (right - found.margin).abs()
        high, right = torch.where(nearer, middle, high), torch.where(nearer, found.margin, right)
        low, left = torch.where(nearer, low, middle), torch.where(nearer, left, found.margin)
        kept &= (found.label == label) & found.real
    after = (right - left).abs()
    slope = (
        _by_line(after.where(real, torch.nan), n)
        if subject.raw is None
        else _true_step(subject, a[lines], b[lines], low, high)
    )
    jump = kept & (after >= KEPT * before) & (after >= visible) & (after > TIMES * slope + TINY)
    sizes, where = after[jump], lines[jump]
    raised = len(sizes) >= LEAST[0] and len(set(where.tolist())) >= LEAST[1]
    figures: dict[str, float] = {"lines": n, "jumps": len(sizes), "lines_with_jumps": len(set(where.tolist()))}
    hidden = int((~real).sum())
    figures |= {"steps": len(lines), "steps_without_a_margin": hidden}
    measured = (
        f"{len(sizes)} jumps of the shown margin without a change of label, on {len(set(where.tolist()))} of {n} lines"
        + (f" ({hidden} of {len(lines)} steps left out, as only one class is shown there)" if hidden else "")
    )
    if raised:
        size = _commonest(sizes)
        alike = (sizes - size).abs() <= ALIKE * size
        upper = torch.maximum(left, right)[jump][alike].min()
        share = float(alike.double().mean())
        figures |= {"size": float(size), "share_of_that_size": share, "lowest_upper_limit": float(upper)}
        measured += f"; {percent(share)} of them are of about {float(size):.3g}, the lowest from {float(upper):.3g}"
        if share >= 0.5:
            figures["tau_if_linear"] = float(size) / 2
            measured += f": were it AAA-linear with alpha 1, tau would be about {float(size) / 2:.3g}"
        else:
            measured += ": no one size, as where a map has several branches"
    return judged("F11", raised, f"{measured}. Raised from {LEAST[0]} jumps on {LEAST[1]} lines", **figures)


def _shown(subject: Subject, scores: Tensor) -> Shown:
    """What scores (n, K) show."""
    real = torch.ones_like(scores[:, 0], dtype=torch.bool)
    if getattr(subject.model, "output", "logits") != "logits":
        real = scores.topk(2, 1).values[:, 1] > HIDDEN
    return Shown(top_lead(scores), scores.argmax(1), real)


def _spans(margins: Tensor, lines: int) -> Tensor:
    """By how much the margins that are there (not NaN) vary along each line, for each of its steps."""
    there = margins.view(lines, -1)
    most, least = there.nan_to_num(nan=-torch.inf).amax(1), there.nan_to_num(nan=torch.inf).amin(1)
    return (most - least).repeat_interleave(POINTS - 1)


def _by_line(steps: Tensor, lines: int) -> Tensor:
    """The median of each line's steps that are there (not NaN), for each of its steps."""
    return steps.view(lines, -1).nanmedian(1).values.repeat_interleave(POINTS - 1)


def _true_step(subject: Subject, a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """By how much the undefended margin changes from one end to the other."""
    ends = subject.task.images[a], subject.task.images[b]
    left, right = (top_lead(subject.true(between(*ends, share.view(-1, 1, 1, 1)), a)) for share in (low, high))
    return (right - left).abs()


def _commonest(sizes: Tensor) -> Tensor:
    """The size that most are like; their median."""
    alike = (sizes[:, None] - sizes[None]).abs() <= ALIKE * sizes[:, None]
    return sizes[alike[alike.sum(1).argmax()]].median()
