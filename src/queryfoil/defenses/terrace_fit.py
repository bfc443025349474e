"""Fitting terraces: where borders help an honest user most, for the least that an attacker can feel.

An image is counted as right with the probability that the calibrated network gives it, which places borders with far
less noise than the few wrong answers themselves would; those decide only how far to go. Derived in docs/terraces.md.
"""

import itertools
import json
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from queryfoil import files, metrics
from queryfoil.checks import is_real, require, require_positive, require_whole
from queryfoil.defenses.calibration import ALLOWED_ECE, FOLDS, check_held_out
from queryfoil.defenses.temperature import fit as fit_temperature
from queryfoil.metrics.selective import SELECTION

Floats = NDArray[np.float64]

GROUPS = 10  # of classes that share borders and levels; with up to so many classes each has its own
CANDIDATES = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98])
"""Of borders: quantiles of the margin, where an image weighs as much as it is likely to be wrong."""

MOST = 8  # borders in a group
OF_ALL = 10  # images of a terrace's interval in all groups, as which they weigh in its own level
OF_MODEL = 300  # images as which the network's own confidence weighs in a level, besides the answers
LEAST = 1e-9  # share of a class
FALL = 1e-4  # of shares from place to place, of themselves: enough to be told apart in single precision
LEAST_GAIN = 1e-5  # in AUROC for which a border is moved
FREE = 1e-3  # prices below count as this one
ANOTHER = 0.1  # price of a further border in a group that has one


@dataclass(frozen=True)
class TerraceFit:
    """Terraces for one model, and what they did on n held-out images.

    group, borders, shares: as `Terraces` takes them. exposed: share of the right answers in groups that have a border.
    `*_cross_fitted`: each image with levels found on others, at these borders.
    """

    group: tuple[int, ...]
    borders: tuple[tuple[float, ...], ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]
    temperature: float
    n: int
    exposed: float
    ece_undefended: float
    ece_cross_fitted: float
    auroc_undefended: float
    auroc_cross_fitted: float

    def __post_init__(self) -> None:
        check_terraces(self.group, self.borders, self.shares)
        require_positive("temperature", self.temperature)
        require_whole("n", self.n)
        for name in ("exposed", "ece_undefended", "ece_cross_fitted", "auroc_undefended", "auroc_cross_fitted"):
            require(name, getattr(self, name), "from 0 to 1", lambda value: 0 <= value <= 1)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.group)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, atomically."""
        files.write_text(Path(path), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "TerraceFit":
        """Read such a file; ValueError if it is not one."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**found | {name: _tuples(found[name]) for name in ("group", "borders", "shares")})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file written by TerraceFit.save: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def check_terraces(
    group: Sequence[int], borders: Sequence[Sequence[float]], shares: Sequence[Sequence[Sequence[float]]]
) -> None:
    """ValueError unless these make terraces: groups 0, 1, ..., borders that rise, an interval more than borders.

    Shares fall from place to place, to that of each of the other classes, by at least one part in 20,000.
    """
    groups = len(borders)
    whole = all(isinstance(g, numbers.Integral) and not isinstance(g, bool) for g in group)
    if len(group) < 2 or not whole or set(group) != set(range(groups)) or len(shares) != groups:
        raise ValueError(
            f"expected a group (0, 1, ...) for each of at least 2 classes, and borders and shares of each group, but "
            f"got groups {list(dict.fromkeys(group))}, {groups} lists of borders and {len(shares)} of shares"
        )
    ranks = {len(row) for own in shares for row in own}
    if len(ranks) != 1 or not 1 <= min(ranks) < len(group):
        raise ValueError(f"expected shares of 1 to {len(group) - 1} first places, of all the same, but got {ranks}")
    for cuts, own in zip(borders, shares, strict=True):
        if not all(is_real(cut) and 0 < cut < np.inf for cut in cuts) or list(cuts) != sorted(set(cuts)):
            raise ValueError(f"expected borders > 0 in rising order, but got {list(cuts)}")
        if len(own) != len(cuts) + 1:
            raise ValueError(f"expected {len(cuts) + 1} intervals for {len(cuts)} borders, but got {len(own)}")
        for row in own:
            if not all(is_real(p) for p in row):
                raise ValueError(f"expected shares as numbers, but got {list(row)}")
            rest = (1 - sum(row)) / (len(group) - len(row))
            if not rest > 0 or not all(a >= b * (1 + FALL / 2) for a, b in itertools.pairwise([*row, rest])):
                raise ValueError(
                    f"expected shares that fall, to that of each of the other classes ({rest:g}), which is above 0, "
                    f"but got {list(row)}"
                )


