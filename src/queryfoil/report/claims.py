"""The paper's claims, each judged by name from recorded results: it holds here, does not, or cannot be told.

A claim is made of comparisons, each of which is shown, refuted, or open: where a difference stays within its spread
(see `sheets`), or where the paper's "hardly" is not within a margin that the text names.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from queryfoil import metrics, table
from queryfoil.report import claims_of_settings, sheets
from queryfoil.report.recorded import NotRecordedError, Recorded, Verdict, cell, entries, left
from queryfoil.report.sheets import Difference
from queryfoil.report.verdicts import OPEN, Shown, above, below, count, deviation, near, points, verdict
from queryfoil.summary import CellResult

LEAST_EFFECT = 5.0
"""Points: an effect that the paper speaks of is refuted where it is below this with its whole spread."""


class Judged(NamedTuple):
    """A claim, where the paper makes it, whether it holds here, and what was measured."""

    claim: str
    where: str
    verdict: str
    measured: str


def judge(recorded: Recorded, limits: Sequence[dict[str, Any]] | None) -> list[Judged]:
    """All claims, in the paper's order; those of which a cell is not recorded cannot be told."""
    found = []
    for claim, where, judged in CLAIMS:
        try:
            parts, measured = judged(recorded)
        except NotRecordedError as missing:
            parts, measured = [None], f"not recorded yet: {missing}"
        found.append(Judged(claim, where, verdict(parts), measured))
    return [*found, _limits(limits)]


def _on_square(recorded: Recorded, network: str, *defenses: str) -> list[CellResult]:
    """The cells of table 2 with Square on a network, one for each of these defenses."""
    return [cell(recorded, "table2", network=network, defense=d, attack="Square") for d in defenses]


