"""A finished folder of `queryfoil bench` or `queryfoil attack`, as what can be compared: its cells and worst cases."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryfoil import attacking, metrics, store, summary, table
from queryfoil.plan import Plan
from queryfoil.report import sheets
from queryfoil.report.worst import worst
from queryfoil.store import Store
from queryfoil.summary import CellResult

Facts = dict[str, dict[str, str]]
"""What decides a result, by group (the settings, an attack, a defense, what was fitted, code, versions) and name."""

HASHES = ("code", "network")
"""Groups whose values are hashes: only that they differ says something."""


@dataclass(frozen=True)
class Scores:
    """What a model shows of the images that nothing was fitted on: ids and labels (N,), probabilities (N, K)."""

    key: str  # names the file that they come from
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    probs: metrics.Floats


@dataclass(frozen=True)
class Subject:
    """A cell, or the worst case of a defense. `fooled_at` (S, N) has a row a seed, of which a cell has one."""

    label: str
    dataset: str
    at: tuple[int, ...]  # at how many queries its report shows it
    budget: int
    facts: Facts
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    fooled_at: NDArray[np.int64]
    scores: Scores | None = None  # an attack on one's own model has none
    worst: bool = False
    details: dict[str, NDArray[Any]] = field(default_factory=dict)  # (N, ...): what else is the same in the same run


@dataclass(frozen=True)
class Run:
    """A folder of results: its name, and what can be compared by label."""

    folder: Path
    name: str
    subjects: dict[str, Subject]


def read(folder: str | Path) -> Run:
    """Read a finished folder of `queryfoil bench` or `queryfoil attack`.

    ValueError for a run that is not finished, or a folder that is none; FileNotFoundError for none at all.
    """
    out = Path(folder)
    if not out.is_dir():
        raise FileNotFoundError(f"expected a folder of results, but there is no folder {out}")
    if (out / "plan.json").is_file():
        return _bench(out)
    if (out / "attack.json").is_file():
        return _attack(out)
    raise ValueError(
        f"expected a folder of `queryfoil bench` or `queryfoil attack`, but {out} has neither plan.json nor attack.json"
    )


def _bench(out: Path) -> Run:
    folder = Store(out)
    plan, results = summary.collect(folder)
    _, _, names = folder.plan()
    read: dict[str, Scores] = {}
    for r in results:
        key = names[r.label][0]
        if key not in read:
            probs, labels = sheets.shown(r)
            read[key] = Scores(key, np.asarray(r.clean.column("id")), labels, probs)
    scores = {r.label: read[names[r.label][0]] for r in results}
    cells = {r.label: _cell(plan, r, scores[r.label]) for r in results}
    return Run(out, plan.name, {**_worst_cases(plan, results, cells), **cells})


def _cell(plan: Plan, r: CellResult, scores: Scores) -> Subject:
    cell, settings = r.cell, r.cell.settings()
    layers = [
        ({k: v for k, v in layer.items() if k != "name"}, layer["name"], fitted)
        for layer, fitted in zip(settings.pop("defenses"), r.info["fitted"], strict=True)
    ]
    facts = _facts(settings, r.info, layers) | {"code": dict(r.info["code"]), "versions": _versions(r.info["versions"])}
    at = tuple(sorted({q for q in plan.report_at if q <= cell.budget} | {cell.budget}))
    return _subject(cell.label, cell.dataset, at, cell.budget, facts, r.attacked, scores)


def _subject(
    label: str, dataset: str, at: tuple[int, ...], budget: int, facts: Facts, attacked: Any, scores: Scores | None
) -> Subject:
    details = {
        "queries": np.asarray(attacked.column("queries")),
        "target": np.asarray(attacked.column("target").fill_null(-1)),
        "clean_scores": table.scores(attacked, "clean_scores"),
    }
    ids, labels = (np.asarray(attacked.column(name)) for name in ("id", "label"))
    return Subject(
        label, dataset, at, budget, facts, ids, labels, table.fooled_at(attacked)[None], scores, details=details
    )


def _worst_cases(plan: Plan, results: Sequence[CellResult], cells: dict[str, Subject]) -> dict[str, Subject]:
    """The worst case of each column of a layout that has them, by label."""
    layout = plan.layout
    if layout is None or not layout.worst:
        return {}
    found = {}
    placed = [r for r in results if layout.columns in r.cell.place]
    for group, columns in sheets.groups(placed, layout.users or (), layout.columns).items():
        for column, members in columns.items():
            seen = [r for r in members if r.cell.loss is not None]
            case = worst(members)
            if case is not None:
                label = ", ".join([*group, column, sheets.WORST])
                first, budget = cells[seen[0].label], min(r.cell.budget for r in seen)
                facts = _facts_of_all([cells[r.label].facts for r in seen])
                axes = [axis for axis in layout.rows if axis not in (layout.users or ())]
                facts["attackers"] = {", ".join(r.cell.place[a] for a in axes if a in r.cell.place): "" for r in seen}
                facts["settings"].pop("seed", None)
                facts["settings"] |= {"seeds": ", ".join(map(str, dict.fromkeys(r.cell.seed for r in seen)))}
                found[label] = Subject(
                    label,
                    first.dataset,
                    layout.at,
                    budget,
                    facts,
                    first.ids,
                    first.labels,
                    case.first,
                    first.scores,
                    worst=True,
                )
    return found


def _facts_of_all(parts: Sequence[Facts]) -> Facts:
    """Facts that all cells of a worst case have; of code, that of any."""
    merged: Facts = {}
    for group, facts in parts[0].items():
        if all(group in part for part in parts):
            shared = [name for name in facts if all(part[group].get(name) == facts[name] for part in parts)]
            merged[group] = {name: facts[name] for name in shared}
    merged["code"] = {name: value for part in parts for name, value in part["code"].items()}
    return merged


def _attack(out: Path) -> Run:
    folder = Store(out, "attack")
    content = store.read_json(out / "attack.json", "name", "cells", "attack")
    label, key = next(iter(content["cells"].items()))
    cell = folder.cell(key)
    attacked = cell.attacked()
    row = _summary(out / "summary.json")
    if row.get("cell") != key or row.get("n") != len(attacked):
        raise ValueError(
            f"the attack in {out} is not finished; run `queryfoil attack` on this folder again, with the same options"
        )
    info = store.read_json(cell.folder / "cell.json", "cell", "settings", "fitted", "hyper", "model")
    settings = {k: v for k, v in info["settings"].items() if k not in ("fit", "defense", "defense_hyper")}
    settings |= {"dataset": settings.pop("images"), "n": len(attacked)}
    name = info["settings"]["defense"]
    layers = [] if name is None else [(info["settings"]["defense_hyper"], name, info["fitted"])]
    facts = _facts(settings, info, layers) | {"versions": _versions(cell.versions())}
    budget = int(settings["budget"])
    at = tuple(sorted({q for q in attacking.REPORT_AT if q <= budget} | {budget}))
    subject = _subject(label, settings["dataset"], at, budget, facts, attacked, None)
    return Run(out, content["name"], {label: subject})


def _summary(path: Path) -> dict[str, Any]:
    """The row of an attack's summary.json; empty where it is not written yet."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else [{}]
        return dict(rows[0])
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run again") from None


