"""Small models and images that the tests share. All their arithmetic is exact in float32, in any order."""

import math
from typing import Any

import torch
from torch import Tensor, nn

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

    `states` begins with that of `init`, `sent` with its query, if it made one.
    """

    def __init__(self, attack: Any, model: nn.Module, task: Task, steps: int, budget: int = 10**6) -> None:
        self.task, self.sent, self.asked, self.states = task, [], [], []
        self.oracle = Oracle(model, task, budget, observe=self._observe)
        self.oracle(task.images)
        self.sent, self.asked = [], []
        door = LabelOracle(self.oracle) if attack.loss is None else self.oracle
        self.states.append(attack.init(task, door))
        for t in range(steps):
            self.states.append(attack.step(task, door, self.states[-1], t))

    def _observe(self, ids: Tensor, queries: Tensor, sent: Tensor, scores: Tensor) -> None:
        self.sent.append(sent)
        self.asked.append(ids)
