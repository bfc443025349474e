"""Cost of a counted query: the engine against bare forwards of the same model, and against peers.

Each attack of the library on 512 images that stay live behind AAA, each side at its best micro-batch.
The overhead is the time of the attack over that of as many bare forwards, measured in turns in one run;
reported is the median of the pairs with its quartiles. The peers are ART's and AutoAttack's Square on the same images
with the same parameters (install the extra `peers`): their forwards are counted by a wrapper, as ART does not count
queries, and a step is what advances a search by one proposal.

python benchmarks/engine.py [--rounds 9] [--only square]
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from queryfoil import AAA, data, models
from queryfoil.attacks import ATTACKS, build
from queryfoil.metrics import NEVER
from queryfoil.run import run
from queryfoil.task import Task

IMAGES, BUDGET = 512, 30
EPS = {"linf": 4 / 255, "l2": 0.25}
MICRO_BATCHES = (32, 64, 128, 256, 512)


def seconds(function: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def best_micro_batch(function: Callable[[int], object]) -> int:
    """The micro-batch with the lowest of three times."""
    times = {size: min(seconds(lambda s=size: function(s)) for _ in range(3)) for size in MICRO_BATCHES}  # type: ignore[misc]
    return min(times, key=times.__getitem__)


def bare(model: nn.Module, images: Tensor, micro_batch: int, times: int = BUDGET) -> None:
    """So many forwards for each image and nothing else."""
    with torch.no_grad():
        for _ in range(times):
            for start in range(0, len(images), micro_batch):
                model(images[start : start + micro_batch])


def live_task(model: nn.Module, attack: Any, norm: str) -> Task:
    """512 images that the attack does not fool within the budget."""
    pool = data.load("fashion-mnist", "attack")
    loss = attack.loss or "margin"
    task = Task.create(pool.images, pool.labels, pool.ids, norm=norm, eps=EPS[norm], loss=loss)
    survivors = (run(attack, model, task, BUDGET).fooled_at == NEVER).nonzero().squeeze(1)
    if len(survivors) < IMAGES:
        raise SystemExit(f"expected {IMAGES} survivors, but got {len(survivors)}")
    return task.rows(survivors[:IMAGES])


def report(name: str, ratios: list[float], detail: str) -> None:
    """One line: median and quartiles of the ratios."""
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"{name:<28} {median:>6.3f}  [{low:.3f}, {high:.3f}]  {detail}", flush=True)


def ours(name: str, norm: str, rounds: int) -> None:
    """Overhead of one of our attacks."""
    model = AAA(models.load("fashion-resnet"), tau=2.3)
    attack = build(name, norm=norm)
    task = live_task(model, attack, norm)
    theirs = best_micro_batch(lambda size: bare(model, task.images, size, 5))
    mine = best_micro_batch(lambda size: run(attack, model, task, 5, size))
    pairs = []
    share = int(run(attack, model, task, BUDGET, mine).queries.sum()) / (IMAGES * BUDGET)
    for _ in range(rounds):
        spent = seconds(lambda: run(attack, model, task, BUDGET, mine))
        pairs.append(spent / seconds(lambda: bare(model, task.images, theirs)) / share)
    report(
        f"{name} {norm}", pairs, f"{IMAGES} images x {share * BUDGET:.4g} queries; micro-batch {mine}, bare {theirs}"
    )


class Counted(nn.Module):
    """A model that counts the images it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        scores: Tensor = self.model(x)
        return scores


def peer(name: str, rounds: int, made: Callable[[Counted], Callable[[Task, int, int], object]]) -> None:
    """Time of a step of another library's Square, and of each image that it asks about, over that of a bare forward.

    made: gives, for a model, the attack of a task in micro-batches and so many steps.
    """
    model = AAA(models.load("fashion-resnet"), tau=2.3)
    task = live_task(model, build("square"), "linf")
    counted = Counted(model).eval()
    try:
        attack = made(counted)
    except ImportError:
        print(f"{name:<28} not installed: pip install -c constraints.txt -e '.[peers]'")
        return
    theirs = best_micro_batch(lambda size: bare(model, task.images, size, 5))
    mine = best_micro_batch(lambda size: attack(task, size, 5))
    pairs = []
    for _ in range(rounds):
        counted.images = 0
        spent = seconds(lambda: attack(task, mine, BUDGET))
        pairs.append(spent / seconds(lambda: bare(model, task.images, theirs)))
    forwards = counted.images / (IMAGES * BUDGET)
    report(f"{name}, a step", pairs, f"{forwards:.2f} forwards a step; micro-batch {mine}, bare {theirs}")
    report(f"{name}, a query", [pair / forwards for pair in pairs], "")


def art(counted: Counted) -> Callable[[Task, int, int], object]:
    """Square of the Adversarial Robustness Toolbox."""
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import PyTorchClassifier

    victim = PyTorchClassifier(
        counted, nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )

    def attack(task: Task, size: int, steps: int) -> None:
        settings: dict[str, Any] = {"eps": EPS["linf"], "max_iter": steps, "p_init": 0.05, "nb_restarts": 1}
        made = SquareAttack(victim, batch_size=size, verbose=False, **settings)
        made.generate(task.images.numpy(), task.labels.numpy())

    return attack


def autoattack(counted: Counted) -> Callable[[Task, int, int], object]:
    """Square of AutoAttack: one window for all images of a micro-batch."""
    from pyautoattack.square import SquareAttack

    def attack(task: Task, size: int, steps: int) -> None:
        made = SquareAttack(counted, eps=EPS["linf"], n_queries=steps - 1, p_init=0.05, device="cpu")
        for start in range(0, len(task.images), size):
            made.perturb(task.images[start : start + size], task.labels[start : start + size])

    return attack


def main() -> None:
    """Print a line for each attack and the peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=[*ATTACKS, "peers"], help="one attack alone, or the peers")
    chosen = parser.parse_args()
    rounds = chosen.rounds
    print(f"time per query / time of a bare forward; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, kind in ATTACKS.items():
        for norm in kind.norms:
            if chosen.only in (None, name) and kind.rowwise:  # QueryNet trains networks besides
                ours(name, norm, rounds)
    if chosen.only in (None, "peers"):
        logging.disable(logging.WARNING)
        peer("ART's Square", rounds, art)
        peer("AutoAttack's Square", rounds, autoattack)


if __name__ == "__main__":
    main()