def fit(logits: Tensor, labels: Tensor, *, ranks: int = 1, allowed: float = 0.01) -> TerraceFit:
    """Find terraces for a model from held-out logits (N, K) and labels (N,). Never pass images that you report on.

    Adds border by border, each time the one with the most expected gain in AUROC (of telling right from wrong answers)
    for its price: the share of answers in its group, less for a border near zero. Ends where the AUROC, the expected
    and the cross-fitted one, is at most `allowed`, in [0, 1], below that of the undefended logits, and the cross-fitted
    ECE at most half a point above theirs. On other images the AUROC falls by more than where the borders were found:
    the usual `allowed` aims at 0.02 there. ranks: how many of the first classes keep their place, from 1 to K - 1.
    1,000 or more images are advisable; under 50 is an error, and so is none right or none wrong.

    ValueError where all candidate borders are too few for that, as for networks whose margin tells less than their
    confidence; it says what `allowed` would do.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> logits = 3 * torch.randn(2000, 4, generator=generator)
    >>> found = fit(logits, logits.softmax(1).multinomial(1, generator=generator).squeeze(1), allowed=0.03)
    >>> found.auroc_cross_fitted > found.auroc_undefended - 0.03
    True
    """
    require("allowed", allowed, "from 0 to 1", lambda value: 0 <= value <= 1)
    check_held_out(logits, labels)
    require_whole("ranks", ranks)
    classes = logits.shape[1]
    if ranks >= classes:
        raise ValueError(f"expected ranks from 1 to {classes - 1}, as there are {classes} classes, but got {ranks}")
    z, y = logits.detach().double().cpu(), labels.cpu()
    temperature = fit_temperature(z, y).temperature
    undefended = metrics.probabilities(z, "logits")
    hit = undefended.argmax(1) == y.numpy()
    if hit.all() or not hit.any():
        raise ValueError(
            "expected right and wrong answers among the held-out images, but all are the same; pass others"
        )
    sample = _sample(z, hit, temperature, ranks)
    before = metrics.ece(undefended, y.numpy()), metrics.auroc(undefended, y.numpy())
    least = np.inf
    p = sample.ranked[:, 0]
    finest = _expected_auroc(p, p, np.ones_like(p))
    for borders, expected in _path(sample):
        shown = _cross_fitted(sample, borders)
        ece = float(metrics.binned_gap(shown, hit))
        after = SELECTION["auroc"](shown, hit)
        if ece > before[0] + ALLOWED_ECE:
            continue
        loss = max(before[1] - after, finest - expected)
        least = min(least, loss)
        if loss <= allowed:
            exposed = hit[[bool(borders[g]) for g in sample.group[sample.top]]].sum() / hit.sum()
            cuts = tuple(tuple(float(sample.grid[i - 1]) for i in chosen) for chosen in borders)
            levels = _levels(sample.sums(np.ones(len(hit), dtype=bool)), borders)
            shares = tuple(tuple(tuple(map(float, row)) for row in level) for level in levels)
            return TerraceFit(
                tuple(map(int, sample.group)), cuts, shares, round(temperature, 6), len(hit), float(exposed),
                before[0], ece, before[1], after,
            )  # fmt: skip
    ece_too = f"and the ECE within {100 * ALLOWED_ECE:g} points of the undefended {100 * before[0]:.2f} %"
    if least < np.inf:
        advice = f"allowed={np.ceil(1e4 * least) / 1e4:g} is what these images would do with"
    else:
        advice = "no borders do, however much is allowed; pass more held-out images"
    raise ValueError(
        f"no terraces keep the AUROC within {allowed:g} of the undefended {before[1]:.4f} {ece_too}; {advice}"
    )


