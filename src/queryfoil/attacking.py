"""Attacking a model of yours on images of yours, with the adversarial images as files."""

import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn

from queryfoil import files, pictures, provenance, summary, table
from queryfoil.attacks import modules, settings
from queryfoil.chunks import CHUNK, Chunks, Job, Outcome, Progress, space
from queryfoil.defenses import DEFENSES, tau_of
from queryfoil.defenses.calibration import Fit
from queryfoil.defenses.terrace_fit import TerraceFit
from queryfoil.models.victim import Victim, classes_of
from queryfoil.models.zoo import on_device
from queryfoil.oracle import answers
from queryfoil.pictures import Pictures
from queryfoil.plan import Defense, Settings, digest, reasons
from queryfoil.prepare import name_of
from queryfoil.protect import load_fit, protect
from queryfoil.report.cells import Row
from queryfoil.store import CellStore, Store
from queryfoil.task import random_targets

REPORT_AT = (100,)
FITTED = {"aaa": Fit, "terraces": TerraceFit}
"""Defenses that are fitted to a model, and what is found."""
WRITTEN = re.compile(r"\d{6,}\.png|\.\d{6,}\.png\..+")
"""Names of adversarial images, and of those half written."""


class Request(Settings):
    """What to attack, on which images, and how; build one with `request`."""

    defense: str | None = None
    defense_hyper: dict[str, float | int | str | bool] = {}  # settings of the defense
    fit: Path | None = None  # for defenses that are fitted: a file that `queryfoil fit` wrote
    images: str  # as `pictures.read` takes it
    n: int | None = Field(default=None, ge=1)  # the first ones; all if None

    @model_validator(mode="after")
    def _defended(self) -> Self:
        if self.fit is not None and self.defense_hyper:
            raise ValueError("fit holds the settings of the defense, so others would have no effect; leave one out")
        if self.defense in FITTED and self.fit is None and "tau" not in self.defense_hyper:
            or_tau = ", or set tau" if self.defense == "aaa" else ""
            raise ValueError(
                f"{self.defense} is fitted to a model, but fit is missing; pass the file that `queryfoil fit` wrote"
                f"{or_tau}"
            )
        if self.defense not in FITTED and self.fit is not None:
            raise ValueError(
                f"fit is for the defense {' or '.join(FITTED)} and would have no effect; leave it out, or set defense"
            )
        if self.defense is not None:
            Defense.model_validate({**self.defense_hyper, "name": self.defense, "fit": self.fit is not None})
        elif self.defense_hyper:
            raise ValueError("settings of a defense would have no effect without one; set defense, or leave them out")
        return self

    @property
    def name(self) -> str:
        return self.model if self.defense is None else f"{self.model} behind {self.defense}"

    def digest(self) -> str:
        """Names the request by its content."""
        return digest(self.model_dump(mode="json"))


def request(**values: Any) -> Request:
    """Check the settings of an attack; ValueError that names every one that is wrong.

    >>> request(model="fashion-resnet", images="fashion-mnist", attack="square", eps="8/255", budget=100).seed
    0
    """
    try:
        return Request(**values)
    except ValidationError as error:
        raise ValueError("these settings are not valid:\n" + reasons(error, "settings")) from None


def hyper(pairs: Iterable[str]) -> dict[str, float | int | str | bool]:
    """Hyper-parameters from texts KEY=VALUE, as integers, numbers, true or false where they read like that.

    >>> hyper(["p_init=0.1", "horizon=500", "preset=imagenet"])
    {'p_init': 0.1, 'horizon': 500, 'preset': 'imagenet'}
    """
    found: dict[str, float | int | str | bool] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals or key in found:
            raise ValueError(f"expected a hyper-parameter as KEY=VALUE, each key once, but got {pair!r}")
        found[key] = _typed(value)
    return found


def _typed(text: str) -> float | int | str | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Prepared(Job):
    """A request with all that it needs in memory."""

    request: Request
    victim: Victim
    fitted: dict[str, Any] | None
    names: tuple[str, ...] | None  # of the files that the images came from


