"""QueryNet: surrogates learn from the answers, and say which proposal is worth the query.

Chen et al., "QueryNet: Attack by Multi-Identity Surrogates" (IEEE Trans. Cybernetics, 2022). Before each
query, three surrogates are trained on all images asked and their answers. Each proposes a step along
its own gradient, Square proposes a window; the surrogates choose for each image, weighted by how often
their own proposals helped last time. Once Square helps most, it goes on alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from queryfoil import losses, rng
from queryfoil.attacks import surrogate
from queryfoil.attacks.square import TINY, Square, on_the_sphere
from queryfoil.attacks.surrogate import STEPS, Surrogate
from queryfoil.checks import lookup, require, require_whole
from queryfoil.oracle import Oracle, quantize
from queryfoil.run import Attack
from queryfoil.task import Task, length

BATCHES = 1 << 16  # name of the draw of the first surrogate's training batches, far from those of Square
SMALLEST = 8  # side of images that the searching networks can halve twice
FEWEST = 10  # images for which an attacker must be chosen, to be evaluated


class State(NamedTuple):
    best: Tensor  # (N, C, H, W) current images
    loss: Tensor  # (N,) the attacker's loss at `best`
    surrogates: tuple[Surrogate, ...]  # none once Square goes on alone
    weights: Tensor  # (A,) of the surrogates, and of Square
    asked: Tensor  # (M, C, H, W) uint8, images as the model saw them while there are surrogates
    answers: Tensor  # (M, K) its scores


@dataclass(frozen=True)
class QueryNet(Attack[State]):
    """QueryNet, L-inf and L2: proposals of surrogates that are trained on the model's answers.

    surrogates: "small" (three small networks, for a CPU) or "search" (the paper's, whose architectures
    are searched). steps: training steps before each query; None is 20 for "small", 500 for "search".
    batch: images a step. width: channels of the surrogates, a multiple of 4. p_init, horizon: of Square.

    An attacker chosen for fewer than 10 images gets weight 0 (if fewer than 40 are still
    attacked, for fewer than a quarter of these). Square goes on alone as soon as no surrogate has a larger weight
    than it: also after a query that improved nothing.
    """

    surrogates: str = "small"
    steps: int | None = None
    batch: int = 128
    width: int = 16
    p_init: float = 0.05
    horizon: int = 10_000

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    loss: ClassVar[str] = "margin"
    rowwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        lookup(STEPS, self.surrogates, "kind of surrogates")
        if self.steps is not None:
            require_whole("steps", self.steps)
        require_whole("batch", self.batch)
        require_whole("width", self.width, least=4)
        require("width", self.width, "as a multiple of 4", lambda value: value % 4 == 0)
        Square(self.p_init, self.horizon)

    def check_task(self, task: Task) -> None:
        if self.surrogates == "search" and min(task.images.shape[2:]) < SMALLEST:
            raise ValueError(
                f"expected images of at least {SMALLEST} x {SMALLEST} for surrogates='search', which halve them twice, "
                f"but got {tuple(task.images.shape[2:])}; take surrogates='small'"
            )

    def init(self, task: Task, query: Oracle) -> State:
        live = query.live.clone()
        clean = query.scores[live]
        x = Square(self.p_init, self.horizon).start(task)
        scores = query(x)
        models = surrogate.build(self.surrogates, task.images, scores.shape[1], self.width, task.seed)
        return State(
            x,
            task.objective(scores),  # accepted whatever it is
            models,
            torch.tensor([1.0] * len(models) + [0.0], device=x.device),
            torch.cat([as_bytes(task.images[live]), as_bytes(x[live])]),
            torch.cat([clean, scores[live]]),
        )

    def step(self, task: Task, query: Oracle, state: State, t: int) -> State:
        # differs from the release: no choice by surrogates among Square's proposals after the switch, which is
        # AAA's addition to QueryNet.
        live = query.live.nonzero().squeeze(1)
        some, best = task.rows(live), state.best[live]
        square = Square(self.p_init, self.horizon).propose(some, best, t)
        if not state.surrogates:
            return _ask(task, query, state, live, square)
        self._train(task, state, t)
        steps = [along_the_gradient(some, best, network, self.batch) for network in state.surrogates]
        candidates = torch.stack([*steps, square])  # (A, n, C, H, W), of the n live images
        choice = choose(some, candidates, state.surrogates, state.weights, self.batch)
        x = candidates[choice, torch.arange(len(live), device=live.device)]
        after = _ask(task, query, state, live, x)
        weights = evaluate(choice, (after.loss < state.loss)[live], len(candidates))
        if bool(weights[:-1].max() <= weights[-1]):
            return after._replace(weights=weights, surrogates=(), asked=state.asked[:0], answers=state.answers[:0])
        return after._replace(
            weights=weights,
            asked=torch.cat([state.asked, as_bytes(x)]),
            answers=torch.cat([state.answers, query.scores[live]]),
        )

    def _train(self, task: Task, state: State, t: int) -> None:
        """Train each surrogate on batches of its own, drawn with replacement from all images asked.

        # differs from the release: scores have mean 0 in each row and variance 1 in all, so that those of any
        # model are as easy to learn; and no cross-entropy for 1000 classes.
        """
        steps = STEPS[self.surrogates] if self.steps is None else self.steps
        numbers = torch.arange(steps, device=task.images.device)
        answers = state.answers.float() - state.answers.float().mean(1, keepdim=True)
        answers /= answers.std().clamp_min(TINY)
        for i, network in enumerate(state.surrogates):
            drawn = rng.integers(task.seed, numbers, t, BATCHES + i, len(answers), 2 * self.batch)
            surrogate.train(network, state.asked, answers, drawn.view(steps, 2, self.batch))


def _ask(task: Task, query: Oracle, state: State, live: Tensor, x: Tensor) -> State:
    """Ask about an image for each live row (n, C, H, W), and keep it where the loss strictly falls."""
    x = state.best.index_copy(0, live, x)
    loss = task.objective(query(x))
    better = loss < state.loss
    best = torch.where(better[:, None, None, None], x, state.best)
    return state._replace(best=best, loss=torch.where(better, loss, state.loss))


def along_the_gradient(task: Task, best: Tensor, network: Callable[[Tensor], Tensor], batch: int = 128) -> Tensor:
    """One step of 2 eps from `best` (N, C, H, W) along a surrogate's gradient of cross-entropy, back into the ball.

    Away from the label, or towards the target. L-inf: by the sign. L2: onto the sphere of radius eps.

    # differs from the release: one step towards the target, where it makes ten of 4/255 away from it.
    """
    gradients: list[Tensor] = []
    for rows in torch.split(torch.arange(len(best), device=best.device), batch):
        some = task.rows(rows)
        with torch.enable_grad():
            x = best[rows].detach().requires_grad_()
            log_probs = losses.cross_entropy(network(x), some.labels, some.targets)
            gradients += torch.autograd.grad(log_probs.sum(), x)
    gradient = torch.cat(gradients)
    if task.norm == "linf":
        return task.project(best - 2 * task.eps * gradient.sign())
    direction = gradient / length(gradient).clamp_min(TINY)[:, None, None, None]
    return on_the_sphere(task, best - 2 * task.eps * direction - task.images)


@torch.no_grad()
def choose(
    task: Task, candidates: Tensor, networks: Sequence[Callable[[Tensor], Tensor]], weights: Tensor, batch: int = 128
) -> Tensor:
    """Number of the candidate of (A, N, C, H, W) with the lowest weighted mean of the surrogates' margins (N,)."""
    scores = torch.zeros(candidates.shape[:2], device=candidates.device)
    for rows in torch.split(torch.arange(len(task.images), device=candidates.device), batch):
        some = task.rows(rows)
        for attacker, x in enumerate(candidates[:, rows]):
            for weight, network in zip(weights[:-1], networks, strict=True):
                scores[attacker, rows] += weight * some.margin(network(x))
    return scores.argmin(0)


def evaluate(choice: Tensor, improved: Tensor, attackers: int) -> Tensor:
    """Share of images improved, of those (N,) for which each attacker was chosen (A,); 0 if these are too few.

    # differs from the release: of fewer than 40 images, a quarter is enough, as else nobody might be evaluated;
    # and an attacker that was never chosen is no error.
    """
    chosen = torch.bincount(choice, minlength=attackers)
    gained = torch.bincount(choice[improved], minlength=attackers)
    enough = chosen >= min(FEWEST, len(choice) / attackers)
    return torch.where(enough, gained / chosen.clamp_min(1), 0.0)


def as_bytes(x: Tensor) -> Tensor:
    """Images as the model sees them, in uint8."""
    return (quantize(x) * 255).round().byte()
