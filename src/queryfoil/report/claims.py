"""The paper's claims, each judged by name from recorded results: it holds here, does not, or cannot be told."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from queryfoil import metrics, table
from queryfoil.report import sheets
from queryfoil.report.sheets import Difference
from queryfoil.summary import CellResult

Recorded = Mapping[str, list[CellResult]]
"""The finished cells of each plan, by its name."""

HOLDS, PARTLY, FAILS, OPEN = "holds here", "holds in part", "does not hold here", "cannot be judged here"


class Judged(NamedTuple):
    """A claim, where the paper makes it, whether it holds here, and what was measured."""

    claim: str
    where: str
    verdict: str
    measured: str


def judge(recorded: Recorded, limits: list[dict[str, Any]] | None) -> list[Judged]:
    """All claims, in the paper's order; those whose plans are not finished cannot be judged."""
    found = []
    for claim, where, judged in CLAIMS:
        try:
            verdict, measured = judged(recorded)
        except KeyError:
            verdict, measured = OPEN, "not all of its cells are recorded"
        found.append(Judged(claim, where, verdict, measured))
    return [*found, _limits(limits)]


Verdict = tuple[str, str]


def _cell(recorded: Recorded, plan: str, **place: str) -> CellResult:
    """The first cell of a plan with these entries; KeyError where it is not recorded."""
    for r in recorded[plan]:
        if place.items() <= r.cell.place.items():
            return r
    raise KeyError(f"{plan}: {', '.join(place.values())}")


def _entries(recorded: Recorded, plan: str, axis: str) -> list[str]:
    return list(dict.fromkeys(r.cell.place[axis] for r in recorded[plan]))


def _left(r: CellResult, q: int | None = None) -> float:
    return 100 * metrics.accuracy_at(table.fooled_at(r.attacked), q or r.cell.budget)


def _points(d: Difference) -> str:
    return f"{100 * d.value:+.1f} ± {100 * d.spread:.1f}"


def _verdict(held: int, of: int) -> str:
    return HOLDS if held == of else FAILS if held == 0 else PARTLY


def _accuracy_unchanged(recorded: Recorded) -> Verdict:
    texts, kept = [], 0
    networks = _entries(recorded, "table2", "network")
    for network in networks:
        none, paper, ours = (
            _cell(recorded, "table2", network=network, defense=d, attack="Square")
            for d in ("None", "AAA-linear", "AAA-linear, fitted")
        )
        changed = [_changed(r) for r in (paper, ours)]
        difference = sheets.clean_difference(paper, none)
        kept += difference.sign == 0
        texts.append(
            f"{network} {_points(difference)} points, labels changed {changed[0]} (Adam), {changed[1]} (exact)"
        )
    return _verdict(kept, len(networks)), "; ".join(texts)


def _changed(r: CellResult) -> int:
    return int((sheets.shown(r)[0].argmax(1) != sheets.undefended(r).argmax(1)).sum())


def _calibration(recorded: Recorded) -> Verdict:
    texts, lower = [], 0
    networks = _entries(recorded, "table2", "network")
    for network in networks:
        none, paper, ours = (
            _cell(recorded, "table2", network=network, defense=d, attack="Square")
            for d in ("None", "AAA-linear", "AAA-linear, fitted")
        )
        before, after, fitted = (100 * metrics.ece(*sheets.shown(r)) for r in (none, paper, ours))
        lower += after < 0.88 * before
        texts.append(f"{network} {before:.2f} → {after:.2f} % with the paper's tau, {fitted:.2f} % fitted")
    return _verdict(lower, len(networks)), "; ".join(texts)


def _above(recorded: Recorded, plan: str, others: list[str], attacks: list[str]) -> Verdict:
    """Whether AAA-linear is above the other defenses of a plan under all attacks, at 100 and 2,500 queries."""
    signs, worst = [], ("", Difference(np.inf, 0.0))
    for network in _entries(recorded, plan, "network"):
        for attack in attacks:
            ours = _cell(recorded, plan, network=network, defense="AAA-linear", attack=attack)
            for other in others:
                theirs = _cell(recorded, plan, network=network, defense=other, attack=attack)
                for q in (100, 2500):
                    d = sheets.accuracy_difference(ours, theirs, q)
                    signs.append(d.sign)
                    if d.value < worst[1].value:
                        worst = f"{network}, {attack} at {q} against {other}", d
    above, below = signs.count(1), signs.count(-1)
    text = (
        f"above in {above} of {len(signs)} comparisons, below in {below}, the others within the spread; the worst is "
    )
    return _verdict(len(signs) - below if above else 0, len(signs)), text + f"{worst[0]}: {_points(worst[1])} points"


