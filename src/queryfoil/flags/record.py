"""One attack as it was recorded: what the flags of results are judged from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryfoil.attacks.label_reading import LabelAlone

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Record:
    """An attack on one model behind one defense.

    model, defense: names (or anything that tells them apart); defense "" is none. dataset: of the images.
    attack, hyper, accept, loss (None: it sees labels alone), norm, eps, targeted, seed, budget: as it was run; hyper
        has all settings, the rule's too.
    ids, queries, fooled_at: (N,) int64, `metrics.NEVER` where never.
    deterministic: what the model declares. confirmed: (N,) share of fresh queries that a success survives, NaN where
        there is none or it was not asked; None if it never was.
    adversarial, clean: (N, C, H, W) uint8, the images of successes as sent, and as they were; None if not there.
    ledger: (N,) queries of each image as they were sent, and (N,) how many of them repeated an earlier one; asked: how
        many images the model was given; None if nobody counted.
    saved: (N,) whether a success still is one after its image was saved in 8 bits; None if not asked.
    of_defense: the hyper-parameters that are the defense's, where it has them: the threshold of a rule, and the tau of
        a reading, unless the attacker states it, or a tau from which it follows.
    """

    label: str
    model: str
    defense: str
    dataset: str
    attack: str
    hyper: dict[str, Any]
    accept: str
    loss: str | None
    norm: str
    eps: float
    targeted: bool
    seed: int
    budget: int
    ids: Ints
    queries: Ints
    fooled_at: Ints
    deterministic: bool = True
    confirmed: NDArray[np.float64] | None = None
    adversarial: NDArray[np.uint8] | None = None
    clean: NDArray[np.uint8] | None = None
    ledger: tuple[Ints, Ints] | None = None
    asked: int | None = None
    saved: NDArray[np.bool_] | None = None
    of_defense: tuple[str, ...] = ("threshold", "tau")

    @property
    def setting(self) -> tuple[Any, ...]:
        """What attacks must share to be compared: all but the attack, the defense, and the budget."""
        return (self.model, self.dataset, self.norm, self.eps, self.targeted, self.seed)

    @property
    def way(self) -> tuple[Any, ...]:
        """The attack, whatever its eps, seed, budget and defense."""
        hyper = {name: value for name, value in self.hyper.items() if name not in self.of_defense}
        return (self.attack, self.accept, self.loss, tuple(sorted(map(str, hyper.items()))))

    @property
    def unbounded(self) -> bool:
        """Whether the ball holds every image; False for L2 where no clean images say how large they are."""
        if self.norm == "linf" or self.clean is None:
            return self.norm == "linf" and self.eps >= 1
        return bool(self.eps >= self.clean[0].size ** 0.5)

    @property
    def sees_scores(self) -> bool:
        """Whether it looks at more than labels."""
        return self.loss is not None and self.hyper.get("reading") != LabelAlone.name

    @property
    def standard(self) -> bool:
        """Whether it is the paper's attacker: greedy Square with the margin, scores taken as they are."""
        return (self.attack, self.accept, self.loss) == ("square", "greedy", "margin") and not (
            {"reading", "neighbours"} & self.hyper.keys()
        )

    @property
    def fooled(self) -> NDArray[np.bool_]:
        """Images that the attack fooled within its budget, not those wrong from the start (N,)."""
        return (self.fooled_at > 1) & (self.fooled_at <= self.budget)

    def at(self, ids: Ints) -> Ints:
        """fooled_at of these images, in their order."""
        place = {int(i): row for row, i in enumerate(self.ids)}
        return self.fooled_at[[place[int(i)] for i in ids]]


def common(records: Sequence[Record]) -> tuple[Ints, int]:
    """The images that all records have, and the least of their budgets."""
    ids = records[0].ids
    for record in records[1:]:
        ids = ids[np.isin(ids, record.ids)]
    return ids, min(record.budget for record in records)


def success(fooled_at: Ints, q: int) -> float:
    """Share of the initially correct images that were fooled within q queries; NaN where none was correct."""
    correct = fooled_at > 1
    return float((fooled_at[correct] <= q).mean()) if correct.any() else float("nan")


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records that can be compared (see `Record.setting`), in their order."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(record.setting, []).append(record)
    return list(found.values())


def about(record: Record) -> str:
    """The norm and radius, in words."""
    return f"L-inf {record.eps * 255:.4g}/255" if record.norm == "linf" else f"L2 {record.eps:.3g}"
