"""The worst case: each image's fate under all attackers of a defense who see scores."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from queryfoil import metrics, table
from queryfoil.metrics import Interval
from queryfoil.summary import CellResult

SIDE = 0.95
"""Of the one-sided bound of a difference."""


class Where(NamedTuple):
    """What attacks must share to be compared, beside the images: those that ids name, and what may be done to them."""

    dataset: str
    norm: str
    eps: float
    targeted: bool


class Worst(NamedTuple):
    """Queries until the worst attack for each image fooled it, by seed (S, N), and how many attacks a seed has.

    seeds (S,); ids (N,); where: data set, ball and goal.
    """

    first: NDArray[np.int64]
    attackers: int
    seeds: tuple[int, ...]
    ids: tuple[int, ...]
    where: Where

    def of(self, seeds: Sequence[int], ids: Sequence[int]) -> NDArray[np.int64]:
        """`first` of these seeds and images, in their order."""
        rows, places = ({value: i for i, value in enumerate(values)} for values in (self.seeds, self.ids))
        return self.first[np.ix_([rows[seed] for seed in seeds], [places[i] for i in ids])]

    def left(self, q: int) -> float:
        """Accuracy left at q, in [0, 1]: the mean over seeds of the share of images that no attack of a seed fooled."""
        return float((self.first > q).mean())

    def interval(self, q: int) -> Interval:
        """Its 95 % interval, over images: Wilson's for one seed, a bootstrap of images for several."""
        left = self.first > q
        if len(left) == 1:
            return metrics.wilson(int(left.sum()), left.shape[1])
        return metrics.percentiles(left.mean(0)[metrics.bootstrap(left.shape[1])].mean(1))


def worst(cells: Sequence[CellResult]) -> Worst | None:
    """The worst of the attacks of some cells on one model, on the same images; None without one that sees scores.

    ValueError where seeds have different attacks: the worst of more attacks is worse.
    """
    seeds: dict[int, list[CellResult]] = {}
    for r in cells:
        if r.cell.loss is not None:
            seeds.setdefault(r.cell.seed, []).append(r)
    if not seeds:
        return None
    kinds = {seed: sorted(map(_attack, found)) for seed, found in seeds.items()}
    attacks = next(iter(kinds.values()))
    if other := [seed for seed, kind in kinds.items() if kind != attacks]:
        raise ValueError(
            f"expected the same attacks for each seed, but got others for seed {other[0]} than for {next(iter(kinds))}"
            "; add what is missing to the plan"
        )
    ids = {tuple(r.attacked.column("id").to_pylist()) for found in seeds.values() for r in found}
    if len(ids) > 1:
        raise ValueError(
            f"expected attacks on the same images, but got {len(ids)} sets of images; set one n in the plan"
        )
    where = {Where(r.cell.dataset, r.cell.norm, r.cell.eps, r.cell.targeted) for found in seeds.values() for r in found}
    if len(where) > 1:
        raise ValueError(f"expected attacks on one data set, in one ball and with one goal, but got {_told(*where)}")
    first = [np.min([table.fooled_at(r.attacked) for r in found], axis=0) for found in seeds.values()]
    return Worst(np.stack(first), len(attacks), tuple(seeds), ids.pop(), where.pop())


def _attack(r: CellResult) -> str:
    """An attack by its settings, whatever its seed."""
    return json.dumps([r.cell.attack, r.cell.accept, r.cell.loss, r.info["hyper"]], sort_keys=True)


def behind(a: Worst, b: Worst, q: int) -> tuple[float, float]:
    """Accuracy left at q of a less that of b, and the bound that it is above with 95 % (paired bootstrap of images).

    On the seeds that both have. ValueError where they have none, other images, or another data set, ball or goal.
    """
    if a.where != b.where:
        raise ValueError(
            "expected two worst cases on one data set, in one ball and with one goal, but got "
            f"{_told(a.where, b.where)}"
        )
    if set(a.ids) != set(b.ids):
        raise ValueError(
            f"expected two worst cases on the same images, but {len(set(a.ids) ^ set(b.ids))} of {len(a.ids)} and "
            f"{len(b.ids)} are in one alone; set one n in the plan"
        )
    seeds = [seed for seed in a.seeds if seed in b.seeds]
    if not seeds:
        raise ValueError(f"expected two worst cases with a seed in common, but got {a.seeds} and {b.seeds}")
    left = [(w.of(seeds, a.ids) > q).mean(0) for w in (a, b)]
    by_image = (left[0] - left[1]).astype(np.float64)
    means = by_image[metrics.bootstrap(len(by_image))].mean(1)
    return float(by_image.mean()), float(np.quantile(means, 1 - SIDE))


def _told(*found: Where) -> str:
    return " and ".join(f"{w.dataset}, {w.norm} {w.eps:.4g}{', targeted' * w.targeted}" for w in sorted(found))


def text(cells: Sequence[CellResult], at: Sequence[int]) -> str:
    """What every attack that sees scores leaves, at each number of queries; empty where none sees them."""
    found = worst(cells)
    if found is None:
        return ""
    halves = [(found.interval(q).high - found.interval(q).low) / 2 for q in at]
    texts = [f"{100 * found.left(q):.1f} ± {100 * half:.1f}" for q, half in zip(at, halves, strict=True)]
    seeds = f", {len(found.first)} seeds" if len(found.first) > 1 else ""
    return f"{' / '.join(texts)} ({found.attackers}{seeds})"


def text_behind(cells: Sequence[CellResult], ceiling: Sequence[CellResult], at: Sequence[int]) -> str:
    """The worst case less that of the ceiling, and the bound above which it is with 95 %; empty where there is none."""
    found, top = worst(cells), worst(ceiling)
    if found is None or top is None:
        return ""
    changes = [behind(found, top, q) for q in at]
    return " / ".join(f"{100 * change:+.1f} (above {100 * low:+.1f})" for change, low in changes)