def _above_at_and_rnd(recorded: Recorded) -> Verdict:
    return _above(recorded, "table2", ["AT", "RND"], _entries(recorded, "table2", "attack"))


def _above_the_others(recorded: Recorded) -> Verdict:
    return _above(recorded, "table3", ["DENT", "PNI", "TRS"], ["Square", "QueryNet"])


def _grows_with_the_bound(recorded: Recorded) -> Verdict:
    texts, leads = [], []
    for bound in _entries(recorded, "table7", "bound"):
        ours = _cell(recorded, "table7", attack="Square", defense="AAA-linear", bound=bound)
        others = [_cell(recorded, "table7", attack="Square", defense=d, bound=bound) for d in ("AT", "AT (L2)", "RND")]
        best = max(others, key=_left)
        leads.append(sheets.accuracy_difference(ours, best, 2500))
        texts.append(f"{bound}: {_points(leads[-1])} (over {best.cell.place['defense']})")
    values = [d.value for d in leads]
    grows = values == sorted(values)
    return (HOLDS if grows and leads[-1].sign > 0 else FAILS), "lead over the best other defense: " + "; ".join(texts)


def _adaptive(recorded: Recorded) -> Verdict:
    texts, right = [], []
    for defense, breaks in (("AAA-linear", True), ("AAA-sine", False)):
        greedy = _cell(recorded, "table6", defense=defense, attack="Square")
        for attack in ("bi-Square", "op-Square"):
            d = sheets.accuracy_difference(_cell(recorded, "table6", defense=defense, attack=attack), greedy, 100)
            right.append((d.sign < 0) == breaks)
            texts.append(f"{attack} on {defense} {_points(d)}")
    return _verdict(sum(right), len(right)), "change against Square, in points: " + "; ".join(texts)


def _losses(recorded: Recorded) -> Verdict:
    texts, near = [], []
    for network in _entries(recorded, "table8", "network"):
        for defense in ("AT", "AT-AAA-linear"):
            cells = {loss: _cell(recorded, "table8", network=network, defense=defense, loss=loss)
                     for loss in _entries(recorded, "table8", "loss")}  # fmt: skip
            base = cells.pop("logits-margin")
            for loss, r in cells.items():
                d = sheets.accuracy_difference(r, base, 2500)
                near.append(d.sign == 0)
                texts.append(f"{network}, {defense}, {loss} {_points(d)}")
    return _verdict(sum(near), len(near)), "against the logit margin, at 2,500: " + "; ".join(texts)


def _plugin(recorded: Recorded) -> Verdict:
    texts, better = [], []
    for network in _entries(recorded, "table8", "network"):
        plain, both = (
            _cell(recorded, "table8", network=network, defense=d, loss="logits-margin") for d in ("AT", "AT-AAA-linear")
        )
        d = sheets.accuracy_difference(both, plain, 2500)
        better.append(d.sign > 0)
        change = sheets.ece_difference(both, plain)
        texts.append(f"{network}: accuracy left {_points(d)}, ECE {_points(change)} points")
    return _verdict(sum(better), len(better)), "; ".join(texts)


def _steps(recorded: Recorded) -> Verdict:
    full = _cell(recorded, "table5", kappa="100")
    texts, near = [], []
    for kappa in ("60", "80", "exact"):
        r = _cell(recorded, "table5", kappa=kappa)
        d, change = sheets.accuracy_difference(r, full, 100), sheets.ece_difference(r, full)
        if kappa != "exact":
            near += [d.sign >= 0, change.sign <= 0]
        texts.append(f"kappa {kappa}: accuracy left {_points(d)}, ECE {_points(change)}")
    return _verdict(sum(near), len(near)), "against 100 steps, in points: " + "; ".join(texts)


