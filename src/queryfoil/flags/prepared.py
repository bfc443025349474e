"""`queryfoil check`: the flags of a model of yours, on images of yours, as a page and a file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from queryfoil import attacking, files, pictures, provenance
from queryfoil.attacking import Prepared, Request
from queryfoil.chunks import Progress
from queryfoil.flags import pages
from queryfoil.flags.check import check, expected
from queryfoil.flags.flag import Flag
from queryfoil.models.zoo import on_device

FILES = ("check.json", "check.html")


@dataclass(frozen=True)
class Ready:
    """A model and images in memory, and what the short attacks will cost at most."""

    prepared: Prepared
    calibration: Tensor | None
    budget: int
    queries: int
    rate: float  # a second

    @property
    def estimate(self) -> str:
        """What is about to happen, in a sentence."""
        return (
            f"{len(self.prepared)} images; at most {self.queries:,} queries of short attacks, about "
            f"{max(self.queries / self.rate / 60, 0.1):.1f} minutes at {self.rate:,.0f} queries a second, and some "
            "10,000 uncounted calls for the flags of its answers"
        )


def ready(request: Request, out: str | Path, calibration: str | None = None, device: str = "cpu") -> Ready:
    """Load all and look whether the folder can be used; ValueError that says what is wrong."""
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= set(FILES)):
        raise ValueError(f"expected {folder} to be new, empty or of `queryfoil check`, but it holds other files")
    if request.budget < 8:
        raise ValueError(f"expected a budget of at least 8 queries an image, but got {request.budget}")
    prepared = attacking.prepare(request, device)
    task = prepared.task
    fitted_on = None if calibration is None else on_device(pictures.read(calibration).images, device).images
    queries, rate = expected(prepared.model, task.images, task.ids, task.norm, request.budget, raw=True)
    return Ready(prepared, fitted_on, request.budget, queries, rate)


def run(now: Ready, out: str | Path, report: Callable[[Progress], None] = lambda progress: None) -> list[Flag]:
    """Judge all flags and write check.json and check.html into the folder."""
    p = now.prepared
    task = p.task
    flags = check(
        p.model, task.images, task.labels, raw=p.victim, norm=task.norm, eps=task.eps, seed=task.seed,
        budget=now.budget, ids=task.ids, calibration=now.calibration,
        report=lambda label, units, total, queries: report(Progress(label, units, total, queries)),
    )  # fmt: skip
    request, versions = p.request, provenance.versions()
    defense = {"name": request.defense, **request.defense_hyper, "fitted": p.fitted}
    facts: dict[str, Any] = {
        "model": request.model,
        "model_hashes": p.victim.identity,
        "defense": None if request.defense is None else defense,
        "images": request.images,
        "n": len(p),
        "norm": task.norm,
        "eps": task.eps,
        "budget": now.budget,
        "seed": task.seed,
        "images_hash": provenance.tensors(task.images, task.labels, task.ids),
    }  # fmt: skip
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in facts.items() if value is not None]
    data = json.dumps(pages.as_json(facts, flags, versions), indent=1, allow_nan=False) + "\n"
    page = pages.html(request.name, lines, flags, versions)
    _write(Path(out), data, page)
    return flags


def _write(folder: Path, data: str, page: str) -> None:
    """Both files, so that a killed process never leaves a page beside other data than its own."""
    json_file, html_file = (folder / name for name in FILES)
    html_file.unlink(missing_ok=True)  # of an earlier check
    files.write_text(json_file, data)
    files.write_text(html_file, page)
