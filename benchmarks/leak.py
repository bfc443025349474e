"""What a reading that was fitted on a surrogate is worth against AAA: how it ranks images, and what attacks leave.

Defenses and readings are fitted on 900 calibration images, each on its own network; the other 100 are attacked. The
attacker's defense is fitted to his surrogate, so that its tau and temperature are not the victim's; or it has the
victim's own. Spearman's correlation with the raw margin is over the images of the attack slice.

python benchmarks/leak.py [--budget 500]
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from queryfoil import AAA, data, disguise, losses, models
from queryfoil.attacks import build
from queryfoil.attacks.leak import fit_leak
from queryfoil.defenses.calibration import fit
from queryfoil.oracle import answers
from queryfoil.run import run
from queryfoil.task import Task

ATTACKED = 100
EPS = 16 / 255
VICTIM, SURROGATE = "fashion-resnet", "fashion-resnext"
DEFENSES: dict[str, dict[str, Any]] = {
    "AAA-linear, Adam, tau 6": {"curve": "linear", "tau": 6.0, "solver": "adam", "rule": "lowest"},
    "AAA-linear, fitted": {"curve": "linear"},
    "AAA-sine, fitted": {"curve": "sine"},
}
ATTACKERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drift, p 0.8": {"accept": "drift", "p_init": 0.8},
}


def lead(scores: Tensor) -> Tensor:
    """The margin of the class that leads (N,), in double precision."""
    return losses.margin(scores.double(), scores.argmax(1))


def spearman(one: Tensor, other: Tensor) -> float:
    """Correlation of the ranks of two (N,)."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    """Print a line for each defense, attacker and reading."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=500)
    budget = parser.parse_args().budget
    networks = {name: models.load(name) for name in (VICTIM, SURROGATE)}
    held_out, seen = data.load("fashion-mnist", "calibration"), data.load("fashion-mnist", "attack")

    def raw(name: str, images: data.Images) -> Tensor:
        return answers(networks[name], images.images, images.ids, torch.zeros_like(images.ids))

    attacked, known = held_out[:ATTACKED], held_out[ATTACKED:]
    task = Task.create(attacked.images, attacked.labels, attacked.ids, eps=EPS)
    print(f"{VICTIM}, surrogate {SURROGATE}; left in % at 100 / {budget} queries, n = {ATTACKED}, eps 16/255")
    print(f"{'defense':<24} {'reading':<22} {'tau':>5} {'Spearman':>8}  " + "  ".join(f"{a:>12}" for a in ATTACKERS))
    for defense, how in DEFENSES.items():
        victims, own = (fit(raw(name, known), known.labels, **how).settings() for name in (VICTIM, SURROGATE))
        served = AAA(networks[VICTIM], **victims).eval()
        shown, true = disguise(raw(VICTIM, seen), **victims), lead(raw(VICTIM, seen))
        for reading, settings in (("none", None), ("leak", own), ("leak, victim's defense", victims)):
            hyper: dict[str, Any] = {}
            ranked, tau = lead(shown), victims["tau"]
            if settings is not None:
                leak = fit_leak(raw(SURROGATE, known), disguise(raw(SURROGATE, known), **settings))
                hyper = {"reading": "leak", "weights": leak.weights}
                ranked, tau = leak.predict(shown), settings["tau"]
            left = []
            for attacker in ATTACKERS.values():
                result = run(build("square", **attacker, **hyper), served, task, budget)
                left.append(f"{100 * result.accuracy(100):.0f} / {100 * result.accuracy():.0f}")
            print(
                f"{defense:<24} {reading:<22} {tau:>5g} {spearman(ranked, true):>8.3f}  "
                + "  ".join(f"{text:>12}" for text in left),
                flush=True,
            )


if __name__ == "__main__":
    main()
