"""From a folder of results to the rows of a report: pure functions of what is stored, no model needed."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from queryfoil import metrics, store, table
from queryfoil.metrics import Interval
from queryfoil.plan import Cell, Plan, Settings, digest
from queryfoil.store import Store

DRAWS = 200
"""Resamples for the intervals of what the scores are worth."""


@dataclass(frozen=True)
class CellResult:
    """One finished cell: what was run, and its tables."""

    cell: Cell
    info: dict[str, Any]  # cell.json
    attacked: pa.Table
    clean: pa.Table
    trace: pa.Table

    @property
    def label(self) -> str:
        return self.cell.label


def collect(folder: Store, partly: bool = False) -> tuple[Plan, list[CellResult]]:
    """The finished cells of a folder, in the plan's order; ValueError that counts what is missing, unless `partly`."""
    plan, keys, scores = folder.plan()
    found = {cell.label: _read(cell, folder, keys[cell.label], scores[cell.label]) for cell in plan.cells}
    missing = [label for label, result in found.items() if result is None]
    if missing and not partly:
        raise ValueError(
            f"{len(missing)} of {len(plan.cells)} cells in {folder.folder} are not finished "
            f"({', '.join(missing)}); run `queryfoil bench` on this folder again"
        )
    return plan, [result for result in found.values() if result is not None]


def _read(cell: Cell, folder: Store, key: str, scores: list[str]) -> CellResult | None:
    s = folder.cell(key)
    attacked = s.attacked(cell.n)
    if len(attacked) < cell.n or not (s.folder / "cell.json").is_file():
        return None
    info = s.read_json() | {"versions": s.versions()}
    shown, raw = (folder.scores(name).read(table.SCORES_FILE, table.CLEAN) for name in scores)
    trace = s.read(table.trace_file(cell.n), table.TRACE) if cell.trace else table.TRACE.empty_table()
    if shown is None or raw is None or len(table.traced(trace)) < cell.trace:
        return None
    return CellResult(cell, info, attacked, shown.append_column("undefended_scores", raw.column("scores")), trace)


def rows(plan: Plan, results: list[CellResult]) -> list[dict[str, Any]]:
    """What summary.json holds: one dictionary a cell, rates as shares in [0, 1]."""
    measured: dict[object, dict[str, Any]] = {}
    found = []
    for r in results:
        served = (r.cell.dataset, r.cell.seed, digest([r.cell.model_settings(), r.cell.defense_settings()]))
        if served not in measured:  # whatever the attack
            measured[served] = _alone(_user_side(r.clean)) if r.cell.audited else _user_side(r.clean)
        found.append(_row(plan, r, measured[served]))
    return found


def _row(plan: Plan, r: CellResult, user_side: dict[str, Any]) -> dict[str, Any]:
    cell = r.cell
    return {
        "label": cell.label,
        "model": cell.model,
        "dataset": cell.dataset,
        "defenses": [d | {"fitted": f} for d, f in zip(cell.defense_settings(), r.info["fitted"], strict=True)],
        **attack_side(cell, r.info["hyper"], r.attacked, plan.report_at),
        **user_side,
        "cell": r.info["cell"],
        "versions": r.info["versions"],
    }


