"""Flags of a folder of results, from what is stored there."""

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from queryfoil import data, table
from queryfoil.flags import counting
from queryfoil.flags.check import of_results
from queryfoil.flags.flag import Flag, judged, not_judged, number
from queryfoil.flags.pages import Flagged
from queryfoil.flags.record import Record
from queryfoil.summary import CellResult

Levels = NDArray[np.uint8]


def of_folder(results: Sequence[CellResult]) -> Flagged:
    """For each model behind each defense of a folder, its name and flags, in the order of the plan."""
    images: dict[tuple[str, str], dict[int, Levels]] = {}
    found: dict[tuple[str, str], list[tuple[CellResult, Record]]] = {}
    for result in results:
        made = record(result, images)
        found.setdefault((made.model, made.defense), []).append((result, made))
    several = len({model for model, _ in found}) > 1
    judged_: list[tuple[str, list[Flag]]] = []
    for (model, _), pairs in found.items():
        audited = pairs[0][0].cell.audited  # has no undefended network
        plain = [] if audited else [made for _, made in found.get((model, ""), [])]
        flags = [*of_results([made for _, made in pairs], plain), _leak(pairs[0][0], images)]
        name = _name(pairs[0][0], len(pairs), several)
        judged_.append((name, sorted(flags, key=lambda flag: number(flag.id))))
    return judged_


def record(result: CellResult, images: dict[tuple[str, str], dict[int, Levels]] | None = None) -> Record:
    """A stored cell as a record; its clean images where the data set ships. `images` keeps them for the next."""
    cell, attacked = result.cell, result.attacked
    ids = np.asarray(attacked.column("id"), dtype=np.int64)
    confirmed = attacked.column("confirmed")
    known = _shipped(cell.dataset, "attack", {} if images is None else images)
    there = bool(known) and all(int(i) in known for i in ids)
    clean = np.stack([known[int(i)] for i in ids]) if there else None
    adversarial = None
    if clean is not None and attacked.column("adversarial").null_count < len(attacked):
        stored = zip(attacked.column("adversarial").to_pylist(), clean, strict=True)
        adversarial = np.stack(
            [image if found is None else np.frombuffer(found, np.uint8).reshape(image.shape) for found, image in stored]
        )
    layers = zip(cell.defense_settings(), result.info["fitted"], strict=True)
    return Record(
        label=cell.place.get("attacker") or cell.place.get("attack") or cell.attack,
        model=json.dumps(cell.model_settings(), sort_keys=True),
        defense=json.dumps([[layer, fitted] for layer, fitted in layers], sort_keys=True) if cell.defenses else "",
        dataset=cell.dataset, attack=cell.attack, hyper=result.info["hyper"], accept=cell.accept, loss=cell.loss,
        norm=cell.norm, eps=cell.eps, targeted=cell.targeted, seed=cell.seed, budget=cell.budget, ids=ids,
        queries=np.asarray(attacked.column("queries"), dtype=np.int64), fooled_at=table.fooled_at(attacked),
        deterministic=bool(result.info.get("deterministic", confirmed.null_count == len(attacked))),
        confirmed=None if confirmed.null_count == len(attacked) else np.asarray(confirmed.to_numpy(), dtype=np.float64),
        adversarial=adversarial, clean=clean,
        of_defense=() if "tau" in cell.hyper else tuple({"threshold", "tau"} - cell.hyper.keys()),
    )  # fmt: skip


def _shipped(dataset: str, split: str, images: dict[tuple[str, str], dict[int, Levels]]) -> dict[int, Levels]:
    """The images of a split by their ids, as bytes, where the data set ships."""
    if dataset not in data.SLICES:
        return {}
    if (dataset, split) not in images:
        found = data.load(dataset, split)
        levels = (found.images * 255).round().byte().numpy()
        images[dataset, split] = dict(zip(found.ids.tolist(), levels, strict=True))
    return images[dataset, split]


def _leak(result: CellResult, images: dict[tuple[str, str], dict[int, Levels]]) -> Flag:
    if not any(fitted is not None for fitted in result.info["fitted"]):
        return judged("F18", False, "nothing of this defense was fitted")
    known, fitted_on = (_shipped(result.cell.dataset, split, images) for split in ("attack", "calibration"))
    ids = np.asarray(result.attacked.column("id")).tolist()
    if not fitted_on or not all(i in known for i in ids):
        return not_judged("F18", "the images of a data set that does not ship with the library")
    return counting.tuning_leak(np.stack([known[i] for i in ids]), np.stack(list(fitted_on.values())))


def _name(result: CellResult, cells: int, several: bool) -> str:
    """What a defense is called in a report: as the plan does."""
    cell = result.cell
    name = cell.place.get("defense") or (cell.label if cells == 1 else " + ".join(d.name for d in cell.defenses))
    name = name or "undefended"
    return f"{cell.place.get('network', cell.model)}, {name}" if several and cells > 1 else name
