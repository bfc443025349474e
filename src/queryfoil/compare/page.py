"""Writing a comparison: compare.json, compare.md and compare.html."""

import json
from pathlib import Path

from queryfoil import files
from queryfoil.compare import forest, words
from queryfoil.compare.comparison import Comparison
from queryfoil.page import page

HEADINGS = ("", "A", "B", "B − A", "")


def write(c: Comparison, folder: str | Path) -> None:
    """Write the three files into a folder, which is made if need be."""
    out = Path(folder)
    files.write_text(out / "compare.json", json.dumps(words.as_json(c), indent=1, allow_nan=False) + "\n")
    files.write_text(out / "compare.md", markdown(c))
    files.write_text(out / "compare.html", html(c))


def markdown(c: Comparison) -> str:
    """The comparison as a table, for an issue or a pull request."""
    lines = ["# Two runs", "", words.heading(c) + ".", "", words.verdict(c), ""]
    if c.everywhere:
        lines += ["In every cell, A / B differ in:", "", *(f"- {line}" for line in c.everywhere), ""]
    if not c.same:
        lines += ["| cell | figure | A | B | B − A | |", "|---|---|---:|---:|---:|---|"]
        for p in c.pairs:
            for first, m in zip([True] + [False] * len(p.measures), p.measures, strict=False):
                values = (words.value(m, m.a), words.value(m, m.b), words.difference(m), words.mark(m))
                lines.append(f"| {_cell(p.label) if first else ''} | {m.name} | {' | '.join(values)} |")
        lines += ["", *(f"- {p.label}: {'; '.join(words.about(p, c.everywhere))}" for p in c.pairs), ""]
    lines += [*(f"- {line}" for line in words.remainder(c)), *([""] if words.remainder(c) else []), words.READ, ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def html(c: Comparison) -> str:
    """One page with everything inside: no script, no network."""
    pairs = [
        (
            p,
            words.about(p, c.everywhere),
            [(m, words.value(m, m.a), words.value(m, m.b), words.difference(m), words.mark(m)) for m in p.measures],
        )
        for p in c.pairs
    ]
    return page(
        "compare/compare.html.j2", c=c, pairs=pairs, pictures=forest.all_of(c), verdict=words.verdict(c),
        read=words.READ, remainder=words.remainder(c),
    )  # fmt: skip