def attack_side(
    settings: Settings, hyper: dict[str, Any], attacked: pa.Table, report_at: tuple[int, ...]
) -> dict[str, Any]:
    """How an attack was run, and what it did to the images."""
    fooled_at = table.fooled_at(attacked)
    points = sorted({q for q in report_at if q <= settings.budget} | {settings.budget})
    return {
        "attack": settings.attack,
        "hyper": hyper,
        "accept": settings.accept,
        "loss": settings.loss,
        "norm": settings.norm,
        "eps": settings.eps,
        "targeted": settings.targeted,
        "seed": settings.seed,
        "n": len(attacked),
        "budget": settings.budget,
        "clean_accuracy": metrics.accuracy_at(fooled_at, 1),
        "clean_accuracy_interval": _accuracy_interval(fooled_at, 1),
        "accuracy": {str(q): metrics.accuracy_at(fooled_at, q) for q in points},
        "accuracy_interval": {str(q): _accuracy_interval(fooled_at, q) for q in points},
        "average_queries": {str(q): _number(metrics.average_queries(fooled_at, q)) for q in points},
        "average_queries_interval": {str(q): _mean_interval(np.minimum(fooled_at[fooled_at > 1], q)) for q in points},
        "average_queries_of_successes": {
            str(q): _number(metrics.average_queries_of_successes(fooled_at, q)) for q in points
        },
        "average_queries_of_successes_interval": {
            str(q): _mean_interval(fooled_at[(fooled_at > 1) & (fooled_at <= q)]) for q in points
        },
        **_confirmed(attacked),
        "queries_total": int(np.asarray(attacked.column("queries")).sum()),
        "seconds": store.seconds(attacked),
    }


def _user_side(clean: pa.Table) -> dict[str, Any]:
    """What a user of the scores gets: on the images that nothing was fitted on."""
    shown, raw = (metrics.probabilities(table.scores(clean, c), "logits") for c in ("scores", "undefended_scores"))
    labels = np.asarray(clean.column("label"))
    change, interval = metrics.ece_difference(shown, raw, labels)
    correct = int((shown.argmax(1) == labels).sum())
    return {
        "unseen_n": len(labels),
        "unseen_accuracy": correct / len(labels),
        "unseen_accuracy_interval": metrics.wilson(correct, len(labels)),
        "labels_changed": int((shown.argmax(1) != raw.argmax(1)).sum()),
        "ece": metrics.ece(shown, labels),
        "ece_interval": metrics.ece_interval(shown, labels),
        "ece_change": change,
        "ece_change_interval": interval,
        "nll": _number(metrics.nll(shown, labels)),
        "brier": metrics.brier(shown, labels),
        "usefulness": {
            name: {part: _number(value) for part, value in figure._asdict().items()}
            for name, figure in metrics.usefulness(shown, labels, raw, draws=DRAWS).items()
        },
    }


UNDEFENDED = re.compile(r"rank_\w+|spearman|kendall|\w+_change|near_boundary_ece")
"""Figures of usefulness that compare with the undefended network."""


def _alone(user_side: dict[str, Any]) -> dict[str, Any]:
    """The same without what compares with the undefended network, which nobody knows."""
    unknown = dict.fromkeys(("labels_changed", "ece_change", "ece_change_interval"))
    figures = {name: figure for name, figure in user_side["usefulness"].items() if not UNDEFENDED.fullmatch(name)}
    return user_side | unknown | {"usefulness": figures}


def _accuracy_interval(fooled_at: np.ndarray, q: int) -> Interval:
    return metrics.wilson(int((fooled_at > q).sum()), len(fooled_at))


def _mean_interval(values: np.ndarray) -> Interval | None:
    """Bootstrap over images; None where there are none."""
    return metrics.percentiles(values[metrics.bootstrap(len(values))].mean(1)) if len(values) else None


def _confirmed(attacked: pa.Table) -> dict[str, Any]:
    """Mean over successes of the share of fresh queries that they survive; None if that was not asked."""
    values = np.asarray(attacked.column("confirmed").drop_null())
    return {"confirmed": float(values.mean()) if len(values) else None, "confirmed_interval": _mean_interval(values)}


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if np.isfinite(value) else None


def images(results: list[CellResult]) -> pa.Table:
    """What images.parquet holds: one row an image and cell."""
    parts = [
        r.attacked.replace_schema_metadata()
        .add_column(0, "cell", pa.array([r.info["cell"]] * len(r.attacked)))
        .add_column(1, "cell_label", pa.array([r.label] * len(r.attacked)))
        for r in results
    ]
    return pa.concat_tables(parts)
