"""The worst case: each image's fate under all attackers of a defense who see scores."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from queryfoil import metrics, table
from queryfoil.metrics import Interval
from queryfoil.summary import CellResult

SIDE = 0.95
"""Of the one-sided bound of a difference."""


class Worst(NamedTuple):
    """Queries until the worst attack for each image fooled it, by seed (S, N), and how many attacks a seed has."""

    first: NDArray[np.int64]
    attackers: int

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
    counts = {seed: len(found) for seed, found in seeds.items()}
    ids = {tuple(r.attacked.column("id").to_pylist()) for found in seeds.values() for r in found}
    if len(set(counts.values())) > 1 or len(ids) > 1:
        raise ValueError(
            f"expected as many attacks for each seed, on the same images, but got {counts} attacks by seed and "
            f"{len(ids)} sets of images; add what is missing to the plan"
        )
    first = [np.min([table.fooled_at(r.attacked) for r in found], axis=0) for found in seeds.values()]
    return Worst(np.stack(first), next(iter(counts.values())))


def behind(a: Worst, b: Worst, q: int) -> tuple[float, float]:
    """Accuracy left at q of a less that of b, and the bound that it is above with 95 % (paired bootstrap of images).

    On the seeds that both have: the first ones.
    """
    seeds = min(len(a.first), len(b.first))
    by_image = ((a.first[:seeds] > q).mean(0) - (b.first[:seeds] > q).mean(0)).astype(np.float64)
    means = by_image[metrics.bootstrap(len(by_image))].mean(1)
    return float(by_image.mean()), float(np.quantile(means, 1 - SIDE))
