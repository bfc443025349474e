"""The only door to a model: quantizes, asks, counts and judges."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from queryfoil import losses, rng
from queryfoil.metrics import NEVER
from queryfoil.task import Task

Model = Callable[[Tensor], Tensor]
"""Images (n, C, H, W) in [0, 1] to scores (n, K); a module, an ONNX session, a remote endpoint.

What the scores are is declared by an attribute `output`: "logits" (also where there is none),
"log_probs" or "probs". Nothing is guessed from values.
"""

Observer = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Called after each query with ids (n,), query numbers (n,), images as sent, scores (n, K)."""

SMALLEST = torch.finfo(torch.float32).tiny


def quantize(x: Tensor) -> Tensor:
    """Clip to [0, 1] and floor to multiples of 1/255, as a service that takes 8-bit images sees them.

    The 1e-4 of a level makes up for float32 rounding: a byte plus or minus a whole number of levels,
    computed in float32, gives exactly that byte (checked for all pairs).

    >>> quantize(torch.tensor([0.5, 1.3])) * 255
    tensor([127., 255.])
    """
    return x.clamp(0, 1).mul_(255).add_(1e-4).floor_().div_(255)


def as_log_scores(scores: Tensor, output: str) -> Tensor:
    """Logits and log-probabilities as they are; probabilities by their logarithm (0 as the smallest float32).

    The logarithm of 0 is that of the smallest float32 too. Probabilities in half precision give float32. ValueError for
    an unknown kind, or values outside [0, 1].
    """
    if output == "logits":
        return scores
    if output == "log_probs":
        return torch.where(scores == -torch.inf, math.log(SMALLEST), scores)
    if output != "probs":
        raise ValueError(f"expected a model's output to be logits, log_probs or probs, but got {output!r}")
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if bool((scores < 0).any()) or bool((scores > 1 + 1e-3).any()):
        raise ValueError(
            "expected probabilities in [0, 1] from a model that declares output = 'probs', but got "
            f"{float(scores.min()):.4g} to {float(scores.max()):.4g}"
        )
    return scores.clamp_min(SMALLEST).log()


def from_log_scores(scores: Tensor, output: str) -> Tensor:
    """The way back: log-scores (N, K) as the kind that a model declares, normalized if they are probabilities.

    >>> from_log_scores(torch.zeros(1, 2), "probs")
    tensor([[0.5000, 0.5000]])
    """
    if output == "probs":
        return scores.softmax(-1)
    return scores.log_softmax(-1) if output == "log_probs" else scores


def answers(
    model: Model, images: Tensor, ids: Tensor, queries: Tensor, seed: int = 0, micro_batch: int = 128
) -> Tensor:
    """Scores (N, K) of a model, uncounted: logits, log-probabilities, or logarithms of probabilities.

    In micro-batches and without gradients. Randomized defenses draw by (seed, id, query number); `ids`
    and `queries` are (N,). ValueError if the scores are not (N, K) with K >= 2 and finite.

    >>> answers(torch.nn.Flatten(), torch.eye(2).view(2, 1, 1, 2), torch.arange(2), torch.zeros(2).long())
    tensor([[1., 0.],
            [0., 1.]])
    """
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), micro_batch):
            batch = [t[start : start + micro_batch] for t in (images, ids, queries)]
            batch[0] = batch[0].clone()  # a model that overwrites its input spoils no record
            with rng.rows(seed, batch[1], batch[2]):
                scores = _asked(model, batch[0])
            scores = _log_scores(scores, len(batch[0]), getattr(model, "output", "logits"))
            parts.append(scores.to(images.device))
    scores = torch.cat(parts)
    return scores if scores.dtype == torch.float64 else scores.float()


class ModelError(RuntimeError):
    """A model raised something, in the middle of a run."""


def _asked(model: Model, batch: Tensor) -> Tensor:
    try:
        return model(batch)
    except ValueError:
        raise
    except Exception as error:  # whatever a model of somebody else's raises
        raise ModelError(f"the model raised {type(error).__name__} on images {tuple(batch.shape)}: {error}") from error


def _log_scores(scores: object, n: int, output: str) -> Tensor:
    """Scores (n, K) as the model gave them, checked, as logits or log-probabilities."""
    if not isinstance(scores, Tensor):
        raise ValueError(f"expected scores as a tensor ({n}, K) from the model, but got {type(scores).__name__}")
    if scores.ndim != 2 or len(scores) != n or scores.shape[1] < 2:
        raise ValueError(f"expected scores ({n}, K) with K >= 2 from the model, but got {tuple(scores.shape)}")
    scores = as_log_scores(scores, output)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("expected finite scores from the model, but got NaN or infinite ones")
    return scores