def attack(
    request: Request,
    out: str | Path,
    device: str = "cpu",
    time_limit: float | None = None,
    chunk: int = CHUNK,
    report: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Outcome, list[Row]]:
    """Run what is missing of an attack in folder `out`; its row of results once nothing is.

    Writes `summary.json`, `images.parquet` (a row an image) and a folder `adversarial` of PNG files with their
    labels.csv, which are read back and compared. Where the model is deterministic, it is asked about them once
    more, uncounted. `time_limit` in seconds stops at the end of a chunk. Everything is checked before the
    first query; before it, the model is asked about two images, uncounted, for its number of classes.
    """
    folder = Store(out, "attack")
    _check_pictures(request, Path(out) / "adversarial")
    folder.check(request)
    prepared = prepare(request, device)
    store = folder.cell(prepared.key)
    chunks = Chunks([prepared], [store], chunk, time_limit, report)
    folder.claim(request, {prepared.label: prepared.key})
    with space(out):
        store.write_json(_describe(prepared))
        finished = chunks.attack(0, prepared)
        return chunks.outcome, [_write(prepared, store, Path(out))] if finished else []


def _check_pictures(request: Request, folder: Path) -> None:
    """ValueError if the adversarial images cannot have this folder for themselves."""
    source = Path(request.images.partition("=")[2] or request.images).resolve()
    if folder.resolve() in (source, *source.parents):
        raise ValueError(
            f"{folder} is where adversarial images will be written, but the images lie there; choose another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected {folder} to be a folder or not there yet, but it is a file; remove it")


def prepare(request: Request, device: str) -> Prepared:
    """Load model and images, put the defense around the model, and name the run by all that decides its result."""
    given = _first(pictures.read(request.images), request.n)
    images = on_device(given.images, device)
    task = request.task(images, given.targets if request.targeted else None)
    if task.images.shape[1] not in pictures.CHANNELS.values():
        raise ValueError(f"expected grey or RGB images (1 or 3 channels), but got {task.images.shape[1]} channels")
    network = request.victim(device)
    model, fit = _defended(network, request)
    attack = request.build(tau_of(model))
    classes = classes_of(model, images[:2], request.seed)
    if fit is not None and fit.classes != classes:
        raise ValueError(f"expected a fit of {classes} classes, as the model has, but {request.fit} has {fit.classes}")
    task.check_classes(classes)
    if request.targeted and given.targets is None:
        task = replace(task, targets=random_targets(task.labels, task.ids, classes, request.seed))
    fitted = None if fit is None else vars(fit)
    targets = () if task.targets is None else (task.targets,)
    key = name_of(
        {
            "settings": {k: v for k, v in request.model_dump(mode="json").items() if k not in ("fit", "images", "n")},
            "fitted": fitted,
            "model": network.identity,
            "images": provenance.tensors(task.images, task.labels, task.ids, *targets),
        },
        [
            "queryfoil.models.victim",
            *sorted(modules(attack)),
            *([DEFENSES[request.defense].__module__] if request.defense else []),
        ],
        device,
    )
    return Prepared(request.name, key, attack, model, task, request.budget, request, network, fitted, given.names)


def _first(given: Pictures, n: int | None) -> Pictures:
    if n is None:
        return given
    if n > len(given.images):
        raise ValueError(f"expected n <= {len(given.images)}, the number of images, but got n = {n}")
    targets = None if given.targets is None else given.targets[:n]
    return Pictures(given.images[:n], targets, given.names and given.names[:n])


def _defended(network: nn.Module, request: Request) -> tuple[nn.Module, Fit | TerraceFit | None]:
    if request.fit is not None:
        fit = load_fit(request.fit)
        if not isinstance(fit, FITTED[request.defense or ""]):
            right = next(name for name, kind in FITTED.items() if isinstance(fit, kind))
            raise ValueError(f"{request.fit} was fitted for {right}, but the defense is {request.defense}; set {right}")
        return protect(network, fit), fit
    if request.defense is None:
        return network, None
    return DEFENSES[request.defense](network, **request.defense_hyper), None


def _describe(p: Prepared) -> dict[str, Any]:
    return {
        "cell": p.key,
        "settings": p.request.model_dump(mode="json"),
        "fitted": p.fitted,
        "hyper": settings(p.attack),
        "model": p.victim.identity,
    }


