"""What terraces cost an honest user, on the full test images of Fashion-MNIST that nothing was fitted on.

Fitted on the shipped 1,000 calibration images, measured on the other 9,000 test images: AUROC of right against wrong
answers and ECE, and their changes against the undefended network with 95 % intervals (paired bootstrap).

python benchmarks/terraces.py FOLDER [--network fashion-resnet ...] [--allowed 0.01 ...]
"""

import argparse
import time

import torch

from queryfoil import data, disguise, metrics, models
from queryfoil.defenses.terrace_fit import fit
from queryfoil.oracle import answers


def main() -> None:
    """Print a line for each network and `allowed`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="with the IDX files: see docs/data-sets.md")
    parser.add_argument("--network", nargs="+", default=["fashion-resnet", "fashion-resnet-at"])
    parser.add_argument("--allowed", nargs="+", type=float, default=[0.01, 0.03, 0.1, 1.0])
    asked = parser.parse_args()
    held_out, test = data.load("fashion-mnist", "calibration"), data.load("fashion-mnist", "test", asked.folder)
    unseen = test[~torch.isin(test.ids, held_out.ids)]
    for name in asked.network:
        network = models.load(name)
        logits, raw = (
            answers(network, part.images, part.ids, torch.zeros_like(part.ids)) for part in (held_out, unseen)
        )
        undefended = metrics.probabilities(raw, "logits")
        for allowed in asked.allowed:
            start = time.perf_counter()
            found = fit(logits, held_out.labels, allowed=allowed)
            seconds = time.perf_counter() - start
            shown = metrics.probabilities(disguise(raw, curve="terraces", key=found), "logits")
            figures = metrics.usefulness(shown, unseen.labels, undefended)
            texts = [f"{n} {100 * figures[n].value:.2f} %" for n in ("auroc", "ece")]
            for n in ("auroc_change", "ece_change"):
                value, low, high = (100 * part for part in figures[n])
                texts.append(f"{n} {value:+.2f} ({low:+.2f} to {high:+.2f})")
            print(f"{name}, allowed {allowed:g}, n = {len(unseen)}: {', '.join(texts)}; fitted in {seconds:.1f} s")


if __name__ == "__main__":
    main()
