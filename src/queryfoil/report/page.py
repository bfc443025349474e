"""Writing the report of a folder: summary.json, images.parquet, report.md, report.html, and the figures alone."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from queryfoil import files, summary
from queryfoil.attacks import TACTICS
from queryfoil.flags import pages, stored
from queryfoil.layout import Layout
from queryfoil.page import page
from queryfoil.plan import Plan
from queryfoil.report import cells, figures, sheets
from queryfoil.report.cells import Row
from queryfoil.report.drawing import Picture
from queryfoil.store import Store

LIMITS = (
    "These attacks minimize what they are shown and do not know the defense. AAA protects scores against such "
    "attackers; it leaves the network and its adversarial examples as they are."
)


NUMBERS = "Percent, with half a 95 % interval; several numbers are for several numbers of queries."

BESIDE = (
    f"{NUMBERS} In italics the paper's. The last column compares each pair of columns that the paper tells apart: a "
    "difference is open where it is within two standard errors, on the same images (for ECE, half a bootstrap "
    "interval)."
)


def write(folder: str | Path) -> list[Row]:
    """Make the report of a finished folder from what is stored there, without the model; gives its rows."""
    out = Path(folder)
    plan, results = summary.collect(Store(out))
    rows = summary.rows(plan, results)
    files.write_text(out / "summary.json", json.dumps(rows, indent=1, allow_nan=False) + "\n")
    with files.replacing(out / "images.parquet") as temporary:
        pq.write_table(summary.images(results), temporary, compression="zstd")
    pictures = figures.all_of(plan, results)
    sheet = None if plan.layout is None else sheets.sheet(plan, results)
    for picture in pictures:
        for name, content in picture.files().items():
            with files.replacing(out / "figures" / name) as temporary:
                temporary.write_bytes(content)
    flags = stored.of_folder(results)
    files.write_text(out / "report.md", markdown(plan, rows, sheet, flags))
    files.write_text(out / "report.html", html(plan, rows, pictures, sheet, flags))
    return rows


def limits(rows: list[Row]) -> str:
    """What the attacks of a table do not cover."""
    if any("reading" in row["hyper"] or row["accept"] in TACTICS for row in rows):
        return (
            "Attackers who use the label alone are not stopped by any defense of scores. Others may know more than "
            "those of this table, or search in other ways: what is left under the worst of these is no guarantee."
        )
    left_out = ["who know the curve"]
    if all(row["accept"] == "greedy" for row in rows):
        left_out.insert(0, "who search in the opposite direction")
    if all(row["loss"] is not None for row in rows):
        left_out.append("who use the label alone")
    return f"{LIMITS} Attackers {' or '.join(left_out)} are not stopped by it and are not part of this table."


def headline(rows: list[Row]) -> str:
    """The result in a sentence, best and worst alike."""
    budgets = {row["budget"] for row in rows}
    left = [f"{r['label']}: {cells.percent(r['accuracy'][str(r['budget'])])}" for r in rows]
    if len(budgets) > 1:
        left = [f"{text} ({row['budget']})" for text, row in zip(left, rows, strict=True)]
    after = f"{budgets.pop()} queries" if len(budgets) == 1 else "the queries in brackets"
    return f"Accuracy left after {after} an image – {'; '.join(left)}."


def _lead(plan: Plan, rows: list[Row], sheet: sheets.Sheet | None) -> str | None:
    """The result in a sentence, where one is enough: without a table, or as the worst of all attacks."""
    if sheet is None:
        return headline(rows)
    if plan.layout is None or not plan.layout.worst:
        return None
    at = " / ".join(map(str, plan.layout.at))
    texts = []
    for line in sheet.lines:
        if line.label.endswith(sheets.WORST):
            group = line.label.removesuffix(sheets.WORST).rstrip(", ")
            left = "; ".join(f"{column}: {value.ours}" for column, value in line.values.items())
            texts.append(f"{group}: {left}" if group else left)
    if not any(cell.loss is not None for cell in plan.cells):
        return None  # attacks that see labels alone have no worst case of those that see scores
    return (
        f"Accuracy left after {at} queries an image under the worst attack for each image (in brackets, of how many "
        f"that see scores) – {' | '.join(texts)}. {_attackers(plan, plan.layout)}"
    )


def _attackers(plan: Plan, layout: Layout) -> str:
    """The attacks that the worst case is the worst of: those on all defenses, and the further ones of some."""
    names: dict[str, dict[str, None]] = {}
    for cell in plan.cells:
        if cell.loss is not None:
            name = ", ".join(cell.place[axis] for axis in layout.rows if axis not in (layout.users or ()))
            names.setdefault(cell.place[layout.columns], {})[name] = None
    common = [name for name in next(iter(names.values())) if all(name in found for found in names.values())]
    texts = ["; ".join(common)]
    for column, found in names.items():
        if further := [name for name in found if name not in common]:
            texts.append(f"On {column} also {'; '.join(further)}")
    return f"The attacks: {'. '.join(texts)}."


def _beside(plan: Plan) -> str:
    """How the numbers of a plan's table are to be read."""
    return BESIDE if plan.paper else NUMBERS