def check_mode(model: Model) -> None:
    """ValueError for a module of which any part is in training mode."""
    if isinstance(model, torch.nn.Module) and any(module.training for module in model.modules()):
        raise ValueError("expected a model in evaluation mode, but it is (partly) training; call model.eval()")


class Oracle:
    """Answers an attack's queries on the images of a task, at most `budget` for each image.

    One call is one query for each live row and returns scores for all rows; a row that is finished
    (goal reached, wrong from the start, or budget spent) keeps its last scores and costs nothing. A
    success is the first query inside the ball on which the model's own answer reaches the goal, be
    it a probe or an accepted iterate; a tie for the top counts for the attacker.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        budget: int,
        micro_batch: int = 128,
        observe: Observer | None = None,
    ) -> None:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(f"expected a budget of at least 1 query an image, but got {budget!r}")
        if micro_batch < 2:
            raise ValueError(f"expected a micro-batch of at least 2 images, but got {micro_batch}")
        check_mode(model)
        self.model, self.task, self.budget = model, task, budget
        self.micro_batch, self.observe = micro_batch, observe
        n = len(task.images)
        device = task.images.device
        self.rows = torch.arange(n, device=device)  # of the task's current rows among the first ones
        self.live = torch.ones(n, dtype=torch.bool, device=device)
        self.scores = torch.empty(n, 0, device=device)  # last answers; K is known after the first query
        self.queries = torch.zeros(n, dtype=torch.int64, device=device)  # these three: all first rows
        self.fooled_at = torch.full((n,), NEVER, dtype=torch.int64, device=device)
        self.adversarial = task.images.clone()

    @property
    def spent(self) -> int:
        """Queries so far, all images together."""
        return int(self.queries.sum())

    @property
    def settled(self) -> int:
        """Queries spent or never needed, of images x budget: for a progress display."""
        return int(torch.where(self.fooled_at < NEVER, self.budget, self.queries).sum())

    def __call__(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Query images (N, C, H, W), one for each row of the current task; scores (N, K).

        `where` (N,) bool leaves out rows, which cost nothing and keep their last scores.
        """
        if x.shape != self.task.images.shape:
            raise ValueError(f"expected images {tuple(self.task.images.shape)}, but got {tuple(x.shape)}")
        wanted = self.live if where is None else self.live & where
        every = bool(wanted.all())
        asked = torch.arange(len(x), device=x.device) if every else wanted.nonzero().squeeze(1)
        if not len(asked):
            return self.scores
        task = self.task if every else self.task.rows(asked)
        x = x if every else x[asked]
        first = self.rows[asked]
        sent = quantize(x.float())
        number = self.queries[first] + 1
        scores = answers(self.model, sent, task.ids, number, task.seed, self.micro_batch)
        if not self.scores.shape[1]:
            self.task.check_classes(scores.shape[1])
        self.queries[first] = number
        self._judge(scores, task, x, sent, first, number)
        self.live[asked] = (self.fooled_at[first] == NEVER) & (number < self.budget)
        if every:
            self.scores = scores
        else:
            self.scores = self.scores.index_copy(0, asked, scores)
        if self.observe is not None:
            self.observe(task.ids, number, sent, scores)
        return self.scores

    def keep(self, index: Tensor) -> Task:
        """Drop all current rows but these, which changes no result; gives the smaller task."""
        self.rows, self.live, self.scores = self.rows[index], self.live[index], self.scores[index]
        self.task = self.task.rows(index)
        return self.task

    def _judge(self, scores: Tensor, task: Task, x: Tensor, sent: Tensor, first: Tensor, number: Tensor) -> None:
        reached = task.margin(scores) <= 0
        # an image that is wrong on its clean query is no attack's success, whatever the goal
        reached |= (number == 1) & (losses.margin(scores, task.labels) <= 0)
        reached &= task.contains(x)
        if bool(reached.any()):
            self.fooled_at[first[reached]] = number[reached]
            self.adversarial[first[reached]] = sent[reached]


class LabelOracle:
    """The same door for attacks that see labels alone: there is no way to the scores through it."""

    def __init__(self, oracle: Oracle) -> None:
        def ask(x: Tensor, where: Tensor | None = None) -> Tensor:
            return oracle(x, where).argmax(1)

        def live() -> Tensor:
            return oracle.live

        self._ask, self._live = ask, live

    @property
    def live(self) -> Tensor:
        """Rows that can still be asked (N,)."""
        return self._live()

    def __call__(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """Query images as with `Oracle`; the label shown for each (N,), which for rows not asked is the last one."""
        return self._ask(x, where)
