"""Flags as text: a section of a report, a table, and the page that `queryfoil check` writes."""

from collections.abc import Sequence
from typing import Any

from queryfoil.flags.flag import FLAGS, KINDS, Flag
from queryfoil.page import page

Flagged = Sequence[tuple[str, list[Flag]]]
"""Flags by the name of the defense that they are about."""

INTRODUCTION = (
    "What says that a defense only looks strong. A verdict: the measurement or the defense is broken, do not trust the "
    "number; a property: true of this defense, know it. Each is explained in the library's docs/flags.md."
)


def raised(flags: Flagged) -> Flagged:
    """The raised flags of each defense; verdicts first."""
    return [(name, sorted((f for f in found if f.raised), key=lambda f: f.kind != "verdict")) for name, found in flags]


def unjudged(flags: Flagged) -> str:
    """Flags that could be judged for no defense, each with what is missing."""
    missing = {flag.id: flag.missing for _, found in flags for flag in found if flag.status == "not judged"}
    known = {flag.id for _, found in flags for flag in found if flag.status != "not judged"}
    return "; ".join(f"{id} {FLAGS[id].name} (missing: {what})" for id, what in missing.items() if id not in known)


def section(flags: Flagged) -> list[str]:
    """Lines of Markdown for a report; none without flags."""
    if not flags:
        return []
    lines = ["## Flags", "", INTRODUCTION, ""]
    for name, found in raised(flags):
        lines.append(f"- **{name}**" + ("" if found else ": none raised"))
        lines += [f"  - {f.id} {f.name} ({f.kind}): {f.measured}. Why it matters: {f.why}. `{f.page}`" for f in found]
    left_out = unjudged(flags)
    return [*lines, "", *([f"Not judged: {left_out}.", ""] if left_out else [])]


def html(title: str, facts: list[str], flags: list[Flag], versions: dict[str, str]) -> str:
    """The page of `queryfoil check`: one file, no script, no network."""
    return page(
        "flags/check.html.j2", title=title, facts=facts, kinds=KINDS, counts=counts(flags),
        groups=[(status, [f for f in flags if f.status == status]) for status in ("raised", "clear", "not judged")],
        versions=", ".join(f"{name} {value}" for name, value in versions.items() if value),
    )  # fmt: skip


def counts(flags: list[Flag]) -> str:
    """How many are raised, in a sentence."""
    found = [f for f in flags if f.raised]
    verdicts = sum(f.kind == "verdict" for f in found)
    unknown = sum(f.status == "not judged" for f in flags)
    return (
        f"{len(found)} of {len(flags)} flags are raised (verdicts: {verdicts}, properties: {len(found) - verdicts}); "
        f"{unknown} are not judged"
    )


def as_json(facts: dict[str, Any], flags: list[Flag], versions: dict[str, str]) -> dict[str, Any]:
    """What check.json holds."""
    return {**facts, "flags": [flag.as_json() for flag in flags], "versions": versions}
