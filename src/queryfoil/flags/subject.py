"""The model that is checked, and how it is asked: uncounted, image by image, with draws that can be repeated."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from queryfoil import losses, rng
from queryfoil.oracle import Model, answers, quantize
from queryfoil.task import Task

PAIRS, MOVE = 1 << 26, 1 << 27  # names of the draws, far from those of attacks
BISECTION = 1 << 10  # number of the first query of `near`, far from those of other questions
HALVINGS = 10
NEAR = 0.5
"""Undefended margin below which an image is near the boundary."""
ROUNDING = 1e-4
"""Of a score's size (or of 1): what the order of a sum may change."""


@dataclass(frozen=True)
class Subject:
    """A model, the undefended one under it (or None), and a task whose images it is asked about."""

    model: Model
    raw: Model | None
    task: Task

    def shown(self, x: Tensor, rows: Tensor | None = None, query: int = 0) -> Tensor:
        """Scores (n, K) of images x (n, C, H, W), as draws for the task's images `rows` (n,) at this query number.

        Give each question a number of its own, unless it is the draw that should be the same: an attacker has no
        draw twice.
        """
        return self._ask(self.model, x, rows, query)

    def true(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Undefended scores (n, K)."""
        assert self.raw is not None
        return self._ask(self.raw, x, rows, 0)

    def _ask(self, model: Model, x: Tensor, rows: Tensor | None, query: int) -> Tensor:
        if not len(x):
            return self.clean[:0]
        ids = self.task.ids if rows is None else self.task.ids[rows]
        return answers(model, quantize(x), ids, torch.full_like(ids, query), self.task.seed)

    @cached_property
    def clean(self) -> Tensor:
        """Shown scores of the images (N, K)."""
        return self.shown(self.task.images)

    @cached_property
    def repeats(self) -> bool:
        """Whether the same images get the same answers twice in a row, at one query number: of chance, in one draw."""
        return bool(same(self.clean, self.shown(self.task.images)).all())

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Images in pairs (P,), (P,) with different shown labels, at random."""
        n = len(self.task.ids)
        other = rng.integers(self.task.seed, self.task.ids, 0, PAIRS, n).squeeze(1)
        label = self.clean.argmax(1)
        kept = (label != label[other]).nonzero().squeeze(1)
        return kept, other[kept]

    @cached_property
    def near(self) -> tuple[Tensor, Tensor]:
        """Images near the boundary of the undefended model (of the shown one, without it), and the rows they are of.

        On the segments between `pairs`, by bisection of the label.
        """
        a, b = self.pairs
        if not len(a):
            return self.task.images[:0], a

        def label_of(x: Tensor, query: int) -> Tensor:
            return (self.shown(x, a, query) if self.raw is None else self.true(x, a)).argmax(1)

        ends = self.task.images[a], self.task.images[b]
        label = label_of(ends[0], BISECTION)
        low, high = torch.zeros(len(a), 1, 1, 1), torch.ones(len(a), 1, 1, 1)
        for halving in range(HALVINGS):
            middle = (low + high) / 2
            kept = (
                (label_of(between(*ends, middle.to(ends[0])), BISECTION + 1 + halving) == label).cpu().view(-1, 1, 1, 1)
            )
            low, high = torch.where(kept, middle, low), torch.where(kept, high, middle)
        return between(*ends, low.to(ends[0])), a

    def first(self, n: int) -> "Subject":
        """The same on the first images."""
        return replace(self, task=self.task.rows(slice(0, n)))


def between(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """8-bit images on the segments from a to b."""
    return quantize((1 - share) * a + share * b)


def lead(scores: Tensor, labels: Tensor) -> Tensor:
    """The margin of given classes (N,), in double precision."""
    return losses.margin(scores.double(), labels)


def top_lead(scores: Tensor) -> Tensor:
    """The margin of the answer (N,), in double precision."""
    best = scores.double().topk(2, 1).values
    return best[:, 0] - best[:, 1]


def same(a: Tensor, b: Tensor) -> Tensor:
    """Whether two answers to each image are the same, up to rounding (N,)."""
    size = torch.maximum(a.abs(), b.abs()).amax(1).clamp_min(1)
    return (a - b).abs().amax(1) <= ROUNDING * size


def percent(share: float) -> str:
    """A share in percent, short.

    >>> percent(0.125), percent(1.0)
    ('12.5 %', '100 %')
    """
    return f"{100 * share:.3g} %"
