"""F11: does the shown margin jump where the label stays? Then the rule of the defense can be read off."""

import torch
from torch import Tensor

from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.subject import HALVINGS, Subject, between, percent, top_lead

LINES = 8
POINTS = 64
KEPT = 0.5
"""Share of a step that must be left after it was halved ten times: a slope would be a thousandth."""
TIMES = 5  # what a slope would leave
LEAST = (3, 2)  # jumps, on so many lines
ALIKE = 0.1  # by which sizes differ that count as one
VISIBLE = 0.05  # of the range of the shown margin along its line
TINY = 1e-3


def jumps(subject: Subject) -> Flag:
    """F11: 64 points on lines between images of different answers; each large step is halved ten times.

    What is left of a step after that is a jump; of a slope, about a thousandth. Raised by three jumps on two lines. A
    jump is at least half of its own first step, 5 % of what the margin varies along its line, and more than five times
    what the undefended margin does there (what is left of the median step, without the undefended model).
    """
    a, b = (rows[:LINES] for rows in subject.pairs)
    if len(a) < LEAST[1]:
        return not_judged("F11", "images with different answers")
    if not subject.deterministic:
        return not_judged("F11", "an answer that repeats: it changes between two calls with one batch (see F3)")
    if not getattr(subject.model, "rowwise", True):
        return not_judged("F11", "an answer that does not depend on the batch (see F2)")
    n = len(a)
    lines = torch.arange(n).repeat_interleave(POINTS - 1)
    low = (torch.arange(POINTS - 1) / (POINTS - 1)).repeat(n)
    high = (torch.arange(1, POINTS) / (POINTS - 1)).repeat(n)

    def ask(share: Tensor) -> tuple[Tensor, Tensor]:
        x = between(subject.task.images[a[lines]], subject.task.images[b[lines]], share.view(-1, 1, 1, 1))
        scores = subject.shown(x, a[lines])
        return top_lead(scores), scores.argmax(1)

    (left, label), (right, other) = ask(low), ask(high)
    before, kept = (right - left).abs(), label == other
    spans = [float(line.max() - line.min()) for line in left.view(n, -1)]
    visible = VISIBLE * torch.tensor(spans, dtype=left.dtype, device=left.device).repeat_interleave(POINTS - 1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        value, answer = ask(middle)
        # towards the half with the larger step
        first = (value - left).abs() >= (right - value).abs()
        high, right = torch.where(first, middle, high), torch.where(first, value, right)
        low, left = torch.where(first, low, middle), torch.where(first, left, value)
        kept &= answer == label
    after = (right - left).abs()
    slope = _by_line(after, n) if subject.raw is None else _true_step(subject, a[lines], b[lines], low, high)
    jump = kept & (after >= KEPT * before) & (after >= visible) & (after > TIMES * slope + TINY)
    sizes, where = after[jump], lines[jump]
    raised = len(sizes) >= LEAST[0] and len(set(where.tolist())) >= LEAST[1]
    figures: dict[str, float] = {"lines": n, "jumps": len(sizes), "lines_with_jumps": len(set(where.tolist()))}
    measured = (
        f"{len(sizes)} jumps of the shown margin without a change of label, on {len(set(where.tolist()))} of {n} lines"
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


def _by_line(steps: Tensor, lines: int) -> Tensor:
    """The median step of each line, for each of its steps."""
    return steps.view(lines, -1).median(1).values.repeat_interleave(POINTS - 1)


def _true_step(subject: Subject, a: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """By how much the undefended margin changes from one end to the other."""
    ends = subject.task.images[a], subject.task.images[b]
    left, right = (top_lead(subject.true(between(*ends, share.view(-1, 1, 1, 1)), a)) for share in (low, high))
    return (right - left).abs()


def _commonest(sizes: Tensor) -> Tensor:
    """The size that most are like; their median."""
    alike = (sizes[:, None] - sizes[None]).abs() <= ALIKE * sizes[:, None]
    return sizes[alike[alike.sum(1).argmax()]].median()
