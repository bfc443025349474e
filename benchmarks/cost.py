"""What each defense of the plan `defenses` costs: time per image over that of the undefended network it is on.

python benchmarks/cost.py            # all, on one thread
python benchmarks/cost.py --only DENT

Fitted defenses cost what they cost with any settings. Networks trained to resist are compared with the undefended
network of their family. The calls of both take turns, and the median of the ratios counts.
"""

import argparse
import statistics
import time

import torch

from queryfoil import data, models, plan, rng
from queryfoil.oracle import Model
from queryfoil.prepare import prepare

BATCH, ROUNDS = 128, 15
FAMILY = {"fashion-pni": "fashion-resnet", "fashion-trs": "fashion-resnet", "fashion-thermometer": "fashion-resnet"}


def seconds(model: Model, images: data.Images, query: int) -> float:
    """Of one call on a batch."""
    start = time.perf_counter()
    with torch.no_grad(), rng.rows(0, images.ids, torch.full_like(images.ids, query)):
        model(images.images)
    return time.perf_counter() - start


def undefended(name: str) -> str:
    """The undefended network of the same family: fashion-wrn for fashion-wrn-hat."""
    return FAMILY.get(name, "-".join(name.split("-")[:2]))


def main() -> None:
    """Print a row for each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="label of a cell")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    images = data.load("fashion-mnist", "attack")[:BATCH]
    print(f"batch {BATCH}, {ROUNDS} rounds, one thread, torch {torch.__version__}")
    for cell in plan.read("defenses").cells:
        if only not in (None, cell.label):
            continue
        pair: list[Model] = [models.load(undefended(cell.model)), prepare(cell).model]
        for model in pair:
            seconds(model, images, 1)
        ratios = [1 / (seconds(pair[0], images, i) / seconds(pair[1], images, i)) for i in range(1, ROUNDS + 1)]
        spread = statistics.quantiles(ratios, n=4)
        print(f"{cell.label:32} {spread[1]:6.2f}   (quartiles {spread[0]:.2f} to {spread[2]:.2f})", flush=True)


if __name__ == "__main__":
    main()
