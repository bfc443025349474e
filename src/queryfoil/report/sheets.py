"""A plan's cells as a table in the paper's form: ours beside the paper's numbers, and whether its order holds here."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from queryfoil import metrics, table
from queryfoil.layout import Layout
from queryfoil.plan import Plan
from queryfoil.report import worst
from queryfoil.summary import CellResult

LEVEL = 2.0  # standard errors that a difference must exceed


class Value(NamedTuple):
    """One entry: ours, and the paper's (empty where it has none)."""

    ours: str
    paper: str


class Line(NamedTuple):
    """A row of the table; `order` says whether the paper's order of the columns holds here."""

    label: str
    values: dict[str, Value]
    order: str


class Sheet(NamedTuple):
    """A table: the names of its columns, and its rows."""

    columns: list[str]
    lines: list[Line]


class Difference(NamedTuple):
    """A difference of two cells on the same images, and its spread (two standard errors, or half a 95 % interval)."""

    value: float
    spread: float

    @property
    def sign(self) -> int:
        """1 or -1 where the difference exceeds its spread, else 0."""
        return int(np.sign(self.value)) if abs(self.value) > self.spread else 0


def shown(r: CellResult) -> tuple[metrics.Floats, NDArray[np.int64]]:
    """Probabilities (N, K) that the model shows of the unseen images, and the labels (N,)."""
    probs = metrics.probabilities(table.scores(r.clean, "scores"), "logits")
    return probs, np.asarray(r.clean.column("label"))


def undefended(r: CellResult) -> metrics.Floats:
    """The same of the undefended network (N, K)."""
    return metrics.probabilities(table.scores(r.clean, "undefended_scores"), "logits")


def fitted(r: CellResult) -> list[dict[str, Any]]:
    """The cell's defenses with all settings, those that were fitted among them."""
    pairs = zip(r.cell.defense_settings(), r.info["fitted"], strict=True)
    return [{**layer, **(found or {})} for layer, found in pairs]


def accuracy_difference(a: CellResult, b: CellResult, q: int) -> Difference:
    """Accuracy left at q of one cell minus that of another, on the images that both attacked."""
    n = min(len(a.attacked), len(b.attacked))
    assert np.array_equal(*(r.attacked.column("id").to_numpy()[:n] for r in (a, b))), "cells of other images"
    left = [(table.fooled_at(r.attacked)[:n] > q).astype(float) for r in (a, b)]
    return paired(left[0] - left[1])


def clean_difference(a: CellResult, b: CellResult) -> Difference:
    """Clean accuracy on the unseen images of one cell minus that of another."""
    hits = [(probs.argmax(1) == labels).astype(float) for probs, labels in (shown(a), shown(b))]
    return paired(hits[0] - hits[1])


def ece_difference(a: CellResult, b: CellResult) -> Difference:
    """ECE on the unseen images of one cell minus that of another."""
    (probs, labels), (others, _) = shown(a), shown(b)
    value, interval = metrics.ece_difference(probs, others, labels)
    return Difference(value, max(value - interval.low, interval.high - value))


def ece_change(r: CellResult) -> Difference:
    """ECE on the unseen images minus that of the undefended network."""
    probs, labels = shown(r)
    value, interval = metrics.ece_difference(probs, undefended(r), labels)
    return Difference(value, max(value - interval.low, interval.high - value))


def clean_change(r: CellResult) -> Difference:
    """Clean accuracy on the unseen images minus that of the undefended network."""
    (probs, labels), raw = shown(r), undefended(r)
    return paired((probs.argmax(1) == labels).astype(float) - (raw.argmax(1) == labels).astype(float))


def paired(differences: NDArray[np.float64]) -> Difference:
    """Mean of differences of each image (N,), with its spread.

    Two standard errors, taken as if one more image had changed each way: a few images that all changed the same way say
    less than their small variance (four of 200 would exceed two standard errors, but not a sign test at 5 %).
    """
    n = len(differences)
    square = float((differences**2).sum() + 2) / (n + 2) - float(differences.sum() / (n + 2)) ** 2
    return Difference(float(differences.mean()), float(LEVEL * np.sqrt(square / n)))


