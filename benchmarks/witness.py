"""Our attacks against the same attacks in the Adversarial Robustness Toolbox (install the extra `peers`).

Both on the same images of the shipped network, with the same hyper-parameters, through the same oracle and
judge. ART's Square asks about its current image again in every step, as ART counts no queries; there, an answer that
it has had already costs nothing, so that the searches compare. For each pair: accuracy left at 100 and 500 queries,
and the paired difference with twice its standard error.

python benchmarks/witness.py [--n 200] [--out FILE.json]
"""

import argparse
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from queryfoil import data, models
from queryfoil.attacks import build
from queryfoil.attacks.foreign import Door, art_classifier, foreign
from queryfoil.run import run
from queryfoil.task import Task

BUDGET, REPORT_AT = 500, (100, 500)


class Remembered(nn.Module):
    """A door at which asking again about the same image costs nothing."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self.door, self.task, self.classes = door, door.task, door.classes
        self.known: dict[bytes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, K), row by row."""
        return torch.cat([self._answer(row[None]) for row in x])

    def _answer(self, x: Tensor) -> Tensor:
        key = x.float().numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.door(x)
        return self.known[key]


def square(door: Door) -> None:
    """ART's Square with our horizon: its schedule is scaled to its iterations.

    L-inf alone: in L2, ART 1.20.1 asks about images of NaN.
    """
    from art.attacks.evasion import SquareAttack

    remembered: Any = Remembered(door)
    attack = SquareAttack(
        art_classifier(remembered), eps=door.task.eps, max_iter=10_000, p_init=0.05, nb_restarts=1, verbose=False
    )
    attack.generate(door.task.images.numpy(), np.eye(door.classes)[door.task.labels.numpy()])


def simba(basis: str) -> Callable[[Door], None]:
    """ART's SimBA, which knows no ball: along pixels ("px"), or along all cosines of the whole image ("dct")."""

    def attack(door: Door) -> None:
        from art.attacks.evasion import SimBA

        side = door.task.images.shape[-1]
        one = SimBA(
            art_classifier(door), attack=basis, max_iter=3000, order="random", epsilon=0.2, freq_dim=side,
            stride=side, verbose=False,
        )  # fmt: skip
        one.generate(door.task.images.numpy(), np.eye(door.classes)[door.task.labels.numpy()])

    return attack


def hopskipjump(norm: float) -> Callable[[Door], None]:
    """ART's HopSkipJump. Its probes have a length of 0.01 of the distance: in L2, gamma = 0.01 d in ours."""

    def attack(door: Door) -> None:
        from art.attacks.evasion import HopSkipJump

        one = HopSkipJump(art_classifier(door), norm=norm, max_iter=50, max_eval=10_000, init_eval=100, verbose=False)
        one.generate(door.task.images.numpy(), np.eye(door.classes)[door.task.labels.numpy()])

    return attack


PAIRS: dict[str, tuple[str, dict[str, Any], str, float, Callable[[Door], None], str]] = {
    "square linf": ("square", {}, "linf", 16 / 255, square, "logits"),
    "simba pixel, no ball": ("simba", {"basis": "pixel"}, "l2", 100.0, simba("px"), "probs"),
    "simba dct, no ball": ("simba", {"frequencies": 28}, "l2", 100.0, simba("dct"), "probs"),
    "hopskipjump l2": ("hopskipjump", {"gamma": 7.84, "grain": 0.0}, "l2", 2.0, hopskipjump(2), "labels"),
    "hopskipjump linf": ("hopskipjump", {"gamma": 7.84, "grain": 0.0}, "linf", 32 / 255, hopskipjump(np.inf), "labels"),
}


def compare(name: str, n: int) -> dict[str, Any]:
    """One pair on the first n attack images; ours and theirs (N,), first fooling queries."""
    attack, hyper, norm, eps, other, shows = PAIRS[name]
    model, images = models.load("fashion-resnet"), data.load("fashion-mnist", "attack")[:n]
    built = build(attack, norm=norm, **hyper)
    task = Task.create(
        images.images, images.labels, images.ids, norm=norm, eps=eps, loss=built.loss or "margin", seed=0
    )
    ours = run(built, model, task, BUDGET).fooled_at
    np.random.seed(0)  # ART draws from numpy's global generator
    theirs = foreign(
        other, model, images.images, images.labels, norm=norm, eps=eps, budget=BUDGET, shows=shows
    ).fooled_at
    row: dict[str, Any] = {"pair": name, "n": n, "norm": norm, "eps": eps, "hyper": hyper}
    for q in REPORT_AT:
        mine, its = ((fooled_at > q).double() for fooled_at in (ours, theirs))
        difference = mine - its
        error = float(difference.std()) / math.sqrt(n)
        row[str(q)] = {
            "ours": float(mine.mean()),
            "art": float(its.mean()),
            "difference": float(difference.mean()),
            "two_standard_errors": 2 * error,
        }
    return row


def main() -> None:
    """Print a line for each pair, and write all to a JSON file if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--only", choices=PAIRS)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = []
    for name in [chosen.only] if chosen.only else PAIRS:
        row = compare(name, chosen.n)
        rows.append(row)
        text = "; ".join(
            f"at {q}: ours {100 * row[str(q)]['ours']:.1f} %, ART {100 * row[str(q)]['art']:.1f} %, difference "
            f"{100 * row[str(q)]['difference']:+.1f} (2 s.e. {100 * row[str(q)]['two_standard_errors']:.1f})"
            for q in REPORT_AT
        )
        print(f"{name} (n = {chosen.n}): {text}", flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
