"""F13 to F15, F18 and F19: are successes, queries, images and columns what they are taken for? Pure functions."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.record import Record, common
from queryfoil.flags.subject import percent
from queryfoil.metrics import NEVER

CONFIRMED = 0.5
FEWEST = 5  # successes whose mean says something
REPEATED = 0.1
OUTSIDE = 1e-6


def lucky_success(mine: Sequence[Record]) -> Flag:
    """F13: the share of ten fresh queries on which a recorded success still is one, of the attack with the lowest.

    Attacks with five successes or more count. Raised below half. A model that declares itself deterministic is taken at
    its word where nobody asked.
    """
    asked = [(float(np.nanmean(r.confirmed)), r) for r in mine if r.confirmed is not None and _asked(r) >= FEWEST]
    if not asked:
        if mine and all(r.deterministic and r.confirmed is None for r in mine):
            return judged("F13", False, "the model declares that it is deterministic: a success repeats")
        return not_judged("F13", f"{FEWEST} successes of one attack that were asked for again")
    share, record = min(asked, key=lambda one: one[0])
    measured = (
        f"of {_asked(record)} successes of {record.label}, {percent(share)} of ten fresh queries each are successes "
        f"again. Raised below {percent(CONFIRMED)}"
    )
    return judged("F13", share < CONFIRMED, measured, confirmed=share, successes=_asked(record))


def _asked(record: Record) -> int:
    return 0 if record.confirmed is None else int((~np.isnan(record.confirmed)).sum())


def budget_accounting(mine: Sequence[Record]) -> Flag:
    """F14: queries as the attack's record counts them, as the model saw them, and how many of them were repeated.

    Also from records alone: no image above its budget, each success at the last query, each survivor with the whole
    budget. Raised by any mismatch; and, where the model's own count is there, by more than 10 % repeated queries of all
    to a model that declares itself deterministic.
    """
    if not mine:
        return not_judged("F14", "an attack")
    wrong, unseen, repeated, most, worst = 0, 0, 0, 0.0, ""
    for r in mine:
        never = r.fooled_at == NEVER
        bad = (r.queries > r.budget) | (~never & (r.fooled_at != r.queries)) | (never & (r.queries != r.budget))
        bad |= r.queries < 1
        duplicate_ids = len(r.ids) - len(np.unique(r.ids))
        if r.asked is not None:
            unseen += abs(r.asked - int(r.queries.sum()))
        if r.ledger is not None:
            bad |= r.ledger[0] != r.queries
            share = float(r.ledger[1].sum() / max(r.queries.sum(), 1))
            if r.deterministic:
                repeated += int(r.ledger[1].sum())
                most, worst = max((most, worst), (share, r.label))
        wrong += int(bad.sum()) + duplicate_ids
    seen = all(r.ledger is not None and r.asked is not None for r in mine)
    total = sum(int(r.queries.sum()) for r in mine)
    share = repeated / max(total, 1)
    measured = (
        f"{wrong} images of {sum(len(r.ids) for r in mine)} in {len(mine)} attacks have a count that does not fit"
        + (f" the {total:,} queries that the model saw" if seen else f" its budget or its success ({total:,} queries)")
        + (f"; {unseen} of them were counted and not asked, or asked and not counted" if unseen else "")
        + (
            f"; {percent(share)} of these repeat an earlier one ({worst}: {percent(most)} of its own)"
            if repeated
            else ""
        )
        + (f". Raised by any, or above {percent(REPEATED)} repeated" if seen else ". Raised by any")
    )
    raised = wrong > 0 or unseen > 0 or share > REPEATED
    return judged("F14", raised, measured, mismatches=wrong + unseen, repeated=share, queries=total)


def invalid_images(mine: Sequence[Record]) -> Flag:
    """F15: adversarial images outside their ball, or lost after they were saved in 8 bits, where that was tried.

    Raised by any. An L2 ball is left by what rounding down to 8 bits does not explain.
    """
    kept = [r for r in mine if r.adversarial is not None and r.clean is not None and bool(r.fooled.any())]
    if not kept:
        return not_judged("F15", "adversarial images and the clean ones beside them")
    outside, lost, total, largest = 0, 0, 0, 0.0
    for r in kept:
        assert r.adversarial is not None
        assert r.clean is not None
        delta = (r.adversarial[r.fooled].astype(np.float64) - r.clean[r.fooled]) / 255
        flat = delta.reshape(len(delta), -1)
        size = np.abs(flat).max(1) if r.norm == "linf" else np.linalg.norm(flat, axis=1)
        # flooring moves each value by less than a level, in L2 by less than the root of their number
        slack = OUTSIDE if r.norm == "linf" else OUTSIDE + np.sqrt(flat.shape[1]) / 255
        beyond = size - r.eps
        outside += int((beyond > slack).sum())
        largest = max(largest, float(beyond.max()))
        lost += 0 if r.saved is None else int((~r.saved[r.fooled]).sum())
        total += len(delta)
    tried = any(r.saved is not None for r in kept)
    measured = (
        f"{outside} of {total} adversarial images are outside their ball"
        + (f" (by up to {largest:.2g})" if outside else "")
        + (f", {lost} are none after they were saved in 8 bits" if tried else "")
        + ". Raised by any"
    )
    return judged("F15", outside + lost > 0, measured, outside=outside, lost=lost, images=total)


def tuning_leak(attacked: NDArray[np.uint8], calibration: NDArray[np.uint8]) -> Flag:
    """F18: images (N, C, H, W) that were both fitted on and attacked, byte for byte. Raised by any."""
    known = {_hash(image) for image in calibration}
    both = sum(_hash(image) in known for image in attacked)
    measured = (
        f"{both} of {len(attacked)} attacked images are among the {len(calibration)} calibration images. Raised by any"
    )
    return judged("F18", both > 0, measured, both=both, attacked=len(attacked), calibration=len(calibration))


def _hash(image: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()


def clean_set(mine: Sequence[Record], plain: Sequence[Record]) -> Flag:
    """F19: the initially correct images behind the defense, and without it. Raised where any differs.

    Every attack behind the defense is compared with every one without it that has the same network, data set and goal,
    on the images that both have.
    """
    compared: set[tuple[str, str, int]] = set()
    differ: set[tuple[str, str, int]] = set()
    pairs, partly = 0, 0
    for r in mine:
        for p in plain:
            if (p.model, p.dataset, p.targeted) != (r.model, r.dataset, r.targeted):
                continue
            both, _ = common([r, p])
            if not len(both):
                continue
            named = [(r.model, r.dataset, int(i)) for i in both]
            apart = (r.at(both) > 1) != (p.at(both) > 1)
            compared.update(named)
            differ.update(name for name, other in zip(named, apart, strict=True) if other)
            pairs += 1
            partly += len(both) < max(len(r.ids), len(p.ids))
    if not pairs:
        return not_judged("F19", "an attack on the undefended model, on the same images")
    measured = (
        f"{len(differ)} of {len(compared)} images are right at first in one column and wrong in the other, in {pairs} "
        "pairs of an attack behind the defense and one without it"
        + (f" ({partly} of which share some images alone)" if partly else "")
        + ". Raised by any"
    )
    return judged("F19", bool(differ), measured, differ=len(differ), images=len(compared), pairs=pairs, partly=partly)
