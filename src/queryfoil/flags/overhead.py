"""F20: what the defense costs, and whether its time tells something of the image."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.subject import Subject
from queryfoil.oracle import Model, answers, quantize

MORE = 1.1  # times the undefended
UNEVEN = 1.3  # times as uneven over images as the undefended
ROUNDS = 15
ENOUGH = 2.0  # seconds for one pair, after three rounds
BATCH = 128
SOME = 12
Clock = Callable[[], float]


def overhead(subject: Subject, clock: Clock = time.perf_counter) -> Flag:
    """F20: time of a call of the model by that of the undefended one, at batch 1 and 128, in turns; the fastest counts.

    Raised above 1.1. Also the slowest image's time by the fastest's, for 12 images one by one: raised where it is 1.3
    times that of the undefended model. Other work on the machine disturbs it; the fastest of 15 rounds hardly.
    """
    if subject.raw is None:
        return not_judged("F20", "the undefended model; pass raw=")
    task = subject.task
    n = len(task.ids)
    many = torch.arange(BATCH) % n
    batch = {1: torch.zeros(1, dtype=torch.int64), BATCH: many}
    pair = (subject.raw, subject.model)
    ratios, cost = {}, {}
    for size, rows in batch.items():
        ids = task.ids[rows] if size == 1 else torch.arange(size, device=task.ids.device)
        seconds = _fastest(pair, quantize(task.images[rows]), ids, task.seed, clock)
        ratios[size], cost[size] = seconds[1] / seconds[0], 1000 * (seconds[1] - seconds[0])
    singles = [
        _fastest(pair, quantize(task.images[i : i + 1]), task.ids[i : i + 1], task.seed, clock)
        for i in range(min(SOME, n))
    ]
    uneven = [max(times) / min(times) for times in zip(*singles, strict=True)]
    slow = uneven[1] > UNEVEN * uneven[0]
    measured = (
        f"a call takes {ratios[1]:.2f} times that of the undefended model at batch 1 ({cost[1]:+.2g} ms), "
        f"{ratios[BATCH]:.2f} times at batch {BATCH} ({cost[BATCH]:+.2g} ms); over {len(singles)} images, the slowest "
        f"takes {uneven[1]:.2f} times the fastest ({uneven[0]:.2f} undefended). Raised above {MORE:g}, or {UNEVEN:g} "
        "times as uneven" + (" – time depends on the image" if slow else "")
    )
    return judged(
        "F20", max(ratios.values()) > MORE or slow, measured,
        ratio_batch_1=ratios[1], ratio_batch_128=ratios[BATCH], uneven=uneven[1], uneven_undefended=uneven[0],
        milliseconds_more_batch_1=cost[1], milliseconds_more_batch_128=cost[BATCH],
    )  # fmt: skip


def _fastest(models: tuple[Model, Model], x: Tensor, ids: Tensor, seed: int, clock: Clock) -> list[float]:
    """The fastest of some calls of each model, in turns."""
    best, begin = [float("inf")] * len(models), clock()
    for turn in range(ROUNDS + 1):
        if turn > 3 and clock() - begin > ENOUGH:
            break
        for i, model in enumerate(models):
            start = clock()
            answers(model, x, ids, torch.zeros_like(ids), seed, BATCH)
            _synchronize(x)
            if turn:  # the first warms up
                best[i] = min(best[i], clock() - start)
    return best


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
