"""What a plan records beside its attacks: settings, scores of unseen images, losses along an attack. Writes nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from queryfoil import table
from queryfoil.attacks import settings
from queryfoil.chunks import Job
from queryfoil.data import Images
from queryfoil.oracle import Model, answers
from queryfoil.prepare import Prepared, clean_answers
from queryfoil.run import run
from queryfoil.store import CellStore
from queryfoil.task import Task


def scores(model: Model, images: Images, seed: int) -> pa.Table:
    """A model's scores of images, uncounted."""
    columns = [images.ids.cpu().numpy(), images.labels.cpu().numpy()]
    return pa.table([*columns, table.scores_column(clean_answers(model, images, seed))], schema=table.CLEAN)


def to_trace(p: Prepared, stored: CellStore) -> list[int]:
    """Positions of the images that the plan wants losses of, if these are not on disk.

    The first that survive the cell's attack, then the last to fall. Only for attacks with the rule `greedy`, which have
    a current point that goes down.
    """
    if len(table.traced(stored.read(table.trace_file(p.cell.n), table.TRACE))) >= p.cell.trace:
        return []
    if settings(p.attack).get("accept") != "greedy":
        raise ValueError(f"{p.label}: trace is for attacks with the acceptance rule greedy; leave it out")
    fooled_at = table.fooled_at(stored.attacked(p.cell.n))
    positions: list[int] = np.argsort(-fooled_at, kind="stable")[: p.cell.trace].tolist()
    return positions


def trace(job: Job, network: Model, defended: bool) -> pa.Table:
    """Both losses along attacks on the job's images: on the undefended network, and on the model if it is defended.

    The margin that the attacker does not see comes from an uncounted replay of its queries.
    """
    attacked: dict[str, Model] = {"undefended": network} | ({"defended": job.model} if defended else {})
    parts = []
    for position in range(len(job)):
        task = replace(job.task.rows(slice(position, position + 1)), loss="margin")
        for path, attacked_model in attacked.items():
            x = _images_sent(job, attacked_model, task)
            ids, queries = task.ids.expand(len(x)), torch.arange(1, len(x) + 1, device=x.device)
            along = replace(task, labels=task.labels.expand(len(x)), targets=_expand(task.targets, len(x)))
            true, shown = (
                along.margin(answers(m, x, ids, queries, task.seed)).double().cpu().numpy()
                for m in (network, job.model)
            )
            columns = [[path] * len(x), ids.cpu().numpy(), queries.cpu().numpy(), true, shown]
            parts.append(pa.table(columns, schema=table.TRACE))
    return pa.concat_tables(parts)


def describe(p: Prepared) -> dict[str, Any]:
    """What cell.json says of a cell."""
    return {
        "cell": p.key,
        "settings": p.cell.settings(),
        "fitted": p.fitted,
        "hyper": settings(p.attack),
        "deterministic": bool(getattr(p.model, "deterministic", True)),
        "model": p.network.identity,
        "code": p.code,
    }


def _images_sent(job: Job, model: Model, task: Task) -> Tensor:
    """All queries of the job's attack on another model, one after the other."""
    sent: list[Tensor] = []
    run(job.attack, model, task, job.budget, observe=lambda ids, queries, images, scores: sent.append(images))
    return torch.cat(sent)


def _expand(values: Tensor | None, n: int) -> Tensor | None:
    return None if values is None else values.expand(n)
