"""Running a plan: cell by cell, each in chunks, so that a killed run continues."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from queryfoil import table
from queryfoil.attacks import settings
from queryfoil.chunks import CHUNK, Chunks, Outcome, Progress, space
from queryfoil.oracle import Model, answers
from queryfoil.plan import Plan
from queryfoil.prepare import Folders, Prepared, Preparing, Supplies, clean_answers, sources
from queryfoil.run import run
from queryfoil.store import CellStore, Store
from queryfoil.task import Task


def bench(
    plan: Plan,
    out: str | Path,
    data_folder: Folders | None = None,
    device: str = "cpu",
    time_limit: float | None = None,
    chunk: int = CHUNK,
    report: Callable[[Progress], None] = lambda progress: None,
    share: str | Path | None = None,
    keep_images: bool = True,
    supplies: Preparing | None = None,
) -> Outcome:
    """Run what is missing of a plan in folder `out`; `report.write` then makes the report of it.

    `data_folder` is the folder of the plan's data set, or a mapping from names of data sets to folders. Of a data set
    that ships in part, accuracy and calibration are then measured on all test images that nothing was fitted on,
    instead of the shipped ones; of any other, on all images of the attack split. `time_limit` in seconds stops at the
    end of a chunk. Everything is checked and prepared before the first query. The chunk size does not change a result.
    Cells lie in `out`, or in the folder `share`, where other plans find them: no image is attacked twice in the same
    way. Without `keep_images`, the adversarial images are not stored. `supplies` prepares the cells; by default, from
    what the plan names.
    """
    folder = Store(out, share=share)
    folder.check(plan)
    supplies = supplies or Supplies(sources(plan, data_folder), device)
    prepared = [supplies.prepare(cell) for cell in plan.cells]
    stores = [folder.cell(p.key) for p in prepared]
    chunks = Chunks(prepared, stores, chunk, time_limit, report, keep_images)
    folder.claim(plan, {p.label: p.key for p in prepared}, {p.label: [p.shown, p.undefended] for p in prepared})
    with space(out):
        for number, (p, s) in enumerate(zip(prepared, stores, strict=True)):
            s.write_json(_describe(p))
            if not chunks.attack(number, p):
                break
            for name, model in ((p.shown, p.model), (p.undefended, p.network)):
                _measure(folder.scores(name), p, model)
            _trace(p, s)
    return chunks.outcome


def _describe(p: Prepared) -> dict[str, Any]:
    return {
        "cell": p.key,
        "settings": p.cell.settings(),
        "fitted": p.fitted,
        "hyper": settings(p.attack),
        "deterministic": bool(getattr(p.model, "deterministic", True)),
        "model": p.network.identity,
        "code": p.code,
    }


def _measure(s: CellStore, p: Prepared, model: Model) -> None:
    """Scores of a model on all images that nothing was fitted on."""
    if s.read(table.SCORES_FILE, table.CLEAN) is None:
        columns = [p.unseen.ids.cpu().numpy(), p.unseen.labels.cpu().numpy()]
        scores = table.scores_column(clean_answers(model, p.unseen, p.cell.seed))
        s.write(table.SCORES_FILE, pa.table([*columns, scores], schema=table.CLEAN))


def _trace(p: Prepared, s: CellStore) -> None:
    """Both losses along an attack on the undefended network, and along one on the defended model.

    On the images that the plan asks for: the first that survive the cell's attack, then the last to fall. The margin
    that the attacker does not see comes from an uncounted replay of its queries. Only for attacks with the rule
    `greedy`, which have a current point that goes down.
    """
    name = table.trace_file(p.cell.n)
    stored = s.read(name, table.TRACE)
    if len(table.traced(stored)) >= p.cell.trace:
        return
    if settings(p.attack).get("accept") != "greedy":
        raise ValueError(f"{p.label}: trace is for attacks with the acceptance rule greedy; leave it out")
    fooled_at = table.fooled_at(s.attacked(p.cell.n))
    chosen = np.argsort(-fooled_at, kind="stable")[: p.cell.trace]
    paths: dict[str, Model] = {"undefended": p.network} | ({"defended": p.model} if p.cell.defenses else {})
    parts = []
    for position in chosen.tolist():
        task = replace(p.task.rows(slice(position, position + 1)), loss="margin")
        for path, attacked_model in paths.items():
            x = _images_sent(p, attacked_model, task)
            ids, queries = task.ids.expand(len(x)), torch.arange(1, len(x) + 1, device=x.device)
            along = replace(task, labels=task.labels.expand(len(x)), targets=_expand(task.targets, len(x)))
            true, shown = (
                along.margin(answers(m, x, ids, queries, task.seed)).double().cpu().numpy()
                for m in (p.network, p.model)
            )
            columns = [[path] * len(x), ids.cpu().numpy(), queries.cpu().numpy(), true, shown]
            parts.append(pa.table(columns, schema=table.TRACE))
    s.write(name, pa.concat_tables(parts))


def _images_sent(p: Prepared, model: Model, task: Task) -> Tensor:
    """All queries of the cell's attack on another model, one after the other."""
    sent: list[Tensor] = []
    run(p.attack, model, task, p.budget, observe=lambda ids, queries, images, scores: sent.append(images))
    return torch.cat(sent)


def _expand(values: Tensor | None, n: int) -> Tensor | None:
    return None if values is None else values.expand(n)
