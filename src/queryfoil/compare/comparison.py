"""Matching the cells of two runs, and what differs between them."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from queryfoil.compare import measures, runs
from queryfoil.compare.measures import Measure
from queryfoil.compare.runs import HASHES, Facts, Run, Subject
from queryfoil.data import DATASETS

LEVEL = 0.05
"""How often an interval leaves out 0 where nothing differs."""


@dataclass(frozen=True)
class Pair:
    """Two cells that belong together, on the `n` images that both have. `scores_of` names the pair above with the same
    scores of unseen images, of which there is no figure here."""

    a: Subject
    b: Subject
    n: int
    same: bool  # each of these images has the same outcome, queries and scores
    differs: tuple[str, ...]  # settings, code, versions
    measures: tuple[Measure, ...]
    scores_of: str | None

    @property
    def label(self) -> str:
        return self.a.label if self.a.label == self.b.label else f"{self.a.label} | {self.b.label}"

    @property
    def images(self) -> str:
        """How many images are compared, and of how many."""
        a, b = len(self.a.ids), len(self.b.ids)
        return f"n = {self.n}" if a == b == self.n else f"n = {self.n} in both, of {a} in A and {b} in B"


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. `apart` holds pairs that cannot be compared, each with the reason."""

    a: Run
    b: Run
    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    apart: tuple[tuple[str, str], ...]

    @property
    def same(self) -> bool:
        """Whether both runs have the same cells, with the same result on each image."""
        whole = all(len(p.a.ids) == len(p.b.ids) == p.n for p in self.pairs)
        return whole and all(p.same for p in self.pairs) and not (self.only_a or self.only_b or self.apart)

    @property
    def counted(self) -> list[Measure]:
        """All comparisons that could have been marked by chance."""
        return [m for p in self.pairs for m in p.measures if m.counts]

    @property
    def marked(self) -> int:
        return sum(m.direction != 0 for m in self.counted)

    @property
    def everywhere(self) -> tuple[str, ...]:
        """What differs in every pair; said once where there are several."""
        if len(self.pairs) < 2:
            return ()
        return tuple(line for line in self.pairs[0].differs if all(line in p.differs for p in self.pairs))


