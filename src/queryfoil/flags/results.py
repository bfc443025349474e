"""F6 to F9, F12 and F16: what several attacks on a defense say together. Pure functions of what was recorded.

Shares of success are of the initially correct images. Where a defense was attacked in several settings (norms, radii),
each is judged, and the one that speaks loudest is told.
"""

from collections.abc import Sequence

import numpy as np

from queryfoil import metrics
from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.record import Record, about, common, groups, success
from queryfoil.flags.subject import percent

POINT = 0.01
STUCK, LEFT = 0.01, 0.2
UNBOUNDED = 0.99
GAP = 0.05
DEVIATIONS = 3
WEAK = 0.9
SATURATED = 0.05


def _loudest(id: str, found: Sequence[tuple[float, Flag]], missing: str) -> Flag:
    """The raised flag, or else the clear one, that is furthest; not judged where there is none."""
    if not found:
        return not_judged(id, missing)
    return max(found, key=lambda one: (one[1].raised, one[0]))[1]


def _fullest(records: Sequence[Record]) -> list[list[Record]]:
    """The settings in which most attacks were run: a control with a larger eps or another seed says little."""
    found = groups(records)
    most = max((len({r.way for r in group}) for group in found), default=0)
    return [group for group in found if len({r.way for r in group}) == most]


def _best(records: Sequence[Record], ids: np.ndarray, q: int) -> Record:
    """The attack that fools most of these images within q queries."""
    return max(records, key=lambda record: success(record.at(ids), q))


def scores_useless(mine: Sequence[Record]) -> Flag:
    """F6: the best attack that sees labels alone against the best that sees scores, at equal queries.

    At the last number of queries at which some attack still leaves 5 %, as where nothing is left nothing can be told.
    Raised where labels do as well, less a point.
    """
    found = []
    for group in _fullest(mine):
        blind = [r for r in group if not r.sees_scores]
        seeing = [r for r in group if r.sees_scores]
        if not blind or not seeing:
            continue
        ids, budget = common(group)
        if not len(ids) or not (group[0].at(ids) > 1).any():
            continue
        q = _unsaturated(group, ids, budget)
        by_label, by_score = _best(blind, ids, q), _best(seeing, ids, q)
        a, b = (success(r.at(ids), q) for r in (by_label, by_score))
        if not max(a, b) >= SATURATED:
            continue  # next to nothing was fooled in either way
        measured = (
            f"after {q} queries, {by_label.label} fools {percent(a)} by labels alone, the best attack that sees scores "
            f"({by_score.label}) {percent(b)} ({about(group[0])}, n = {len(ids)}). Raised from the same less a point"
        )
        found.append((a - b, judged("F6", a >= b - POINT, measured, queries=q, labels=a, scores=b, images=len(ids))))
    return _loudest(
        "F6",
        found,
        "an attack that sees labels alone (blind_square, rays, the reading label, ...) and one that sees scores",
    )


def _unsaturated(records: Sequence[Record], ids: np.ndarray, budget: int) -> int:
    """The last number of queries at which the best attack leaves more than 5 %; the budget if it always does."""

    def left(q: int) -> bool:
        return max(success(r.at(ids), q) for r in records) < 1 - SATURATED

    low, high = 1, budget
    if left(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) else (low, middle)
    return low


