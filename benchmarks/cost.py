"""What each defense of a plan costs: time per image over that of the undefended network it is on.

python benchmarks/cost.py                                          # the plan `defenses`, on one thread
python benchmarks/cost.py table5 --out results/cost-table5.json    # kappa
python benchmarks/cost.py --only DENT

Fitted defenses cost what they cost with any settings. Networks trained to resist are compared with the undefended
network of their family. The calls of both take turns, and the median of the ratios counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from queryfoil import data, files, models, plan, provenance, rng
from queryfoil.oracle import Model
from queryfoil.prepare import Supplies

BATCH, ROUNDS = 128, 15
FAMILY = {"fashion-pni": "fashion-resnet", "fashion-trs": "fashion-resnet", "fashion-thermometer": "fashion-resnet"}


def seconds(model: Model, images: data.Images, query: int) -> float:
    """Of one call on a batch."""
    start = time.perf_counter()
    with torch.no_grad(), rng.rows(0, images.ids, torch.full_like(images.ids, query)):
        model(images.images)
    return time.perf_counter() - start


def multiply_adds(model: Model, images: data.Images) -> float:
    """Of one image, in millions: convolutions and matrix products, two operations each."""
    with FlopCounterMode(display=False) as counted:
        seconds(model, images[:1], 0)
    return float(counted.get_total_flops()) / 2 / 1e6


def undefended(name: str) -> str:
    """The undefended network of the same family: fashion-wrn for fashion-wrn-hat."""
    return FAMILY.get(name, "-".join(name.split("-")[:2]))


def main() -> None:
    """Print a row for each model of the plan, and write all to a JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="?", default="defenses")
    parser.add_argument("--only", help="label of a cell")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    images, supplies = data.load("fashion-mnist", "attack")[:BATCH], Supplies({}, "cpu")
    print(f"batch {BATCH}, {ROUNDS} rounds, one thread, torch {torch.__version__}")
    rows: dict[str, dict[str, Any]] = {}
    for cell in plan.read(chosen.plan).cells:
        stack = supplies.stack(cell)
        if chosen.only not in (None, cell.label) or stack.name in rows:
            continue
        pair: list[Model] = [models.load(undefended(cell.model)), stack.model]
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