class _Sums(NamedTuple):
    """Sums over images by group and bin of the margin: images (G, B), right ones, probabilities by place (G, B, R)."""

    classes: int
    n: Floats
    hits: Floats
    ranked: Floats


class _Sample(NamedTuple):
    """Held-out images: top class, bin of the margin, answer right, calibrated probabilities (N, ranks) in order."""

    top: NDArray[np.int64]
    bin: NDArray[np.int64]
    hit: NDArray[np.bool_]
    ranked: Floats
    group: NDArray[np.int64]  # of each class
    grid: Floats  # candidate borders

    def sums(self, rows: NDArray[np.bool_]) -> _Sums:
        shape = (int(self.group.max()) + 1, len(self.grid) + 1)
        cell = np.ravel_multi_index((self.group[self.top[rows]], self.bin[rows]), shape)
        weights = [np.ones(rows.sum()), self.hit[rows], *self.ranked[rows].T]
        n, hits, *ranked = (
            np.bincount(cell, w, shape[0] * shape[1]).reshape(shape).astype(np.float64) for w in weights
        )
        return _Sums(len(self.group), n, hits, np.stack(ranked, -1))


Borders = list[tuple[int, ...]]
"""Of each group, the bins that begin at its borders, from 1 on."""


def _sample(z: Tensor, hit: NDArray[np.bool_], temperature: float, ranks: int) -> _Sample:
    probs = (z / temperature).softmax(1).sort(1, descending=True).values.numpy()
    top = z.argmax(1).numpy()
    best = z.topk(2, dim=1).values
    margin = (best[:, 0] - best[:, 1]).numpy()
    order = np.argsort(margin)
    wrong = np.cumsum(1 - probs[order, 0])
    quantiles = margin[order][np.searchsorted(wrong, CANDIDATES * wrong[-1])]
    grid = np.unique([float(f"{q:.2g}") for q in quantiles if q > 0])
    bins = np.searchsorted(grid, margin, side="right")
    return _Sample(top, bins, hit, probs[:, :ranks], _groups(top, probs[:, 0], z.shape[1]), grid)