def _accuracy_unchanged(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    for network in entries(recorded, "table2", "network"):
        none, paper, ours = _on_square(recorded, network, "None", "AAA-linear", "AAA-linear, fitted")
        d = sheets.clean_difference(paper, none)
        parts.append(above(d, margin=1.0))
        changed = [int((sheets.shown(r)[0].argmax(1) != sheets.undefended(r).argmax(1)).sum()) for r in (paper, ours)]
        texts.append(f"{network} {points(d)} points, labels changed {changed[0]} (Adam), {changed[1]} (exact)")
    return parts, "at most a point lost: " + "; ".join(texts)


def _others_lose(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    for network, defense in itertools.product(entries(recorded, "table2", "network"), ("AT", "RND")):
        none, other = _on_square(recorded, network, "None", defense)
        d = sheets.clean_difference(other, none)
        parts.append(above(Difference(-d.value, d.spread)))
        texts.append(f"{network}, {defense} {points(d)}")
    return parts, "clean accuracy against undefended, in points: " + "; ".join(texts)


def _calibration(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    for network in entries(recorded, "table2", "network"):
        none, paper, ours = _on_square(recorded, network, "None", "AAA-linear", "AAA-linear, fitted")
        before = metrics.ece(*sheets.shown(none))
        change, fitted = sheets.ece_difference(paper, none), sheets.ece_difference(ours, none)
        parts.append(above(Difference(-0.12 * before - change.value, change.spread)))
        texts.append(
            f"{network} {100 * before:.2f} %, change {points(change)} with the paper's tau, {points(fitted)} fitted"
        )
    return parts, "; ".join(texts)


def _leads(
    recorded: Recorded, plan: str, axis: str, others: Sequence[str], at: Sequence[int], but: str = ""
) -> Verdict:
    """Whether AAA-linear is above the other defenses of a plan, for each network and each entry on an axis but one."""
    parts: list[Shown] = []
    worst = ("", Difference(np.inf, 0.0))
    for network, entry in itertools.product(entries(recorded, plan, "network"), entries(recorded, plan, axis)):
        if entry == but:
            continue
        ours = cell(recorded, plan, network=network, defense="AAA-linear", **{axis: entry})
        for other, q in itertools.product(others, at):
            theirs = cell(recorded, plan, network=network, defense=other, **{axis: entry})
            d = sheets.accuracy_difference(ours, theirs, q)
            parts.append(above(d))
            if d.value < worst[1].value:
                worst = f"{network}, {entry} at {q} against {other}", d
    return parts, f"{count(parts)}; the worst is {worst[0]}: {points(worst[1])} points"


def _early(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    for network in entries(recorded, "table9", "network"):
        cells = [cell(recorded, "table9", network=network, seed=s) for s in entries(recorded, "table9", "seed")]
        fooled = np.stack([table.fooled_at(r.attacked) for r in cells])
        lost = (fooled > 100) & (fooled <= 2500)
        d = sheets.paired(lost.mean(0))  # the runs of an image count as one
        parts.append(near(d, 1.0))
        texts.append(f"{network} {int(lost.sum())} of {len(cells)} x {fooled.shape[1]} images, {points(d)}")
    return parts, "lost between 100 and 2,500 queries of Square, in points: " + "; ".join(texts)


def _adaptive(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    for defense, attack in itertools.product(("AAA-linear", "AAA-sine"), ("bi-Square", "op-Square")):
        greedy = cell(recorded, "table6", defense=defense, attack="Square")
        d = sheets.accuracy_difference(cell(recorded, "table6", defense=defense, attack=attack), greedy, 100)
        drop = Difference(-d.value, d.spread)
        weakened = above(drop) or (False if above(d, margin=LEAST_EFFECT) else None)
        parts.append(weakened if defense == "AAA-linear" else above(d, margin=LEAST_EFFECT))
        fitted = [cell(recorded, "table6", defense=f"{defense}, fitted", attack=a) for a in (attack, "Square")]
        change = sheets.accuracy_difference(fitted[0], fitted[1], 100)
        texts.append(f"{attack} on {defense} {points(d)} (fitted and exact {points(change)})")
    return parts, "change against Square, in points (more than its spread; sine: at most 5 lost): " + "; ".join(texts)


def _decisions(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    for bound in entries(recorded, "table7", "bound"):
        labels = cell(recorded, "table7", attack="RamBo", bound=bound)
        scores = cell(recorded, "table7", attack="Square", defense="None", bound=bound)
        fooled = table.fooled_at(labels.attacked)
        if bound in ("L2 0.5", "L2 1.0"):
            hits = int(((fooled > 1) & (fooled <= labels.cell.budget)).sum())
            parts.append(below(hits, len(fooled), 10.0))
        texts.append(f"{bound}: RamBo leaves {left(labels):.0f} % (n = {len(fooled)}), Square {left(scores):.0f} %")
    return parts, "at most 10 % fooled at the two smallest bounds: " + "; ".join(texts)


def _grows_with_the_bound(recorded: Recorded) -> Verdict:
    texts, leads = [], []
    for bound in entries(recorded, "table7", "bound"):
        ours = cell(recorded, "table7", attack="Square", defense="AAA-linear", bound=bound)
        others = [cell(recorded, "table7", attack="Square", defense=d, bound=bound) for d in ("AT", "AT (L2)", "RND")]
        best = max(others, key=left)
        leads.append(_survives(ours) - _survives(best))
        texts.append(f"{bound}: {points(sheets.paired(leads[-1]))} (over {best.cell.place['defense']})")
    steps = [above(sheets.paired(after - before)) for before, after in itertools.pairwise(leads)]
    parts = [above(sheets.paired(leads[-1] - leads[0])), above(sheets.paired(leads[-1]))]
    parts += [False for step in steps if step is False]
    return parts, "lead over the best other defense, in points: " + "; ".join(texts)


def _survives(r: CellResult) -> NDArray[np.float64]:
    return (table.fooled_at(r.attacked) > r.cell.budget).astype(float)


def _losses(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    for network in entries(recorded, "table8", "network"):
        base = cell(recorded, "table8", network=network, defense="AT-AAA-linear", loss="logits-margin")
        for loss, q in itertools.product(("probability-margin", "cross-entropy"), (100, 2500)):
            r = cell(recorded, "table8", network=network, defense="AT-AAA-linear", loss=loss)
            d = sheets.accuracy_difference(r, base, q)
            parts.append(near(d, 5.0))
            fitted = [
                cell(recorded, "table8", network=network, defense="AT-AAA-linear, fitted", loss=name)
                for name in (loss, "logits-margin")
            ]
            change = sheets.accuracy_difference(fitted[0], fitted[1], q)
            texts.append(f"{network}, {loss} at {q} {points(d)} (fitted and exact {points(change)})")
    return parts, "AT-AAA-linear, within 5 points of the logit margin: " + "; ".join(texts)


def _plugin(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    for network in entries(recorded, "table8", "network"):
        plain, both = (
            cell(recorded, "table8", network=network, defense=d, loss="logits-margin") for d in ("AT", "AT-AAA-linear")
        )
        d, change = sheets.accuracy_difference(both, plain, 2500), sheets.ece_difference(both, plain)
        parts += [above(d), above(Difference(-change.value, change.spread))]
        texts.append(f"{network}: accuracy left {points(d)}, ECE {points(change)} points")
    return parts, "; ".join(texts)


def _seeds(recorded: Recorded) -> Verdict:
    parts, texts = [], []
    seeds = entries(recorded, "table9", "seed")
    for network, q in itertools.product(entries(recorded, "table9", "network"), (100, 2500)):
        cells = [cell(recorded, "table9", network=network, seed=seed) for seed in seeds]
        papers = 10_000 if network == "WideResNet-28" else 1_000  # images
        scale = np.sqrt(len(cells[0].attacked) / papers)  # the deviation of a share falls like this
        low, high = deviation([scale * left(r, q) for r in cells])
        parts.append(True if high < 1 else False if low > 1 else None)
        own = np.std([left(r, q) for r in cells], ddof=1)
        texts.append(f"{network} at {q}: {own:.2f}, which is {scale * own:.2f} ({low:.2f} to {high:.2f}) of {papers:,}")
    return parts, (
        f"standard deviation over {len(seeds)} seeds under a point for as many images as the paper has, in points: "
        + "; ".join(texts)
    )


def _limits(rows: Sequence[dict[str, Any]] | None) -> Judged:
    claim = "AAA does not help against attackers who have the network, or who transfer from another"
    if not rows:
        return Judged(claim, "section 6", OPEN, "not recorded yet: python benchmarks/limits.py")
    share = {(row["attacker"], row["defense"]): 100 * row["accuracy"] for row in rows}
    text = "; ".join(
        f"{attacker}: undefended {share[attacker, 'None']:.1f} %, AAA-linear {share[attacker, 'AAA-linear']:.1f} %, AT "
        f"{share[attacker, 'AT']:.1f} %" for attacker in ("white-box", "transfer")
    )  # fmt: skip
    gains = {attacker: _gain(rows, attacker) for attacker in ("white-box", "transfer")}
    text = (
        f"at most 2 points gained or lost: {text} (n = {rows[0]['n']}; white-box: of PGD on each network itself); "
        "AAA-linear against undefended " + ", ".join(f"{attacker} {points(d)}" for attacker, d in gains.items())
    )
    return Judged(claim, "section 6", verdict([near(d, 2.0) for d in gains.values()]), text)


def _gain(rows: Sequence[dict[str, Any]], attacker: str) -> Difference:
    """Images right behind AAA-linear minus those right undefended."""
    none, ours = (
        next(set(r["wrong"]) for r in rows if (r["attacker"], r["defense"]) == (attacker, defense))
        for defense in ("None", "AAA-linear")
    )
    changes = np.zeros(rows[0]["n"])
    changes[: len(none - ours)] = 1
    changes[len(none - ours) :][: len(ours - none)] = -1
    return sheets.paired(changes)


CLAIMS: list[tuple[str, str, Callable[[Recorded], Verdict]]] = [
    ("AAA does not hurt accuracy", "table 2", _accuracy_unchanged),
    ("AT and RND lose accuracy", "table 2", _others_lose),
    ("AAA-linear reduces the ECE by more than 12 % of it", "section 5.3", _calibration),
    (
        "AAA is above AT and RND under every score-based attack",
        "table 2",
        lambda recorded: _leads(recorded, "table2", "attack", ("AT", "RND"), (100, 2500)),
    ),
    ("Under a point is lost from 100 to 2,500 queries", "tables 2, 9", _early),
    (
        "AAA is above DENT, PNI and TRS under Square and QueryNet",
        "table 3",
        lambda recorded: _leads(recorded, "table3", "attack", ("DENT", "PNI", "TRS"), (100, 2500)),
    ),
    (
        "AAA is above AT for targeted attacks and other norms",
        "table 4",
        lambda recorded: _leads(recorded, "table4", "bound", ("AT",), (100, 2500), but="L-inf"),
    ),
    ("60 to 80 steps of Adam are enough", "table 5", claims_of_settings.steps),
    ("AAA's performance is insensitive to its settings", "figure 4", claims_of_settings.insensitive),
    (
        "A larger tau or alpha, or a smaller beta, raises the accuracy left, and the ECE",
        "figure 4",
        claims_of_settings.emphasis,
    ),
    ("The temperature falls as defense is emphasised", "figure 4", claims_of_settings.temperature),
    ("Searching both ways, or the other way, weakens AAA-linear and not AAA-sine", "table 6", _adaptive),
    ("Decision-based attacks are weak at small bounds (0.5 and 1.0)", "table 7", _decisions),
    ("AAA's lead grows with the bound", "table 7", _grows_with_the_bound),
    ("The attacker's seed hardly matters to AAA", "table 9", _seeds),
    ("The attacker's loss does not matter", "table 8", _losses),
    ("On top of adversarial training, AAA adds defense and lowers the ECE", "table 8", _plugin),
]
"""Claim, where the paper makes it, and what judges it."""
