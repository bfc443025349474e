"""The paper's claims about AAA's own settings (table 5 and figure 4), judged like all others (see `claims`)."""

import itertools

import numpy as np

from queryfoil.report import sheets
from queryfoil.report.recorded import Recorded, Verdict, cell, entries, left
from queryfoil.report.sheets import Difference
from queryfoil.report.verdicts import Shown, above, count, near, points

TREND = 0.7
"""Kendall's tau beyond which five or six values have a trend (chance brings it about in a tenth of the cases)."""


def steps(recorded: Recorded) -> Verdict:
    full = cell(recorded, "table5", kappa="100")
    parts: list[Shown] = []
    texts = []
    for kappa in ("60", "80", "exact"):
        r = cell(recorded, "table5", kappa=kappa)
        d, change = sheets.accuracy_difference(r, full, 100), sheets.ece_difference(r, full)
        if kappa != "exact":
            parts += [above(d, margin=2.0), above(Difference(-change.value, change.spread), margin=1.0)]
        texts.append(f"kappa {kappa}: accuracy left {points(d)}, ECE {points(change)}")
    return parts, "at most 2 points of accuracy and 1 of ECE worse than 100 steps: " + "; ".join(texts)


def temperature(recorded: Recorded) -> Verdict:
    parts: list[Shown] = []
    texts = []
    for axis, rising in (("tau", True), ("alpha", True), ("beta", False)):
        values = []
        for entry in entries(recorded, "figure4", axis):
            if (axis, entry) == ("beta", "0"):
                continue  # without calibration every temperature is as good
            r = cell(recorded, "figure4", **{axis: entry})
            values.append((float(entry), float(sheets.fitted(r)[-1]["temperature"])))
        values.sort(reverse=not rising)  # defense counts more and more
        steps = [np.sign(after - before) for (_, before), (_, after) in itertools.combinations(values, 2)]
        trend = float(np.mean(steps))  # Kendall's tau
        parts.append(True if trend < -TREND else False if trend > TREND else None)
        texts.append(f"{axis} " + ", ".join(f"{v:g}: {t:.2f}" for v, t in values))
    return parts, f"T as defense counts more (a rank correlation beyond {TREND} decides) – " + "; ".join(texts)


DEFAULTS = {"tau": "6", "alpha": "1", "beta": "5"}


def insensitive(recorded: Recorded) -> Verdict:
    usual = cell(recorded, "figure4", tau="6")
    budget = usual.cell.budget
    parts: list[Shown] = []
    texts = []
    for axis, default in DEFAULTS.items():
        found = []
        for entry in entries(recorded, "figure4", axis):
            r = cell(recorded, "figure4", **{axis: entry})
            change, clean = sheets.ece_change(r), sheets.clean_change(r)
            if entry != default or axis == "tau":  # the default is the same on each axis
                parts += [above(Difference(-change.value, change.spread)), above(clean, margin=1.0)]
            if entry != default:
                parts.append(near(sheets.accuracy_difference(r, usual, budget), 5.0))
            found.append(f"{entry}: {left(r):.0f} %, {points(change)}")
        texts.append(f"{axis} " + ", ".join(found))
    return parts, (
        f"{count(parts)}: accuracy left at {budget} within 5 points of that at tau 6, alpha 1 and beta 5, an ECE "
        "below undefended, and at most a point of accuracy lost (accuracy left; ECE in points against undefended) – "
        + "; ".join(texts)
    )


def emphasis(recorded: Recorded) -> Verdict:
    parts: list[Shown] = []
    texts = []
    for axis, (least, most) in {"tau": ("1", "12"), "alpha": ("0", "1"), "beta": ("20", "0")}.items():
        low, high = (cell(recorded, "figure4", **{axis: entry}) for entry in (least, most))
        left, ece = sheets.accuracy_difference(high, low, low.cell.budget), sheets.ece_difference(high, low)
        parts += [above(left), above(ece)]
        texts.append(f"{axis} from {least} to {most}: accuracy left {points(left)}, ECE {points(ece)}")
    return parts, "; ".join(texts)