def compare(
    first: str | Path,
    second: str | Path,
    pairs: Sequence[str] = (),
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Compare two finished folders of `queryfoil bench` or `queryfoil attack`: by default, cells of the same label.

    `pairs`, as "LABEL_A=LABEL_B", compares those alone, whatever else there is; so two defenses of one folder are
    compared, too. Two folders with a cell each need none. `report` is told how many of how many are done. Same folders,
    same result. ValueError for a folder that is no finished run, and where there is nothing to compare.
    """
    a, b = runs.read(first), runs.read(second)
    matched = _matched(a, b, pairs)
    found: list[Pair] = []
    apart: list[tuple[str, str]] = []
    measured: dict[tuple[str, str], tuple[str, bool, list[Measure]]] = {}
    for done, (x, y) in enumerate(matched):
        report(done, len(matched))
        reason = _reason(x, y)
        if reason:
            apart.append((x.label if x.label == y.label else f"{x.label} | {y.label}", reason))
        else:
            found.append(_pair(x, y, measured))
    if not found:
        lines = [f"  {label}: {reason}" for label, reason in apart]
        raise ValueError("expected cells on the same images, but there are none:\n" + "\n".join(lines))
    left = [[label for label in run.subjects if label not in {s.label for s in side}]
            for run, side in zip((a, b), zip(*matched, strict=True), strict=True)]  # fmt: skip
    only_a, only_b = ((), ()) if pairs else (tuple(left[0]), tuple(left[1]))
    return Comparison(a, b, tuple(found), only_a, only_b, tuple(apart))


def _pair(x: Subject, y: Subject, measured: dict[tuple[str, str], tuple[str, bool, list[Measure]]]) -> Pair:
    rows = measures.common(x, y)
    same = np.array_equal(x.fooled_at[:, rows[0]], y.fooled_at[:, rows[1]]) and all(
        np.array_equal(x.details[name][rows[0]], y.details[name][rows[1]]) for name in x.details if name in y.details
    )
    found, scores_of = measures.under_attack(x, y, rows), None
    if x.scores is not None and y.scores is not None:
        key = (x.scores.key, y.scores.key)
        if key in measured:
            scores_of = measured[key][0]
        else:
            i, j = measures.common(x.scores, y.scores)
            equal = len(i) == len(x.scores.ids) == len(y.scores.ids) and np.array_equal(
                x.scores.probs[i], y.scores.probs[j]
            )
            label = x.label if x.label == y.label else f"{x.label} | {y.label}"
            measured[key] = (label, bool(equal), measures.of_scores(x.scores, y.scores))
            found += measured[key][2]
        same = same and measured[key][1]
    return Pair(x, y, len(rows[0]), bool(same), differing(x.facts, y.facts), tuple(found), scores_of)


def _matched(a: Run, b: Run, pairs: Sequence[str]) -> list[tuple[Subject, Subject]]:
    if pairs:
        return [_asked(text, a, b) for text in pairs]
    if len(a.subjects) == len(b.subjects) == 1:
        return [(next(iter(a.subjects.values())), next(iter(b.subjects.values())))]
    found = [(subject, b.subjects[label]) for label, subject in a.subjects.items() if label in b.subjects]
    if not found:
        raise ValueError(
            f"expected cells of the same label, but {a.folder} has {_some(a.subjects)}, and {b.folder} has "
            f"{_some(b.subjects)}; name those that belong together by --pair 'LABEL_A=LABEL_B'"
        )
    return found


def _asked(text: str, a: Run, b: Run) -> tuple[Subject, Subject]:
    """The two cells of "LABEL_A=LABEL_B"; labels may have equals signs themselves."""
    cuts = [i for i, sign in enumerate(text) if sign == "="]
    found = [(text[:i], text[i + 1 :]) for i in cuts if text[:i] in a.subjects and text[i + 1 :] in b.subjects]
    if len(found) == 1:
        return a.subjects[found[0][0]], b.subjects[found[0][1]]
    if found:
        raise ValueError(
            f"expected a pair LABEL_A=LABEL_B with one meaning, but {text!r} can be cut in {len(found)} ways"
        )
    left, equals, right = text.partition("=")
    if not equals:
        raise ValueError(f"expected a pair as LABEL_A=LABEL_B, but got {text!r}")
    near = [
        f"{run.folder} has {_some(difflib.get_close_matches(label, run.subjects, 3, 0) or run.subjects)}"
        for label, run in ((left, a), (right, b))
        if label not in run.subjects
    ]
    raise ValueError(f"expected labels of cells in --pair, but got {text!r}; {', and '.join(near)}")


def _some(labels: Any, most: int = 4) -> str:
    names = list(labels)
    return "; ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _reason(x: Subject, y: Subject) -> str:
    """Why two subjects cannot be compared; empty if they can."""
    names = [subject.dataset.partition("=")[0] for subject in (x, y)]
    if names[0] != names[1] and all(name in DATASETS for name in names):
        return f"other images: {names[0]} in A, {names[1]} in B"
    if not len(measures.common(x, y)[0]):
        return "no image of the same id and label in both"
    return ""


def differing(a: Facts, b: Facts) -> tuple[str, ...]:
    """What two subjects differ in, a line for each group: values of A / B.

    >>> differing({"settings": {"seed": "0", "n": "30"}}, {"settings": {"seed": "1", "n": "30"}})
    ('settings: seed 0 / 1',)
    """
    lines = []
    for group in (name for name in a if name in b):
        names = [n for n in dict.fromkeys([*a[group], *b[group]]) if a[group].get(n) != b[group].get(n)]
        if group in HASHES:  # code that only one has belongs to an attack or a defense that only one has
            texts = [n for n in names if n in a[group] and n in b[group]]
        elif group == "attackers":
            only = {"A": [n for n in names if n in a[group]], "B": [n for n in names if n in b[group]]}
            texts = [f"only in {side}: {'; '.join(found)}" for side, found in only.items() if found]
        else:
            texts = [_values(n, *(facts[group].get(n, "–") for facts in (a, b))) for n in names]
        if texts:
            lines.append(f"{group}{',' if group == 'attackers' else ':'} {', '.join(texts)}")
    return tuple(lines)


def _values(name: str, a: str, b: str) -> str:
    short = [_short(a), _short(b)]
    short = [a, b] if short[0] == short[1] else short
    return name if max(map(len, short)) > 40 else f"{name} {short[0]} / {short[1]}"


def _short(value: str) -> str:
    """A number with four digits."""
    try:
        return f"{float(value):.4g}" if "." in value else value
    except ValueError:
        return value
