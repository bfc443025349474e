"""How much of what terraces leave is the draw of the calibration images.

Fits terraces to several draws of 1,000 of the 9,000 test images that are neither the shipped calibration images nor
those attacked, and attacks each: the worst of four attackers for each image, with the AUROC and the ECE on the 1,000
shipped images to attack. A draw that is refused gets the `allowed` that the refusal names.

python benchmarks/terraces_splits.py FOLDER [--network fashion-resnet] [--draws 8] [--n 200] [--budget 500]
"""

import argparse
import re

import torch

import queryfoil as qf
from queryfoil import data, metrics, models
from queryfoil.defenses.terrace_fit import TerraceFit, fit
from queryfoil.oracle import answers

ATTACKERS = (("greedy", 0.05), ("greedy", 0.8), ("drift", 0.3), ("drift", 0.8))


def main() -> None:
    """Print a line for each draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="with the IDX files: see docs/data-sets.md")
    parser.add_argument("--network", default="fashion-resnet")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--budget", type=int, default=500)
    asked = parser.parse_args()
    network = models.load(asked.network)
    shipped, attacked = data.load("fashion-mnist", "calibration"), data.load("fashion-mnist", "attack")
    test = data.load("fashion-mnist", "test", asked.folder)
    others = test[~torch.isin(test.ids, torch.cat([shipped.ids, attacked.ids]))]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
    samples = [shipped, *(others[order[1000 * i : 1000 * (i + 1)]] for i in range(asked.draws))]
    raw = answers(network, attacked.images, attacked.ids, torch.zeros_like(attacked.ids))
    undefended = metrics.probabilities(raw, "logits")
    for i, sample in enumerate(samples):
        logits = answers(network, sample.images, sample.ids, torch.zeros_like(sample.ids))
        found, allowed = fitted(logits, sample.labels)
        shown = metrics.probabilities(qf.disguise(raw, curve="terraces", key=found), "logits")
        figures = metrics.usefulness(shown, attacked.labels, undefended)
        few, fooled = attacked[: asked.n], torch.zeros(asked.n, dtype=torch.bool)
        for accept, p in ATTACKERS:
            result = qf.attack(
                qf.protect(network, found), few.images, few.labels, "square",
                eps=16 / 255, budget=asked.budget, accept=accept, p_init=p,
            )  # fmt: skip
            fooled |= result.fooled_at <= asked.budget
        borders = sum(map(len, found.borders))
        print(
            f"{'the shipped 1,000 images' if i == 0 else f'draw {i}'}: allowed {allowed:g}, {borders} borders, exposed "
            f"{100 * found.exposed:.0f} %, AUROC {100 * figures['auroc_change'].value:+.1f}, "
            f"ECE {100 * figures['ece_change'].value:+.1f}, left {100 * (1 - float(fooled.double().mean())):.1f} %",
            flush=True,
        )


def fitted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[TerraceFit, float]:
    """What is found with the usual `allowed`, or else with the one that the refusal names."""
    try:
        return fit(logits, labels), 0.01
    except ValueError as refused:
        named = re.search(r"allowed=([\d.]+)", str(refused))
        if named is None:
            raise
        return fit(logits, labels, allowed=float(named[1])), float(named[1])


if __name__ == "__main__":
    main()
