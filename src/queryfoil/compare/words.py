"""A comparison as text: how its numbers are written, in every form that it is shown in."""

from typing import Any

import numpy as np

from queryfoil.compare.comparison import LEVEL, Comparison, Pair
from queryfoil.compare.measures import DRAWS, Measure
from queryfoil.report.cells import percent

MARKS = {1: "▲ higher", -1: "▼ lower", 0: ""}
READ = (
    "B − A, with its 95 % interval: a paired bootstrap over the images that both have, by id and label. ▲ and ▼ stand "
    "where the interval leaves out 0. Percent; differences in points. Clean accuracy and accuracy left are shares of "
    "the attacked images; mean and median queries are over those that both answer correctly at first, survivors "
    "counted with the smaller budget; ECE and AUROC are on the images that nothing was fitted on."
)


def value(measure: Measure, number: float) -> str:
    """A figure of A or of B."""
    if np.isnan(number):
        return "–"
    return percent(number) if measure.kind == "share" else f"{number:.1f}"


def difference(measure: Measure) -> str:
    """B - A with its interval: "-8.8 (-12.2 to -5.4)"; "=" where every image is the same."""
    if measure.equal:
        return "= on every image"
    if np.isnan(measure.difference):
        return "–"
    scale, digits = (100, 2 if measure.name == "ECE" else 1) if measure.kind == "share" else (1, 1)
    d, low, high = (f"{scale * v + 0.0:+.{digits}f}" for v in (measure.difference, measure.low, measure.high))
    return d if np.isnan(measure.low) else f"{d} ({low} to {high})"


def mark(measure: Measure) -> str:
    """▲ higher or ▼ lower where the difference is beyond noise."""
    return MARKS[measure.direction] if measure.counts else ""


def heading(c: Comparison) -> str:
    """What A and B are."""
    return f"A: {c.a.folder} ({c.a.name}); B: {c.b.folder} ({c.b.name})"


def verdict(c: Comparison) -> str:
    """The comparison in a sentence."""
    worst = sum(p.a.worst for p in c.pairs)
    cells = f"{_many(len(c.pairs) - worst, 'cell')}" + (f" and {_many(worst, 'worst case')}" if worst else "")
    if c.same:
        images = sum(p.n for p in c.pairs if not p.a.worst)
        return f"The same, image by image: {cells}, {images:,} attacked images."
    alike, counted = sum(p.same for p in c.pairs), len(c.counted)
    same = f", of which {alike} {'is' if alike == 1 else 'are'} the same, image by image" if alike else ""
    return (
        f"{cells} in both{same}; of {_many(counted, 'figure')} that differ, {c.marked} beyond noise. {_chance(counted)}"
    )


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _chance(counted: int) -> str:
    return (
        f"So many are compared at once that about {LEVEL * counted:.2g} would be marked by chance if nothing differed: "
        "the intervals are of single differences."
    )


def about(p: Pair, everywhere: tuple[str, ...]) -> list[str]:
    """Lines below the label of a pair: its images, what differs, where its scores are."""
    lines = [p.images + (", the same, image by image" if p.same else "")]
    lines += [line for line in p.differs if line not in everywhere]
    return lines + ([f"ECE and AUROC: as for {p.scores_of}"] if p.scores_of else [])


def remainder(c: Comparison) -> list[str]:
    """What was not compared."""
    lines = [f"not compared, {label}: {reason}" for label, reason in c.apart]
    for name, labels in (("A", c.only_a), ("B", c.only_b)):
        if labels:
            lines.append(f"only in {name} ({len(labels)}): {'; '.join(labels)}")
    return lines


def as_json(c: Comparison) -> dict[str, Any]:
    """What compare.json holds: shares in [0, 1], null where there is no value."""
    return {
        "a": {"folder": str(c.a.folder), "name": c.a.name},
        "b": {"folder": str(c.b.folder), "name": c.b.name},
        "same": c.same,
        "differ": len(c.counted),
        "beyond_noise": c.marked,
        "expected_by_chance": LEVEL * len(c.counted),
        "draws": DRAWS,
        "pairs": [_pair(p) for p in c.pairs],
        "only_a": list(c.only_a),
        "only_b": list(c.only_b),
        "not_compared": [{"label": label, "reason": reason} for label, reason in c.apart],
    }


def _pair(p: Pair) -> dict[str, Any]:
    return {
        "label_a": p.a.label,
        "label_b": p.b.label,
        "n": p.n,
        "n_a": len(p.a.ids),
        "n_b": len(p.b.ids),
        "same": p.same,
        "differs": list(p.differs),
        "scores_of": p.scores_of,
        "figures": [
            {
                "name": m.name,
                "unit": m.kind,
                **{k: None if np.isnan(v) else v for k, v in
                   (("a", m.a), ("b", m.b), ("difference", m.difference), ("low", m.low), ("high", m.high))},
                "n": m.n,
                "equal": m.equal,
                "beyond_noise": m.counts and m.direction != 0,
            }
            for m in p.measures
        ],
    }  # fmt: skip