def row_label(layout: Layout, r: CellResult) -> str:
    """The row of a cell: its entries on the axes of the rows."""
    return ", ".join(r.cell.place[axis] for axis in layout.rows if axis in r.cell.place)


def sheet(plan: Plan, results: Sequence[CellResult]) -> Sheet:
    """The table of a plan with a layout."""
    layout = plan.layout
    assert layout is not None
    placed = [r for r in results if layout.columns in r.cell.place]
    columns = list(dict.fromkeys(r.cell.place[layout.columns] for r in placed))
    lines: list[Line] = []
    if layout.users is not None:
        for group, cells in groups(placed, layout.users, layout.columns).items():
            for name, text, difference in (
                ("ECE", _ece, ece_difference),
                ("Acc", _clean, clean_difference),
                *([("AUROC", _auroc, None)] if layout.worst else []),
            ):
                label = ", ".join([*group, name])
                paper = plan.paper.get(label, {})
                values = {c: Value(text(found[0]), paper.get(c, "")) for c, found in cells.items()}
                by = [lambda a, b, d=difference: d(a, b)]
                pairs = [] if layout.over or difference is None else _pairs(cells, paper, by, [None])
                lines.append(Line(label, values, _order(pairs, layout.ours)))
    if layout.worst:
        for group, cells in groups(placed, layout.users or (), layout.columns).items():
            values = {c: Value(worst.text(found, layout.at), "") for c, found in cells.items()}
            lines.append(Line(", ".join([*group, WORST]), {c: v for c, v in values.items() if v.ours}, ""))
            if layout.ceiling in cells:
                below = {c: worst.text_behind(found, cells[layout.ceiling], layout.at) for c, found in cells.items()}
                values = {c: Value(text, "") for c, text in below.items() if text and c != layout.ceiling}
                lines.append(Line(", ".join([*group, f"less {layout.ceiling}"]), values, ""))
    for group, cells in groups(placed, layout.rows, layout.columns).items():
        for what in layout.show:
            label = ", ".join(group) if len(layout.show) == 1 else {"queries": "average queries"}.get(what, what)
            paper = plan.paper.get(label, {})
            values = {c: Value(_left(found, what, layout), paper.get(c, "")) for c, found in cells.items()}
            by_q = [lambda a, b, q=q: accuracy_difference(a, b, q) for q in layout.at]
            pairs = [] if layout.over or what == "queries" else _pairs(cells, paper, by_q, layout.at)
            lines.append(Line(label, values, _order(pairs, layout.ours)))
    return Sheet(columns, lines)


WORST = "worst of all"


Groups = dict[tuple[str, ...], dict[str, list[CellResult]]]


def groups(results: Sequence[CellResult], axes: Sequence[str], columns: str) -> Groups:
    """Cells by their entries on some axes, then by column."""
    found: Groups = {}
    for r in results:
        group = tuple(r.cell.place[axis] for axis in axes if axis in r.cell.place)
        found.setdefault(group, {}).setdefault(r.cell.place[columns], []).append(r)
    return found


def _ece(r: CellResult) -> str:
    low, high = metrics.ece_interval(*shown(r))
    return f"{100 * metrics.ece(*shown(r)):.2f} ± {50 * (high - low):.2f}"


def _clean(r: CellResult) -> str:
    probs, labels = shown(r)
    hits = int((probs.argmax(1) == labels).sum())
    return f"{100 * hits / len(labels):.1f} ± {_half(hits, len(labels)):.1f}"


def _auroc(r: CellResult) -> str:
    """How well the confidence tells right answers from wrong ones, in percent, with half a bootstrap interval."""
    probs, labels = shown(r)
    values = np.array([metrics.auroc(probs[rows], labels[rows]) for rows in metrics.bootstrap(len(labels), draws=200)])
    if np.isnan(metrics.auroc(probs, labels)):
        return "–"  # no wrong answer, or no right one
    found = metrics.percentiles(values[~np.isnan(values)])
    return f"{100 * metrics.auroc(probs, labels):.1f} ± {50 * (found.high - found.low):.1f}"


