"""Running a plan: cell by cell, each in chunks, so that a killed run continues."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from queryfoil import measuring, table
from queryfoil.chunks import CHUNK, Chunks, Outcome, Progress, space
from queryfoil.cluster import Ray
from queryfoil.plan import Plan
from queryfoil.prepare import Folders, Prepared, Preparing, Supplies, sources
from queryfoil.store import CellStore, Store


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
    engine: Ray | None = None,
) -> Outcome:
    """Run what is missing of a plan in folder `out`; `report.write` then makes the report of it.

    `data_folder` is the folder of the plan's data set, or a mapping from names of data sets to folders. Of a data set
    that ships in part, accuracy and calibration are then measured on all test images that nothing was fitted on,
    instead of the shipped ones; of any other, on all images of the attack split. `time_limit` in seconds stops at the
    end of a chunk. Everything is checked and prepared before the first query. The chunk size does not change a result.
    Cells lie in `out`, or in the folder `share`, where other plans find them: no image is attacked twice in the same
    way. Without `keep_images`, the adversarial images are not stored. `supplies` prepares the cells; by default, from
    what the plan names. `engine` has the work done by a cluster instead of this process, with the same result; `device`
    is then where this process prepares it.
    """
    computed_on = device
    if engine is not None:
        engine.check_installed()
        computed_on = engine.computes_on(device)
    folder = Store(out, share=share)
    folder.check(plan)
    supplies = supplies or Supplies(sources(plan, data_folder), device, computed_on)
    prepared = [supplies.prepare(cell) for cell in plan.cells]
    stores = [folder.cell(p.key) for p in prepared]
    chunks = Chunks(prepared, stores, chunk, time_limit, report, keep_images)
    folder.claim(plan, {p.label: p.key for p in prepared}, {p.label: [p.shown, p.undefended] for p in prepared})
    with space(out):
        if engine is None:
            _one_by_one(prepared, stores, folder, chunks)
        else:
            from queryfoil.cluster import driver  # which needs Ray

            driver.run(engine, prepared, stores, folder, chunks)
    return chunks.outcome


def _one_by_one(prepared: Sequence[Prepared], stores: Sequence[CellStore], folder: Store, chunks: Chunks) -> None:
    """All the work in this process."""
    for number, (p, s) in enumerate(zip(prepared, stores, strict=True)):
        s.write_json(measuring.describe(p))
        if not chunks.attack(number, p):
            break
        for name, model in ((p.shown, p.model), (p.undefended, p.network)):
            kept = folder.scores(name)
            if kept.read(table.SCORES_FILE, table.CLEAN) is None:
                kept.write(table.SCORES_FILE, measuring.scores(model, p.unseen, p.cell.seed))
        if positions := measuring.to_trace(p, s):
            job = replace(p, task=p.task.rows(torch.tensor(positions, device=p.task.ids.device)))
            s.write(table.trace_file(p.cell.n), measuring.trace(job, p.network, bool(p.cell.defenses)))
