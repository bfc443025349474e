"""All flags of a model: asked about its answers, then attacked shortly in several ways."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from queryfoil.checks import require_whole
from queryfoil.flags import answers, counting, jumps, labels, overhead, planted, results, scores, suite
from queryfoil.flags.flag import Flag, not_judged, number
from queryfoil.flags.record import Record
from queryfoil.flags.subject import Subject
from queryfoil.oracle import Model, check_mode, quantize
from queryfoil.oracle import answers as ask
from queryfoil.task import Task, check_images

OF_ANSWERS = (
    labels.label_flips,
    answers.batch_dependence,
    answers.chance,
    answers.state,
    scores.degenerate_scores,
    scores.trend,
    jumps.jumps,
    overhead.overhead,
)
"""Flags of a model's answers; functions of a `Subject`."""


def check(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    raw: Model | None = None,
    norm: str = "linf",
    eps: float = 8 / 255,
    seed: int = 0,
    budget: int | None = 500,
    ids: Tensor | None = None,
    calibration: Tensor | None = None,
    report: suite.Report = lambda label, units, total, queries: None,
) -> list[Flag]:
    """Judge whether a defense only looks strong: every flag of `FLAGS`, in its order, raised, clear or not judged.

    model: as it is served, with its defense. raw: the undefended model under it, without which five flags cannot be
    judged; the model itself, for one that has no defense. images (N, C, H, W) in [0, 1] and labels (N,): 100 do for a
    first look. budget: queries an image of each short attack (`suite.suite`); None leaves the attacks out.
    calibration: images that the defense was fitted on. Costs some 10,000 calls beside the attacks' queries.
    docs/flags.md explains each flag. ValueError for bad input before the model is asked.

    >>> from queryfoil import data, defenses, models
    >>> some = data.load("fashion-mnist", "attack")[:20]
    >>> network = models.load("fashion-resnet")
    >>> silent = defenses.DEFENSES["label_only"](network)
    >>> found = check(silent, some.images, some.labels, raw=network, eps=16 / 255, budget=None)
    >>> [flag.name for flag in found if flag.id in ("F2", "F5") and flag.raised]
    ['degenerate scores']
    """
    if budget is not None:
        require_whole("budget", budget, 8)
    task = Task.create(images, labels, ids, None, norm, eps, "margin", seed)
    for one in (model,) if raw is None else (model, raw):
        check_mode(one)
    if calibration is not None:
        check_images(calibration)
    subject = Subject(model, raw, task)
    classes = subject.clean.shape[1]
    task.check_classes(classes)
    if raw is not None and (known := subject.true(task.images[:1], torch.tensor([0])).shape[1]) != classes:
        raise ValueError(f"expected raw to have the {classes} classes of the model, but it has {known}")
    found = [judge(subject) for judge in OF_ANSWERS]
    mine, plain = ([], []) if budget is None else _attack(subject, budget, report)
    found += of_results(mine, plain)
    found.append(_leak(task, calibration))
    found.append(_planted(subject, budget))
    named = {flag.id: flag for flag in found}
    return [named[id] for id in sorted(named, key=number)]


def of_results(mine: Sequence[Record], plain: Sequence[Record]) -> list[Flag]:
    """The flags of recorded attacks on one model behind one defense, and, in `plain`, on it without."""
    return [
        results.scores_useless(mine),
        results.stuck(mine),
        results.larger_eps(mine),
        results.adaptive_beats_standard(mine),
        results.seed_spread(mine),
        counting.lucky_success(mine),
        counting.budget_accounting(mine),
        counting.invalid_images(mine),
        results.attack_sanity(mine, plain),
        counting.clean_set(mine, plain),
    ]


def expected(model: Model, images: Tensor, ids: Tensor, norm: str, budget: int, raw: bool) -> tuple[int, float]:
    """The most queries that the short attacks can make, and how many the model answers a second, by a batch of 128."""
    rows = torch.arange(128) % len(images)
    x, names = quantize(images[rows]), torch.arange(128, device=ids.device)
    classes = ask(model, x, names, torch.zeros_like(names)).shape[1]
    start = time.perf_counter()
    ask(model, x, names, torch.zeros_like(names))
    rate = len(x) / (time.perf_counter() - start)
    return len(suite.suite(norm, raw, classes)) * len(images) * budget, rate


def _attack(subject: Subject, budget: int, report: suite.Report) -> tuple[list[Record], list[Record]]:
    """The records of the short attacks on the model, and on the raw one."""
    task, classes = subject.task, subject.clean.shape[1]
    attacks = suite.suite(task.norm, subject.raw is not None, classes)
    size = len(task.ids) * budget
    total, spent = len(attacks) * size, 0
    mine: list[Record] = []
    plain: list[Record] = []
    for place, short in enumerate(attacks):
        done, before = place * size, spent

        def progress(
            queries: int, settled: int, done: int = done, before: int = before, name: str = short.label
        ) -> None:
            report(name, done + settled, total, before + queries)

        model = subject.model if short.defended else subject.raw
        assert model is not None
        made = suite.record(short, model, "shown" if short.defended else "", task, budget, progress)
        (mine if short.defended else plain).append(made)
        spent += int(made.queries.sum())
    report("done", total, total, spent)
    return mine, plain


def _planted(subject: Subject, budget: int | None) -> Flag:
    """F17 with the attacks of the suite that go on from scores with Square."""
    if budget is None:
        return not_judged("F17", "attacks; pass a budget")
    every = suite.suite(subject.task.norm, False, subject.clean.shape[1])
    known = [one for one in every if one.attack == "square" and one.times == 1 and not one.later]
    return planted.planted_example(subject, known, budget)


def _leak(task: Task, calibration: Tensor | None) -> Flag:
    if calibration is None:
        return not_judged("F18", "the images that the defense was fitted on; pass calibration= (--calibration)")
    return counting.tuning_leak(_bytes(task.images), _bytes(calibration))


def _bytes(x: Tensor) -> NDArray[np.uint8]:
    return (quantize(x) * 255).round().to(torch.uint8).cpu().numpy()