def _groups(top: NDArray[np.int64], confidence: Floats, classes: int) -> NDArray[np.int64]:
    """Each class for itself, or where there are many, those of like confidence together, in groups of equal size."""
    if classes <= GROUPS:
        return np.arange(classes)
    n, total = np.bincount(top, minlength=classes), np.bincount(top, confidence, classes)
    mean = (total + OF_ALL * confidence.mean()) / (n + OF_ALL)
    rank = np.argsort(np.argsort(mean, kind="stable"))
    return np.asarray(rank * GROUPS // classes)


def _levels(sums: _Sums, borders: Borders, by_model: bool = False) -> list[Floats]:
    """Of each group, the probabilities of the first ranks in each interval (intervals, R).

    The confidence is the network's own mean one, drawn towards that of the interval in all groups, and then towards the
    share of right answers; or, `by_model`, not the latter.
    """
    all_n, all_ranked = sums.n.sum(0), sums.ranked.sum(0)
    found = []
    for g, chosen in enumerate(borders):
        starts = [0, *chosen]
        n, hits = (np.add.reduceat(part[g], starts) for part in (sums.n, sums.hits))
        ranked, everywhere = (np.add.reduceat(part, starts, axis=0) for part in (sums.ranked[g], all_ranked))
        usual = everywhere / np.maximum(np.add.reduceat(all_n, starts), 1)[:, None]
        mean = (ranked + OF_ALL * usual) / (n + OF_ALL)[:, None]
        top = mean[:, 0] if by_model else (hits + OF_MODEL * mean[:, 0]) / (n + OF_MODEL)
        others = mean[:, 1:] / np.maximum(1 - mean[:, :1], 1e-12)  # of what the top class leaves
        found.append(_falling(np.concatenate([top[:, None], others * (1 - top)[:, None]], 1), sums.classes))
    return found


def _falling(shares: Floats, classes: int) -> Floats:
    """Shares (..., R) of the first places, raised until each is above the next, and the last above the other classes.

    What is shown would else tie them, or put another class above the answer, where that is seldom right.
    """
    rest = classes - shares.shape[-1]
    falling = [np.maximum((1 - shares.sum(-1)) / rest, LEAST)]
    for place in reversed(range(shares.shape[-1])):
        falling.append(np.maximum(shares[..., place], falling[-1] * (1 + FALL)))
    first = np.stack(falling[:0:-1], -1)
    return np.asarray(first / (rest * falling[0] + first.sum(-1))[..., None])


def _path(sample: _Sample) -> Iterator[tuple[Borders, float]]:
    """Borders, ever more, with the AUROC to expect: first none, then each time the best move for its price."""
    sums = sample.sums(np.ones(len(sample.hit), dtype=bool))
    share = sums.n.sum(1) / sums.n.sum()
    wrong = (sums.n - sums.ranked[:, :, 0]).sum(0).cumsum()
    middle = sample.grid[min(int(np.searchsorted(wrong, wrong[-1] / 2)), len(sample.grid) - 1)]
    borders: Borders = [() for _ in share]
    now = _expected(sums, borders)
    while True:
        yield borders, now
        moves = []
        for g, chosen in enumerate(borders):
            for other in _moves(chosen, len(sample.grid)):
                candidate = [*borders[:g], other, *borders[g + 1 :]]
                then = _expected(sums, candidate)
                price = share[g] * (_price(other, sample.grid, middle) - _price(chosen, sample.grid, middle))
                if then - now > LEAST_GAIN:
                    moves.append(((then - now) / max(price, FREE), then, candidate))
        if not moves:
            return
        _, now, borders = max(moves)


def _moves(chosen: tuple[int, ...], places: int) -> Iterator[tuple[int, ...]]:
    """A border more, or one elsewhere."""
    for new in set(range(1, places + 1)) - set(chosen):
        if len(chosen) < MOST:
            yield tuple(sorted((*chosen, new)))
        for old in chosen:
            yield tuple(sorted({*chosen, new} - {old}))


def _price(chosen: tuple[int, ...], grid: Floats, middle: float) -> float:
    if not chosen:
        return 0.0
    return min(1.0, float(grid[chosen[-1] - 1]) / middle) + ANOTHER * (len(chosen) - 1)


def _expected(sums: _Sums, borders: Borders) -> float:
    """AUROC to expect of the levels at these borders."""
    levels = np.concatenate([level[:, 0] for level in _levels(sums, borders, by_model=True)])
    right, n = (
        np.concatenate([np.add.reduceat(part[g], [0, *chosen]) for g, chosen in enumerate(borders)])
        for part in (sums.ranked[:, :, 0], sums.n)
    )
    return _expected_auroc(levels, right, n)


def _expected_auroc(levels: Floats, right: Floats, n: Floats) -> float:
    """AUROC of levels, each of n images of which `right` are so, on average."""
    order = np.argsort(levels, kind="stable")
    right, wrong = right[order], (n - right)[order]
    return float((right * (wrong.cumsum() - wrong / 2)).sum() / (right.sum() * wrong.sum()))


def _cross_fitted(sample: _Sample, borders: Borders) -> Floats:
    """The confidence shown for each image, with levels found on the other folds."""
    n = len(sample.hit)
    fold = np.random.default_rng(0).permutation(n) % FOLDS
    group = sample.group[sample.top]
    shown = np.empty(n)
    for k in range(FOLDS):
        levels = _levels(sample.sums(fold != k), borders)
        for g, chosen in enumerate(borders):
            rows = (fold == k) & (group == g)
            shown[rows] = levels[g][np.searchsorted(np.asarray(chosen), sample.bin[rows], side="right"), 0]
    return shown
