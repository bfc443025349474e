"""The account of a whole reproduction: claims, tables and figures of all recorded plans, as one Markdown page."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from queryfoil import files, provenance, store, summary
from queryfoil.plan import Plan
from queryfoil.report import cells, claims, figures, overview, page, sheets
from queryfoil.store import Store
from queryfoil.summary import CellResult

ODDITIES = {
    "table2": "Nearly all of the paper's ImageNet accuracies under attack are multiples of its clean accuracy over "
    "1,000: they were rescaled from images that the network got right. Its scripts run Square at p = 0.3 on "
    "adversarially trained networks and on ImageNet, and Bandits at an online learning rate of 100 where table 11 "
    "prints 0.01. SignHunter, NES and Bandits minimize the cross-entropy there, SimBA the probability, where the text "
    "speaks of the margin; how their queries were counted is not known. What the text says "
    "of its ECE (more than 12 % less) is 11.8 % on ResNeXt-101, and its AAA above all has exceptions in the table: "
    "Bandits at 100 on WideResNet-28 (AT 83.62, AAA 80.86), NES at 2,500 on ResNeXt-101 (RND 69.30, AAA 68.51).",
    "table3": "The released code evaluates PNI and TRS with the statistics of the batch, TRS without its input "
    "normalization; here both are in evaluation mode. DENT's loss and optimizer are those that the paper names, not "
    "those of DENT's own configuration.",
    "table5": "The paper's time per image is from a GPU: 1.016 ms undefended, and 1.034, 1.088, 1.099, 1.143 and "
    "1.163 ms with 20 to 100 steps, 1.02 to 1.14 times as much; ours is one run's ratio to the undefended network.",
    "table6": "The paper's 94.78 for op-Square on the undefended network means no success at all. By the rules here "
    "that cannot be: the first stripes are queries that count, and already fool images.",
    "table9": "The paper counts 10,000 images a run, and its seeds share one window for all images of a batch, which "
    "makes images depend on each other. Multiply-adds of the paper's networks are 5.243, 11.398 and 16.414 G here, by "
    "`tests/test_architectures.py`, where it has 5.24, 11.43 and 16.48.",
    "figure4": "The paper prints neither its grids nor its numbers; the grids are ours. The released code's default is "
    "tau 4, and its sine curve has alpha 0.7 whatever is asked for.",
    "table7": "Which network adversarially trained in L2 the paper used is not known.",
}
"""What is odd about the published numbers, by plan."""

SMALL = (
    "The small scale runs on the networks and images that ship with the library (Fashion-MNIST, L-inf 16/255, which is "
    "as long as 8/255 of CIFAR-10 in L2). The names in the tables are those of the paper, whose networks they stand "
    "for. Its absolute numbers are not expected here; its orderings are judged. DENT, QueryNet and RamBo have 100 "
    "images where others have more; QueryNet has its small surrogates."
)
PAPER = (
    "At the paper's scale CIFAR-10 is attacked on the 9,000 test images that calibration did not see (the paper "
    "attacks all 10,000), and ImageNet on one validation image of each class."
)
SETTINGS = (
    "`AAA-linear` and `AAA-sine` have the paper's settings (Adam, tau 6, the temperature of the lowest ECE; the "
    "released commands run with a temperature of 1); `fitted` ones what `fit` finds. Each query counts as in "
    "[counting](counting.md), probes included, which is stricter than the code behind some of the paper's numbers, and "
    "every image is floored to 8 bits, as there. Calibration images are never attacked; the release attacks them too."
)

TABLE_1 = (
    "On the network in the place of WideResNet-28. Accuracy and ECE in points, with their spread; test cost as time "
    "over that of the undefended network, in one run on one thread; training cost as passes of a training image, by "
    "the recipes; accuracy left under 2,500 queries of Square. In italics the paper's judgement."
)


def write(folder: str | Path, out: str | Path) -> list[claims.Judged]:
    """Write the page, with its figures in a folder beside it, from the plans recorded in `folder`; gives the claims."""
    source, target = Path(folder), Path(out)
    stores = [Store(path.parent) for path in sorted(source.glob("*/plan.json"))]
    if not stores:
        raise ValueError(f"expected folders of `queryfoil bench` in {source}, but there is none")
    found: dict[str, tuple[Plan, list[CellResult]]] = {}
    for folder_of_plan in stores:
        plan, results = summary.collect(folder_of_plan, partly=True)
        if plan.name in found:
            raise ValueError(f"expected one folder a plan in {source}, but {plan.name} is in several")
        found[plan.name] = plan, results
    judged = claims.judge(found, _rows(source / "limits.json"))
    lines = [*_head(found), "## The paper's claims", "", "| claim | where | here | measured |", "|---|---|---|---|"]
    lines += [f"| {c.claim} | {c.where} | **{c.verdict}** | {c.measured} |" for c in judged]
    costs = [row for name in ("table3", "table2") for row in _rows(source / f"cost-{name}.json") or []]
    if first := overview.table_1({name: results for name, (_, results) in found.items()}, costs):
        lines += ["", "## Table 1 of the paper: what each kind of defense costs and brings, measured", "", *first, ""]
        lines += [TABLE_1]
    for name in sorted(found, key=_place):
        plan, results = found[name]
        if plan.scale is not None and results:  # those of the paper
            lines += ["", f"## {plan.about}", "", *_section(plan, results, source, target)]
    lines += ["", "## Table 11 of the paper: hyper-parameters of the attacks", "", *overview.table_11()]
    files.write_text(target, "\n".join(lines) + "\n")
    return judged


def _head(found: dict[str, tuple[Plan, list[CellResult]]]) -> list[str]:
    total = [r for plan, results in found.values() if plan.scale is not None for r in results]  # of the paper's plans
    keys = {r.info["cell"]: r for r in sorted(total, key=lambda r: r.cell.n)}  # of several sizes the largest
    rows = [_cost(r) for r in keys.values()]
    versions = [v for r in keys.values() for v in r.info["versions"]]
    commits = sorted({v["commit"][:12] + "+" * v["commit"].endswith("+") for v in versions if v.get("commit")})
    threads = sorted({v["threads"] for v in versions if v.get("threads")})
    scales = {plan.scale for plan, _ in found.values()}
    return [
        "# The paper's experiments, repeated",
        "",
        f"Generated by `queryfoil reproduction` from the recorded results: {len(keys):,} cells, "
        f"{sum(q for q, _ in rows):,} queries, {sum(s for _, s in rows) / 3600:.1f} hours on {' or '.join(threads)} "
        "thread each.",
        "",
        page.BESIDE,
        "",
        *([SMALL, ""] if "small" in scales else []),
        *([PAPER, ""] if "paper" in scales else []),
        SETTINGS,
        "",
        f"Computed at {'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}. Any plan is run again by "
        "`queryfoil bench NAME --out DIR`, at the paper's scale with `--scale paper`.",
        "",
    ]


def _is_stale(r: CellResult) -> bool:
    """Whether the code that decides a cell has changed since it was recorded."""
    return any(_code(module) != hashed for module, hashed in r.info["code"].items())


@functools.cache
def _code(module: str) -> str:
    try:
        return provenance.code([module])
    except ValueError:  # no longer there
        return ""


def _cost(r: CellResult) -> tuple[int, float]:
    """Queries, and seconds that they took."""
    return int(np.asarray(r.attacked.column("queries")).sum()), store.seconds(r.attacked)


def _section(plan: Plan, results: Sequence[CellResult], source: Path, target: Path) -> list[str]:
    assert plan.layout is not None
    swept = dict.fromkeys(axis for r in results for axis in r.cell.place if axis in figures.SWEPT)
    lines = sheets.markdown(sheets.sheet(plan, results))
    if "sweep" in plan.layout.figures:
        lines = [line for axis in swept for line in (*sheets.sweep(axis, results), "")]
    missing = len(plan.cells) - len(results)
    stale = sum(_is_stale(r) for r in results)
    sizes, seeds = (sorted({getattr(r.cell, name) for r in results}) for name in ("n", "seed"))
    networks = dict.fromkeys(
        f"{r.cell.place['network']}: `{r.cell.model}`" for r in results if "network" in r.cell.place
    )
    costs = [_cost(r) for r in results]
    lines += [
        "",
        f"n = {', '.join(map(str, sizes))}; seed {', '.join(map(str, seeds))}; {len(results)} cells, "
        f"{sum(q for q, _ in costs):,} queries in {sum(s for _, s in costs) / 60:.0f} minutes"
        + (f"; **{missing} more cells are not recorded yet**" if missing else "")
        + (f"; **{stale} are of other code than now**" if stale else "")
        + f". Networks: {', '.join(networks)}.",
    ]
    if timed := _rows(source / f"cost-{plan.name}.json"):
        axes = [a for a in ("network", plan.layout.columns) if len({row["place"][a] for row in timed}) > 1]
        names = [", ".join(row["place"][axis] for axis in dict.fromkeys(axes)) for row in timed]
        ratios = "; ".join(
            f"{name} {row['ratio']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})"
            for name, row in zip(names, timed, strict=True)
        )
        lines += ["", f"Time of an image over that of the undefended network, with quartiles: {ratios}."]
        if all("multiply_adds" in row for row in timed):
            counts = "; ".join(f"{name} {row['multiply_adds']:.1f}" for name, row in zip(names, timed, strict=True))
            lines += ["", f"Multiply-adds of an image, in millions: {counts}."]
    if plan.name in ODDITIES:
        lines += ["", f"About the paper's numbers: {ODDITIES[plan.name]}"]
    for picture in figures.all_of(plan, results) if plan.name.startswith("figure") else []:
        for name, content in picture.files().items():
            if name.endswith(".png"):
                path = target.parent / "images" / "reproduction" / f"{plan.name}-{name}"
                with files.replacing(path) as temporary:
                    temporary.write_bytes(content)
                lines += ["", f"![{picture.title}]({path.relative_to(target.parent)})", "", f"*{picture.caption}*"]
    rows = [{**r.cell.settings(), "hyper": r.info["hyper"]} for r in results]
    lines += ["", *dict.fromkeys(f"- {cells.attack_setting(row)}" for row in rows)]
    return lines


def _rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a benchmark's file, where it was run."""
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.is_file() else None


def _place(name: str) -> tuple[bool, int, str]:
    """Tables first, by number."""
    digits = "".join(c for c in name if c.isdigit())
    return not name.startswith("table"), int(digits or 0), name
