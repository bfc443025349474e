"""What each defense of a plan costs: time per image over that of the undefended network it is on.

python benchmarks/cost.py                                          # the plan `defenses`, on one thread
python benchmarks/cost.py table5 --out results/cost-table5.json    # kappa
python benchmarks/cost.py --only DENT
python benchmarks/cost.py table5 --scale paper --data cifar10=FOLDER --checkpoints FOLDER --device cuda

Fitted defenses cost what they cost with any settings. Networks trained to resist are compared with the plan's
undefended network in their place, or with that of their family. The calls of both take turns, and the median of the
ratios counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import scaled
import torch
from torch.utils.flop_counter import FlopCounterMode

from queryfoil import data, files, models, plan, provenance, rng
from queryfoil.oracle import Model
from queryfoil.prepare import Supplies

BATCH, ROUNDS = 128, 15
FAMILY = {"fashion-pni": "fashion-resnet", "fashion-trs": "fashion-resnet", "fashion-thermometer": "fashion-resnet"}


def seconds(model: Model, images: data.Images, query: int) -> float:
    """Of one call on a batch."""
    if images.images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad(), rng.rows(0, images.ids, torch.full_like(images.ids, query)):
        model(images.images)
    if images.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def multiply_adds(model: Model, images: data.Images) -> float:
    """Of one image, in millions: convolutions and matrix products, two operations each."""
    with FlopCounterMode(display=False) as counted:
        seconds(model, images[:1], 0)
    return float(counted.get_total_flops()) / 2 / 1e6


def undefended(found: plan.Plan, cell: plan.Cell, supplies: Supplies) -> Model:
    """The plan's undefended network in a cell's place; else that of its family: fashion-wrn for fashion-wrn-hat."""
    for other in found.cells:
        here = other.place.get("network") == cell.place.get("network", "nowhere")
        if here and not other.defenses and other.place.get("defense", "None") == "None":
            model: Model = supplies.stack(other).model
            return model
    plain = cell.model_copy(update={"defenses": ()})
    if cell.model in models.MODELS:
        plain = plain.model_copy(update={"model": FAMILY.get(cell.model, "-".join(cell.model.split("-")[:2]))})
    family: Model = supplies.stack(plain).model
    return family


def main() -> None:
    """Print a row for each model of the plan, and write all to a JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="?", default="defenses")
    parser.add_argument("--only", help="label of a cell")
    parser.add_argument("--out", type=Path)
    scaled.add_options(parser)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found, supplies = scaled.read(chosen.plan, chosen)
    print(f"batch {BATCH}, {ROUNDS} rounds, one thread, torch {torch.__version__}")
    rows: dict[str, dict[str, Any]] = {}
    for cell in found.cells:
        stack = supplies.stack(cell)
        if chosen.only not in (None, cell.label) or stack.name in rows:
            continue
        images = supplies.source(cell.dataset).attacked[:BATCH]
        pair: list[Model] = [undefended(found, cell, supplies), stack.model]
        for model in pair:
            seconds(model, images, 1)
        times = [[seconds(model, images, i) for model in pair] for i in range(1, ROUNDS + 1)]
        low, middle, high = statistics.quantiles([own / plain for plain, own in times], n=4)
        own = 1000 * statistics.median(own for _, own in times) / BATCH
        rows[stack.name] = {
            "label": cell.label, "place": cell.place, "model": cell.model, "ratio": middle, "quartiles": [low, high],
            "milliseconds": own, "multiply_adds": multiply_adds(stack.model, images),
        }  # fmt: skip
        print(f"{cell.label:32} {middle:6.2f}   (quartiles {low:.2f} to {high:.2f}; {own:.3f} ms an image)", flush=True)
    if chosen.out:
        content = {"rows": list(rows.values()), "batch": BATCH, "rounds": ROUNDS, "versions": provenance.versions()}
        files.write_text(chosen.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