def _decisions(recorded: Recorded) -> Verdict:
    texts, weak = [], []
    for bound in _entries(recorded, "table7", "bound"):
        labels = _cell(recorded, "table7", attack="RamBo", bound=bound)
        scores = _cell(recorded, "table7", attack="Square", defense="None", bound=bound)
        if bound in ("L2 0.5", "L2 1.0"):
            weak.append(_left(labels) > _left(labels, 1) - 10)
        texts.append(f"{bound}: RamBo leaves {_left(labels):.0f} %, Square {_left(scores):.0f} %")
    return _verdict(sum(weak), len(weak)), "; ".join(texts)


def _early(recorded: Recorded) -> Verdict:
    texts, small = [], []
    for network in _entries(recorded, "table2", "network"):
        r = _cell(recorded, "table2", network=network, defense="AAA-linear", attack="Square")
        lost = _left(r, 100) - _left(r, 2500)
        small.append(lost < 1)
        texts.append(f"{network} {lost:.1f} points")
    return _verdict(sum(small), len(small)), "lost between 100 and 2,500 queries of Square: " + "; ".join(texts)


def _temperature(recorded: Recorded) -> Verdict:
    texts, falls = [], []
    for axis, rising in (("tau", True), ("alpha", True), ("beta", False)):
        cells = [r for r in recorded["figure4"] if axis in r.cell.place]
        if len(cells) < 2:
            raise KeyError(axis)
        values = [(float(r.cell.place[axis]), sheets.fitted(r)[-1]["temperature"]) for r in cells]
        values = sorted(values, reverse=not rising)  # defense is emphasised more and more
        rank = np.corrcoef(np.arange(len(values)), [t for _, t in values])[0, 1]
        falls.append(bool(rank < 0))
        texts.append(f"{axis} " + ", ".join(f"{v:g}: {t:.2f}" for v, t in values))
    return _verdict(sum(falls), len(falls)), "T as defense counts more – " + "; ".join(texts)


def _limits(rows: list[dict[str, Any]] | None) -> Judged:
    claim = "AAA does not help against attackers who have the network, or who transfer from another"
    if not rows:
        return Judged(claim, "section 6", OPEN, "not recorded: python benchmarks/limits.py")
    share = {(row["attacker"], row["defense"]): 100 * row["accuracy"] for row in rows}
    text = "; ".join(
        f"{attacker}: undefended {share[attacker, 'None']:.1f} %, AAA-linear {share[attacker, 'AAA-linear']:.1f} %, AT "
        f"{share[attacker, 'AT']:.1f} %" for attacker in ("white-box", "transfer")
    )  # fmt: skip
    same = all(abs(share[a, "None"] - share[a, "AAA-linear"]) < 2 for a in ("white-box", "transfer"))
    return Judged(claim, "section 6", HOLDS if same else FAILS, f"{text} (n = {rows[0]['n']})")


CLAIMS: list[tuple[str, str, Callable[[Recorded], Verdict]]] = [
    ("AAA does not hurt accuracy", "table 2", _accuracy_unchanged),
    ("AAA-linear reduces the ECE by more than 12 % of it", "section 5.3", _calibration),
    ("AAA is above AT and RND under every score-based attack", "table 2", _above_at_and_rnd),
    ("Under a point is lost from 100 to 2,500 queries", "table 2", _early),
    ("AAA is above DENT, PNI and TRS under Square and QueryNet", "table 3", _above_the_others),
    ("60 to 80 steps of Adam are enough", "table 5", _steps),
    ("The temperature falls as defense is emphasised", "figure 4", _temperature),
    ("Searching both ways, or the other way, weakens AAA-linear and not AAA-sine", "table 6", _adaptive),
    ("Decision-based attacks are weak at small bounds (0.5 and 1.0)", "table 7", _decisions),
    ("AAA's lead grows with the bound", "table 7", _grows_with_the_bound),
    ("The attacker's loss does not matter", "table 8", _losses),
    ("On top of adversarial training, AAA adds defense", "table 8", _plugin),
]
"""Claim, where the paper makes it, and what judges it."""