def markdown(plan: Plan, rows: list[Row], sheet: sheets.Sheet | None, flags: pages.Flagged = ()) -> str:
    """The table and its conditions, for a README or an issue."""
    columns = cells.columns(rows)
    lines = [f"# {plan.name}", "", plan.about + ".", ""]
    lines += [line for text in (_lead(plan, rows, sheet), sheet and _beside(plan)) if text for line in (text, "")]
    lines += [*sheets.markdown(sheet), ""] if sheet else []
    lines += [
        f"| {cells.subject(rows)} | " + " | ".join(c.heading for c in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in rows:
        texts = [f"{e.value} ({e.detail})" if e.detail else e.value for e in cells.entries(row, cells.points(rows))]
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in (row["label"], *texts)) + " |")
    lines += ["", "In brackets: 95 % interval and number of images.", ""]
    lines += [f"- {c.heading}: {c.meaning}" for c in columns]
    lines += ["", *(f"- {line}" for line in _settings(rows)), "", limits(rows), "", *pages.section(flags)]
    return "\n".join(lines)


def html(
    plan: Plan, rows: list[Row], pictures: list[Picture], sheet: sheets.Sheet | None, flags: pages.Flagged = ()
) -> str:
    """One page with everything inside: no script, no network."""
    return page(
        "report/page.html.j2",
        described=_described,
        plan=plan,
        headline=_lead(plan, rows, sheet),
        sheet=sheet,
        beside=_beside(plan),
        subject=cells.subject(rows),
        columns=cells.columns(rows),
        rows=[(row, cells.entries(row, cells.points(rows))) for row in rows],
        limits=limits(rows),
        flags=pages.raised(flags),
        unjudged=pages.unjudged(flags),
        pictures=pictures,
        settings=_settings(rows),
        versions=_versions(rows),
    )


def _settings(rows: list[Row]) -> list[str]:
    """What was attacked and how, each setting once."""
    return list(dict.fromkeys(cells.setting(row) for row in rows))


def _versions(rows: list[Row]) -> list[str]:
    """What computed the rows, each combination once."""
    found = dict.fromkeys(tuple(versions.items()) for row in rows for versions in row["versions"])
    return [", ".join(f"{name} {value}" for name, value in one if value) for one in found]


def _described(defense: dict[str, Any]) -> str:
    """A defense with the values that were used, fitted ones included."""
    names = ("curve", "tau", "alpha", "beta", "temperature", "solver")
    found = {k: v for k, v in (defense["fitted"] or {}).items() if k in names}
    given = {k: v for k, v in defense.items() if k not in ("name", "fit", "fitted")}
    arguments = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in {**given, **found}.items())
    return f"{defense['name']}({arguments})"