def stuck(mine: Sequence[Record]) -> Flag:
    """F7: what the attack that fools most gains between a quarter of its budget and all of it.

    Raised below a point, while more than 20 % are left.
    """
    found = []
    for group in _fullest(mine):
        ids, budget = common(group)
        if budget < 8 or not len(ids) or not (group[0].at(ids) > 1).any():
            continue
        best = _best(group, ids, budget)
        at = best.at(ids)
        curve = {q: success(at, q) for q in (budget // 4, budget // 2, budget)}
        gain, left = curve[budget] - curve[budget // 4], 1 - curve[budget]
        measured = (
            f"the attack that fools most ({best.label}) fools "
            + ", ".join(f"{percent(share)} after {q}" for q, share in curve.items())
            + f" queries ({about(best)}, n = {len(ids)}). Raised by a gain below a point with more than "
            f"{percent(LEFT)} left"
        )
        raised = gain < STUCK and left > LEFT
        found.append(
            (left - gain, judged("F7", raised, measured, gain=gain, left=left, budget=budget, images=len(ids)))
        )
    return _loudest("F7", found, "an attack of 8 queries or more on images that were right at first")


def larger_eps(mine: Sequence[Record]) -> Flag:
    """F8: the worst per image of the attacks that were run at several eps, from the smallest eps to the largest.

    Raised by a gain below a point where the smallest leaves more than a point, or where less than 99 % are fooled in a
    ball that holds every image (the 95 % interval ends below).
    """
    found = []
    without_eps: dict[tuple[object, ...], list[Record]] = {}
    for record in mine:
        key = (record.model, record.dataset, record.norm, record.targeted, record.seed)
        without_eps.setdefault(key, []).append(record)
    for group in without_eps.values():
        radii = sorted({record.eps for record in group})
        ways = set.intersection(*({r.way for r in group if r.eps == eps} for eps in radii))
        kept = [r for r in group if r.way in ways]
        if len(radii) < 2 or not kept:
            continue
        ids, budget = common(kept)
        if not len(ids) or not (kept[0].at(ids) > 1).any():
            continue
        shares = {
            eps: success(np.min([r.at(ids) for r in kept if r.eps == eps], axis=0), budget) for eps in radii
        }  # fmt: skip
        free = [eps for eps in radii if any(r.unbounded for r in kept if r.eps == eps)]
        gain, smallest = shares[radii[-1]] - shares[radii[0]], shares[radii[0]]
        right = int((kept[0].at(ids) > 1).sum())
        broken = any(metrics.wilson(round(shares[eps] * right), right).high < UNBOUNDED for eps in free)
        names = {eps: about(next(r for r in kept if r.eps == eps)) for eps in radii}
        measured = (
            f"after {budget} queries, "
            + ", ".join(f"{percent(shares[eps])} are fooled in {names[eps]}" for eps in radii)
            + (" (without bound)" if free else "")
            + f" by the worst of {len(ways)} attacks (n = {len(ids)}). Raised by a gain below a point, or where "
            f"the 95 % interval ends below {percent(UNBOUNDED)} without bound"
        )
        raised = (gain < POINT and smallest < 1 - POINT) or broken
        figures = {f"success_at_{eps:.4g}": share for eps, share in shares.items()}
        found.append((-gain, judged("F8", raised, measured, gain=gain, images=len(ids), **figures)))
    return _loudest("F8", found, "the same attack at two eps or more")


def adaptive_beats_standard(mine: Sequence[Record]) -> Flag:
    """F9: what is left under the worst of all attacks per image, and under the paper's greedy Square.

    Raised by a gap of more than five points, of all images.
    """
    found = []
    for group in _fullest(mine):
        standard = next((r for r in group if r.standard), None)
        others = [r for r in group if r is not standard]
        if standard is None or not others:
            continue
        ids, budget = common(group)
        if not len(ids):
            continue
        every = np.stack([r.at(ids) for r in group])
        seeing = np.stack([r.at(ids) for r in group if r.sees_scores])
        left, worst, worst_seeing = (
            float((at > budget).mean()) for at in (standard.at(ids), every.min(0), seeing.min(0))
        )
        best = _best(others, ids, budget)
        measured = (
            f"after {budget} queries, {standard.label} leaves {percent(left)}, the worst of {len(group)} attacks for "
            f"each image {percent(worst)} ({percent(worst_seeing)} of those that see scores), {best.label} alone "
            f"{percent(float((best.at(ids) > budget).mean()))} ({about(standard)}, n = {len(ids)}). Raised by more "
            "than five points"
        )
        found.append(
            (left - worst, judged("F9", left - worst > GAP, measured, standard=left, worst=worst, gap=left - worst,
                                  worst_of_scores=worst_seeing, attacks=len(group), images=len(ids)))
        )  # fmt: skip
    return _loudest("F9", found, "greedy Square with the margin, and another attack beside it")


def seed_spread(mine: Sequence[Record]) -> Flag:
    """F12: the same attack with other seeds: the range of what it leaves, in binomial standard deviations.

    Raised above three.
    """
    found = []
    runs: dict[tuple[object, ...], list[Record]] = {}
    for record in mine:
        key = (record.model, record.dataset, record.norm, record.eps, record.targeted, record.way)
        runs.setdefault(key, []).append(record)
    for group in runs.values():
        seeds = {record.seed: record for record in group}
        if len(seeds) < 2:
            continue
        ids, budget = common(list(seeds.values()))
        if not len(ids):
            continue
        left = [float((r.at(ids) > budget).mean()) for r in seeds.values()]
        mean = float(np.mean(left))
        deviation = max(float(np.sqrt(mean * (1 - mean) / len(ids))), 1 / (2 * len(ids)))
        spread = (max(left) - min(left)) / deviation
        measured = (
            f"{group[0].label} leaves {', '.join(percent(share) for share in left)} with seeds "
            f"{', '.join(map(str, seeds))} after {budget} queries (n = {len(ids)}): a range of {spread:.2g} binomial "
            f"standard deviations. Raised above {DEVIATIONS}"
        )
        found.append((spread, judged("F12", spread > DEVIATIONS, measured, deviations=spread, images=len(ids))))
    return _loudest("F12", found, "the same attack with two seeds or more")


def attack_sanity(mine: Sequence[Record], plain: Sequence[Record]) -> Flag:
    """F16: of the attacks that were run with and without the defense, the one that fools most without it.

    Raised where that is less than 90 % (the 95 % interval ends below): what is left behind the defense is then the
    network's doing, or the attack's.
    """
    found = []
    for group in groups(mine):
        pairs = [
            (r, p) for r in group for p in plain if (p.setting, p.way) == (r.setting, r.way) and len(common([r, p])[0])
        ]
        if not pairs:
            continue
        ids, budget = common([record for pair in pairs for record in pair])
        if not len(ids):
            continue
        here, there = max(pairs, key=lambda pair: success(pair[1].at(ids), budget))
        a, b = success(there.at(ids), budget), success(here.at(ids), budget)
        right = int((there.at(ids) > 1).sum())
        if not right:
            continue
        weak = metrics.wilson(round(a * right), right).high < WEAK
        measured = (
            f"{here.label} fools {percent(a)} without the defense within {budget} queries, {percent(b)} with it "
            f"({about(here)}, n = {len(ids)}). Raised where the 95 % interval ends below {percent(WEAK)}"
        )
        found.append((-a, judged("F16", weak, measured, undefended=a, defended=b, images=len(ids))))
    return _loudest("F16", found, "the same attack on the undefended model")
