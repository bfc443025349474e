"""F17: is an adversarial example found that is provably there, and easy to find without the defense?

After Zimmermann et al. (NeurIPS 2022): the network is replaced by one with a planted example in each ball, and the
defense is put around that.
"""

import copy

import torch
from torch import Tensor, nn

from queryfoil import metrics, rng
from queryfoil.attacks import build
from queryfoil.defenses import tau_of
from queryfoil.defenses.defense import Defense
from queryfoil.defenses.dent import DENT
from queryfoil.defenses.pni import PNI
from queryfoil.defenses.rfd import RFD
from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.subject import Subject, percent
from queryfoil.flags.suite import Short, on
from queryfoil.oracle import Model, answers, from_log_scores, quantize
from queryfoil.run import run
from queryfoil.task import Task

REACH = 0.5  # of the way to the planted example at which the label changes
BLOCKS = 4  # a side of the pattern
PATTERN = 1 << 28  # name of the draw, far from those of attacks
FAR = 0.3
"""How much of the pattern an image must have room for, as black cannot be darkened."""
FOUND = 0.95
LEAST = 8  # images
REPEATS = 10
INSIDE = (DENT, PNI, RFD)  # which need the network itself


class Planted(nn.Module):
    """A network that looks for a pattern alone: an image gets the scores of the nearest known one, and its margin falls
    in proportion to how much of that one's pattern was added, to 0 at half of what the ball allows.

    clean (N, C, H, W): the known images. scores (N, K): log-scores of each. pattern (N, C, H, W): of -1 and +1; reach
    (N,): the mean of the change times the pattern at the planted example. The sum of the scores stays.
    """

    def __init__(self, clean: Tensor, scores: Tensor, pattern: Tensor, reach: Tensor, output: str) -> None:
        super().__init__()
        self.clean, self.scores, self.reach, self.output = clean.flatten(1), scores, reach, output
        self.pattern = pattern.flatten(1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, K) of the declared kind."""
        flat = x.flatten(1)
        row = torch.cdist(flat, self.clean).argmin(1)
        way = (self.pattern[row] * (flat - self.clean[row])).double().mean(1) / self.reach[row]
        z = self.scores[row].double()
        best = z.topk(2, 1)
        fall = (best.values[:, 0] - best.values[:, 1]) * way / REACH
        classes = z.shape[1]
        others = fall / classes  # the margin falls by the sum of both
        z = (z + others[:, None]).scatter_add(1, best.indices[:, :1], -fall[:, None])
        return from_log_scores(z.float(), self.output)


def planted_example(subject: Subject, shorts: list[Short], budget: int) -> Flag:
    """F17: greedy Square and others on the defense around `Planted`; raised where together they find too few.

    That is less than 95 % (the 95 % interval ends below).

    Each attack is run on the images that the ones before it left. Of those images whose planted example fools the
    defense when it is shown, in most of ten draws; not judged where greedy Square finds less than 95 % without it.
    """
    raw = subject.raw
    if raw is None:
        return not_judged("F17", "the undefended model; pass raw=")
    victim, brightened, kept = plant(subject.task, raw)
    if len(kept) < LEAST:
        return not_judged("F17", f"{LEAST} images in whose balls there is room for a pattern")
    defended = around(subject.model, raw, victim)
    if defended is None:
        return not_judged("F17", "a defense of the library that asks the network for scores alone, around raw")
    task = subject.task.rows(kept)
    if not getattr(defended, "rowwise", True):
        return not_judged("F17", "an answer that does not depend on the batch (see F2)")
    fools = torch.zeros(len(kept), dtype=torch.float64, device=kept.device)
    for query in range(1, REPEATS + 1):
        scores = answers(defended, brightened, task.ids, torch.full_like(task.ids, query), task.seed)
        fools += (task.margin(scores) <= 0).double() / REPEATS
    there = (fools > 0.5).nonzero().squeeze(1)
    if len(there) < LEAST:
        return not_judged("F17", f"{LEAST} images whose planted example fools the defense")
    task = task.rows(there)
    control = float(_found(Short("greedy Square"), victim, task, budget).double().mean())
    if control < FOUND:
        return not_judged("F17", f"a plant that greedy Square finds without the defense (it finds {percent(control)})")
    shares, left = [], torch.arange(len(there), device=there.device)
    for short in shorts:
        if len(left):
            left = left[~_found(short, defended, task.rows(left), budget)]
        shares.append(1 - len(left) / len(there))
    first, together = shares[0], shares[-1]
    measured = (
        f"of {len(there)} images that provably have an adversarial example in their ball, {shorts[0].label} finds "
        f"{percent(first)} in {budget} queries, and {len(shorts)} attacks together {percent(together)} "
        f"({percent(control)} without the defense). Raised where the 95 % interval ends below {percent(FOUND)} "
        "together"
    )
    return judged(
        "F17", metrics.wilson(len(there) - len(left), len(there)).high < FOUND, measured,
        images=len(there), standard=first, together=together, undefended=control,
    )  # fmt: skip


def plant(task: Task, raw: Model) -> tuple[Planted, Tensor, Tensor]:
    """The planted network of a task's images; each one's planted example (n, C, H, W), and the rows (n,) that have one.

    Those that the raw model gets right, and whose pattern of 4 x 4 blocks, each brighter or darker, has room enough.
    """
    x = quantize(task.images)
    n, _, height, width = x.shape
    levels = int((task.eps if task.norm == "linf" else task.eps / x[0].numel() ** 0.5) * 255 + 1e-4)
    signs = rng.signs(task.seed, task.ids, 0, PATTERN, BLOCKS**2).view(n, 1, BLOCKS, BLOCKS)
    pattern = nn.functional.interpolate(signs, (height, width), mode="nearest").expand_as(x)
    end = quantize(x + pattern * levels / 255)
    reach = (pattern * (end - x)).flatten(1).double().mean(1)
    scores = answers(raw, x, task.ids, torch.zeros_like(task.ids), task.seed)
    right = (task.margin(scores) > 0) & task.contains(end)
    kept = (right & (reach > FAR * levels / 255) & (levels > 0)).nonzero().squeeze(1)
    victim = Planted(x[kept], scores[kept], pattern[kept], reach[kept], getattr(raw, "output", "logits"))
    return victim, end[kept], kept


def around(model: Model, raw: Model, other: nn.Module) -> Model | None:
    """The defense of a model around another network; None where it is not the library's, or changes the network."""
    if model is raw:
        return other
    if not isinstance(model, Defense) or isinstance(model, INSIDE):
        return None
    inner = around(model.model, raw, other)
    if inner is None:
        return None
    outer = copy.copy(model)  # parameters are shared, the modules are its own
    outer._modules = {**model._modules, "model": inner}  # type: ignore[dict-item]
    return outer


def _found(short: Short, model: Model, task: Task, budget: int) -> Tensor:
    """Which images (N,) a short attack fools."""
    attack = build(short.attack, short.accept, norm=task.norm, tau=tau_of(model), **short.hyper)
    own = on(short, task, attack)
    return run(attack, model, own, budget).fooled_at.le(budget)