def _write(p: Prepared, store: CellStore, out: Path) -> Row:
    """The files of a finished attack; gives the row of summary.json."""
    attacked = store.attacked()
    ids = np.asarray(attacked.column("id")).tolist()
    saved = _write_pictures(p, attacked, out / "adversarial")
    deterministic = bool(getattr(p.model, "deterministic", True))
    shown = _ask_again(p, attacked, out / "adversarial", saved) if deterministic else {}
    columns = {
        "cell": pa.array([p.key] * len(ids)),
        "file": pa.array(p.names or [None] * len(ids), pa.string()),
        "adversarial_file": pa.array([saved.get(i) for i in ids], pa.string()),
        "shown": pa.array([shown.get(i) for i in ids], pa.int64()),
    }
    for name, column in columns.items():
        attacked = attacked.append_column(name, column)
    with files.replacing(out / "images.parquet") as temporary:
        pq.write_table(attacked.replace_schema_metadata(), temporary, compression="zstd")
    row = {
        "label": p.label,
        "model": p.request.model,
        "model_hashes": p.victim.identity,
        "dataset": p.request.images,
        "defenses": [] if p.request.defense is None else [_defense_row(p)],
        **summary.attack_side(p.request, settings(p.attack), attacked, REPORT_AT),
        "adversarial_files": len(saved),
        "reached_again": len(shown) if deterministic else None,
        "cell": p.key,
        "versions": store.versions(),
    }
    files.write_text(out / "summary.json", json.dumps([row], indent=1, allow_nan=False) + "\n")
    return row


def _defense_row(p: Prepared) -> dict[str, Any]:
    return {"name": p.request.defense, **p.request.defense_hyper, "fitted": p.fitted}


def _write_pictures(p: Prepared, attacked: pa.Table, folder: Path) -> dict[int, str]:
    """A PNG file for each image that the attack fooled, and labels.csv; the file names by id."""
    lines = io.StringIO()
    listed = csv.writer(lines, lineterminator="\n")
    listed.writerow(["file", "label"] + ["target"] * p.request.targeted)
    names: dict[int, str] = {}
    for row in attacked.select(["id", "label", "target", "adversarial"]).to_pylist():
        if row["adversarial"] is not None:
            name = names[row["id"]] = f"{row['id']:06d}.png"
            levels = np.frombuffer(row["adversarial"], np.uint8).reshape(p.task.images.shape[1:])
            pictures.write_picture(folder / name, levels)
            listed.writerow([name, row["label"]] + [row["target"]] * p.request.targeted)
    files.write_text(folder / pictures.LABELS, lines.getvalue())
    for path in list(folder.iterdir()):
        if path.name not in names.values() and WRITTEN.fullmatch(path.name):
            path.unlink()  # of other code or weights, or half written
    return names


def _ask_again(p: Prepared, attacked: pa.Table, folder: Path, names: dict[int, str]) -> dict[int, int]:
    """What a deterministic model shows for each file, by id: where that is the goal. Uncounted."""
    if not names:
        return {}
    rows = torch.tensor([row for row, i in enumerate(p.task.ids.tolist()) if i in names], device=p.task.ids.device)
    task = p.task.rows(rows)
    levels = np.stack([pictures.read_picture(folder / names[i]) for i in task.ids.tolist()])
    x = torch.from_numpy(levels).to(task.images) / 255
    number = rows.new_tensor(table.fooled_at(attacked))[rows]
    scores = answers(p.model, x, task.ids, number, task.seed)
    again = task.margin(scores) <= 0
    if not bool(again.all()):
        warnings.warn(
            f"{int((~again).sum())} of {len(again)} recorded successes do not reach the goal when asked again: the "
            "model is not deterministic; give it an attribute deterministic = False",
            stacklevel=2,
        )
    return dict(zip(task.ids[again].tolist(), scores[again].argmax(1).tolist(), strict=True))


def about_pictures(row: Row) -> str:
    """What is known about the files of adversarial images, in a line."""
    again = row["reached_again"]
    if not row["adversarial_files"]:
        return "none, as no image was fooled by the attack"
    asked = "not asked about again, as the model is randomized"
    if again is not None:
        asked = f"asked about once more (uncounted), {again} of them reach the goal"
    return f"{row['adversarial_files']} PNG files, read back as they were written; {asked}"