def _left(cells: Sequence[CellResult], what: str, layout: Layout) -> str:
    """Accuracy left, or average queries, at each number of queries; over seeds, mean ± deviation, and how many."""
    found = []
    for q in layout.at:
        fooled = [table.fooled_at(r.attacked) for r in cells]
        values = [
            100 * metrics.accuracy_at(f, q) if what == "accuracy" else metrics.average_queries(f, q) for f in fooled
        ]
        if layout.over and len(values) > 1:
            found.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} ({len(values)})")
        elif what == "accuracy":
            found.append(f"{values[0]:.1f} ± {_half(int((fooled[0] > q).sum()), len(fooled[0])):.1f}")
        else:
            found.append(f"{values[0]:.1f}")
    return " / ".join(found)


def _half(hits: int, n: int) -> float:
    """Half of the 95 % interval of a share, in points."""
    low, high = metrics.wilson(hits, n)
    return 50 * (high - low)


class Pair(NamedTuple):
    """Two columns of which the paper says that `first` has the larger number, and our difference of them."""

    first: str
    second: str
    at: int | None
    ours: Difference


def numbers(text: str) -> list[float]:
    """The numbers of an entry of the paper: "81.77 +- 0.24 / 81.00 +- 0.25" as 81.77 and 81.

    >>> numbers("39.38 / 00.09")
    [39.38, 0.09]
    """
    return [float(re.split(r"\+-", part)[0]) for part in text.split("/")] if text else []


def _pairs(
    cells: dict[str, list[CellResult]], paper: dict[str, str], differences: Any, at: Sequence[Any]
) -> list[Pair]:
    found = []
    known = [c for c in cells if c in paper]
    for a, b in itertools.combinations(known, 2):
        for q, difference, x, y in zip(at, differences, numbers(paper[a]), numbers(paper[b]), strict=False):
            if x != y:
                first, second = (a, b) if x > y else (b, a)
                found.append(Pair(first, second, q, difference(cells[first][0], cells[second][0])))
    return found


def _order(pairs: Sequence[Pair], ours: str | None) -> str:
    """How many of the paper's pairs hold here, which are open (within the spread), and which are turned round.

    `ours` is the column that the paper argues for.
    """
    if not pairs:
        return ""
    held = sum(p.ours.sign > 0 for p in pairs)
    turned = [p for p in pairs if p.ours.sign < 0]
    text = f"holds in {held} of {len(pairs)}"
    if still := len(pairs) - held - len(turned):
        text += f", open in {still}"
    if turned:
        shown_first = sorted(turned, key=lambda p: ours not in (p.first, p.second))[:2]
        text += f", turned round in {len(turned)}: " + "; ".join(
            f"{p.second} above {p.first}"
            + (f" at {p.at}" if p.at else "")
            + f" by {-100 * p.ours.value:.1f} ± {100 * p.ours.spread:.1f}"
            for p in shown_first
        )
        text += "; ..." if len(turned) > 2 else ""
    return text


def sweep(axis: str, results: Sequence[CellResult]) -> list[str]:
    """Lines of Markdown: what the values on an axis of settings of AAA do, a column each."""
    cells = [r for r in results if axis in r.cell.place]
    budget = cells[0].cell.budget
    rows = {
        "accuracy": [_clean(r) for r in cells],
        "ECE": [_ece(r) for r in cells],
        f"accuracy left at {budget}": [_left([r], "accuracy", Layout(columns=axis, at=(budget,))) for r in cells],
        "temperature": [f"{fitted(r)[-1]['temperature']:.2f}" for r in cells],
    }
    lines = [f"| {axis} | " + " | ".join(r.cell.place[axis] for r in cells) + " |", "|---|" + "---:|" * len(cells)]
    return lines + [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]


def markdown(found: Sheet) -> list[str]:
    """The table as lines of Markdown: ours, and below it the paper's in italics."""
    order = any(line.order for line in found.lines)
    headings = ["", *found.columns, *(["the paper's order"] if order else [])]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * len(found.columns) + "---|" * order]
    for line in found.lines:
        entries = [_entry(line.values.get(column)) for column in found.columns]
        lines.append("| " + " | ".join([line.label, *entries, *([line.order] if order else [])]) + " |")
    return lines


def _entry(value: Value | None) -> str:
    if value is None:
        return ""
    return value.ours + (f"<br>*{value.paper.replace('+-', '±')}*" if value.paper else "")
