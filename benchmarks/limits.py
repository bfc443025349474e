"""What AAA does not stop (the paper, section 6): an attacker who has the network, and one who has another.

White-box: 20 steps of PGD on the network itself, the adversarially trained one's images on that. Transfer: the same
on another, undefended network. The images are shown to the network, undefended and behind AAA-linear (as in the plan
table2), and to the one that is adversarially trained. Accuracy left, with 95 % intervals.

python benchmarks/limits.py [--n 300] [--transfer MODEL] [--out FILE.json]
python benchmarks/limits.py --scale paper --data cifar10=FOLDER --checkpoints FOLDER --transfer NAME=PATH
"""

import argparse
import json
from pathlib import Path
from typing import Any

import scaled
import torch

from queryfoil import files, metrics, provenance
from queryfoil.models.victim import victim
from queryfoil.oracle import answers, quantize
from queryfoil.prepare import Prepared
from queryfoil.train.pgd import pgd

STEPS = 20
ATTACKERS = ("nobody", "white-box", "transfer")
DEFENSES = ("None", "AAA-linear", "AAA-linear, fitted", "AT")


def left(p: Prepared, x: torch.Tensor) -> list[bool]:
    """Whether a prepared cell's model is right on each of the images x (N, C, H, W)."""
    scores = answers(p.model, x, p.task.ids, torch.ones_like(p.task.ids))
    right: list[bool] = (p.task.margin(scores) > 0).tolist()
    return right


def main() -> None:
    """Print a line for each attacker and defense, and write all to a JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--transfer", default="fashion-resnet", help="the other network, as plans name it")
    scaled.add_options(parser)
    chosen = parser.parse_args()
    found, supplies = scaled.read("table2", chosen)
    cells = {
        cell.place["defense"]: supplies.prepare(cell.model_copy(update={"n": chosen.n}))
        for cell in found.cells
        if cell.place["network"] == "WideResNet-28" and cell.place["attack"] == "Square"
    }
    task = cells["None"].task
    rows: list[dict[str, Any]] = []
    for attacker in ATTACKERS:
        for defense in DEFENSES:
            x, p = task.images, cells[defense]
            name = {"nobody": None, "white-box": p.cell.model, "transfer": chosen.transfer}[attacker]
            if name is not None:
                generator = torch.Generator().manual_seed(0)
                network = victim(name, chosen.device).ask
                if not isinstance(network, torch.nn.Module):
                    raise ValueError(f"expected a network with gradients, but {name} has none; name another one")
                x = quantize(pgd(network, task, STEPS, 2.5 * task.eps / STEPS, generator))
            right = left(p, x)
            share, interval = sum(right) / len(right), metrics.wilson(sum(right), len(right))
            row = {"attacker": attacker, "network": name, "defense": defense, "accuracy": share}
            wrong = [i for i, hit in zip(task.ids.tolist(), right, strict=True) if not hit]
            rows.append(
                row | {"interval": interval, "wrong": wrong, "n": chosen.n, "eps": task.eps, "steps": STEPS, "seed": 0}
            )
            print(f"{attacker:10} {defense:20} {100 * share:5.1f} %", flush=True)
    if chosen.out:
        content = {"rows": rows, "versions": provenance.versions()}
        files.write_text(chosen.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