def _facts(
    settings: dict[str, Any], info: dict[str, Any], layers: Sequence[tuple[dict[str, Any], str, dict[str, Any] | None]]
) -> Facts:
    """Of a cell: its settings, hyper-parameters, and the defenses (arguments, name, what was fitted) of its model."""
    base = {k: text(v) for k, v in settings.items() if k != "hyper"}
    facts: Facts = {
        "settings": base | {"defenses": ", then ".join(name for _, name, _ in layers) or "none"},
        f"attack {settings['attack']}": {k: text(v) for k, v in info["hyper"].items()},
        "network": dict(info["model"]),
    }
    for arguments, name, fitted in layers:
        place = name if f"defense {name}" not in facts else f"{name}, again"
        facts[f"defense {place}"] = {k: text(v) for k, v in arguments.items()}
        if fitted is not None:
            facts[f"fit of {place}"] = {k: text(v) for k, v in fitted.items()}
    return facts


def _versions(versions: Sequence[dict[str, str]]) -> dict[str, str]:
    """Each version that computed a part, as text; of a commit, the first digits."""
    names = dict.fromkeys(name for one in versions for name in one)
    found = {name: dict.fromkeys(one[name] for one in versions if one.get(name)) for name in names}
    return {name: " and ".join(v[:10] if name == "commit" else v for v in values) for name, values in found.items()}


def text(value: object) -> str:
    """A setting as text, with all its digits.

    >>> text(0.06274509803921569), text(True), text(None)
    ('0.06274509803921569', 'True', 'none')
    """
    return "none" if value is None else str(value)
