"""Small models and images that the tests share. All their arithmetic is exact in float32, in any order."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from queryfoil.defenses.disguise import disguise
from queryfoil.oracle import LabelOracle, Oracle
from queryfoil.task import Task


def images(n: int, shape: tuple[int, int, int] = (1, 8, 8), low: int = 0, high: int = 255, seed: int = 0) -> Tensor:
    """Random 8-bit images with bytes from low to high."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (n, *shape), generator=generator).float() / 255


def levels(x: Tensor) -> Tensor:
    """The bytes of 8-bit images; fails if they are none."""
    whole = (x * 255).round()
    assert torch.equal(whole / 255, x), "values off the 8-bit grid"
    return whole.long()


class Linear(nn.Module):
    """Logits (N, K): bytes times whole weights, over a power of two, so that no sum is ever rounded.

    A grey image has equal scores, but for the `lead` of class 0.
    """

    def __init__(
        self, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10, seed: int = 0, lead: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-8, 9, (classes, math.prod(shape)), generator=generator).float()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(-128 * weight.sum(1) + 1024 * lead * (torch.arange(classes) == 0))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return ((x * 255).round().flatten(1) @ self.weight.T + self.bias) / 1024


class Declared(nn.Module):
    """A model with its scores in another form, as it declares."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = self.model(x)
        return {"probs": z.softmax, "log_probs": z.log_softmax}[self.output](1) if self.output != "logits" else z


class Watch(nn.Module):
    """A model that remembers every batch it was asked, and whether gradients were on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.batches: list[Tensor] = []
        self.gradients: list[bool] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.clone())
        self.gradients.append(torch.is_grad_enabled())
        return self.model(x)


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own answers, so that every image is right at the start."""
    with torch.no_grad():
        return model(x).argmax(1)


class Plateau(nn.Module):
    """Sure of class 0, whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


class Played:
    """An attack move by move: what it sent, and held after, each query from the second on.

    `states` begins with that of `init`, `sent` with its query, if it made one; `ends` has len(sent) after each move.
    """

    def __init__(self, attack: Any, model: nn.Module, task: Task, steps: int, budget: int = 10**6) -> None:
        self.task, self.sent, self.asked, self.states = task, [], [], []
        self.oracle = Oracle(model, task, budget, observe=self._observe)
        self.oracle(task.images)
        self.sent, self.asked = [], []
        door = LabelOracle(self.oracle) if attack.loss is None else self.oracle
        self.states.append(attack.init(task, door))
        self.ends = [0, len(self.sent)]
        for t in range(steps):
            self.states.append(attack.step(task, door, self.states[-1], t))
            self.ends.append(len(self.sent))

    def _observe(self, ids: Tensor, queries: Tensor, sent: Tensor, scores: Tensor) -> None:
        self.sent.append(sent)
        self.asked.append(ids)

    def of(self, move: int) -> tuple[Tensor, Tensor]:
        """Ids and images sent in a move; 0 is `init`."""
        span = slice(self.ends[move], self.ends[move + 1])
        return torch.cat(self.asked[span]), torch.cat(self.sent[span])

    def counts(self, move: int) -> list[int]:
        """Queries of each image in a move."""
        ids, _ = self.of(move)
        return [int((ids == i).sum()) for i in self.task.ids]


class Door:
    """A LabelOracle for a rule on exact images, without 8 bits and without a budget; it remembers what was asked."""

    def __init__(self, task: Task, fools: Callable[[Tensor], Tensor]) -> None:
        self.labels, self.fools = task.labels, fools
        self.live = torch.ones_like(task.labels, dtype=torch.bool)
        self.shown = task.labels.clone()
        self.asked: list[tuple[Tensor, Tensor]] = []  # images (N, C, H, W), rows asked (N,)

    def __call__(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        where = self.live if where is None else where
        if bool(where.any()):
            self.asked.append((x.clone(), where.clone()))
        self.shown = torch.where(where, self.labels + self.fools(x).long(), self.shown)
        return self.shown


def away(model: Linear, x: Tensor, length: float) -> Tensor:
    """Images moved that far (in L2) from a linear model's boundary between two classes, straight away from it."""
    with torch.no_grad():
        weight = (model.weight[0] - model.weight[1]).view(x.shape[1:])
        sides = model(x).diff(dim=1).sign().view(-1, 1, 1, 1)
        return ((x - sides * length * weight / weight.norm()) * 255).round().clamp(0, 255) / 255


def nearest(model: Linear, x: Tensor, norm: str) -> Tensor:
    """Distance from a linear model of two classes' boundary (N,): the margin over the dual norm of the weights."""
    with torch.no_grad():
        weight = (model.weight[0] - model.weight[1]) * 255 / 1024
        return model(x).diff(dim=1).abs().squeeze(1) / (weight.norm() if norm == "l2" else weight.abs().sum())


class Negated(nn.Module):
    """A model that shows, of the model's logits, the margin 12 - m: what the linear curve with tau 12 does."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x):
        return disguise(self.model(x), tau=12.0, beta=0.0)
