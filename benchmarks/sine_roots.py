"""How often following AAA-sine's roots takes a wrong one, along the paths of attacks on the shipped network.

A root is wrong where another one is nearer to the raw margin, which the attacker does not see. Along a path the answers
are followed as the attack followed them. Also the accuracy left, with the reading and without.

python benchmarks/sine_roots.py [--n 100] [--budget 500]
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from queryfoil import AAA, data, losses, models
from queryfoil.attacks import build
from queryfoil.attacks.sine import FIRST, InvertSine, sine_roots
from queryfoil.defenses.calibration import fit
from queryfoil.oracle import answers
from queryfoil.run import run
from queryfoil.task import Task

EPS = 16 / 255
ATTACKERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("square", "greedy", {}),
    ("square", "drift", {"p_init": 0.8}),
    ("simba", "greedy", {}),
)

Answer = tuple[Tensor, Tensor, Tensor]
"""Ids (n,), margins shown (n,), raw margins (n,)."""


def lead(scores: Tensor) -> Tensor:
    """The margin of the class that leads (N,), in double precision."""
    return losses.margin(scores.double(), scores.argmax(1))


def wrong(path: list[Answer], reading: InvertSine) -> Iterator[tuple[bool, bool]]:
    """For each answer of an untargeted attack: is the root that was followed wrong, and is it the first one?"""
    last: dict[int, float] = {}
    for ids, shown, raw in path:
        names = ids.tolist()
        roots = sine_roots(shown, reading.tau, reading.alpha)
        right = roots.gather(1, (roots - raw[:, None]).abs().nan_to_num(torch.inf).argmin(1, keepdim=True)).squeeze(1)
        before = torch.tensor([last.get(name, torch.nan) for name in names]).double()
        taken = torch.where(before.isnan(), reading.start(shown), reading.follow(shown, before.nan_to_num(0)))
        yield from zip(((taken - right).abs() > 1e-6).tolist(), before.isnan().tolist(), strict=True)
        last |= dict(zip(names, taken.tolist(), strict=True))


def main() -> None:
    """Print a line for each period, attacker and first root."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--budget", type=int, default=500)
    arguments = parser.parse_args()
    network = models.load("fashion-resnet")
    held_out = data.load("fashion-mnist", "calibration")
    scores = answers(network, held_out.images, held_out.ids, torch.zeros_like(held_out.ids))
    fitted = fit(scores, held_out.labels, curve="sine")
    images = data.load("fashion-mnist", "attack")[: arguments.n]
    task = Task.create(images.images, images.labels, images.ids, eps=EPS)
    print(
        f"n = {arguments.n}, {arguments.budget} queries; wrong roots in %, of all answers and of the first; left in %"
    )
    print(
        f"{'tau':>5} {'attack':<20} {'first':<7} {'answers':>8} {'wrong':>6} {'at first':>8} {'left':>6} {'unread':>6}"
    )
    for tau in (fitted.tau, 6.0):
        served = AAA(network, curve="sine", tau=tau, alpha=fitted.alpha, temperature=fitted.temperature).eval()
        for name, accept, hyper in ATTACKERS:
            unread = run(build(name, accept, **hyper), served, task, arguments.budget).accuracy()
            for first in FIRST:
                path: list[Answer] = []

                def record(ids: Tensor, number: Tensor, x: Tensor, shown: Tensor, to: list[Answer] = path) -> None:
                    with torch.no_grad():
                        to.append((ids, lead(shown), lead(network(x))))

                reading = InvertSine(tau, fitted.alpha, first)
                attack = build(name, accept, reading="invert_sine", first=first, tau=tau, alpha=fitted.alpha, **hyper)
                left = run(attack, served, task, arguments.budget, observe=record).accuracy()
                found = list(wrong(path, reading))
                at_first = [bad for bad, is_first in found if is_first]
                rate, start = (100 * sum(part) / len(part) for part in ([bad for bad, _ in found], at_first))
                who = " ".join([name, accept, *(f"{k} {v}" for k, v in hyper.items())])
                print(
                    f"{tau:>5g} {who:<20} {first:<7} {len(found):>8} {rate:>6.1f} {start:>8.1f} {100 * left:>6.1f} "
                    f"{100 * unread:>6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
