"""Other people's attacks through our oracle: every image they ask about is a query, and our judge decides."""

import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from queryfoil.checks import lookup
from queryfoil.oracle import LabelOracle, Model, Oracle
from queryfoil.run import Result
from queryfoil.task import Task

SHOWS = {
    "logits": "the model's scores (logarithms of probabilities for output 'probs')",
    "probs": "their softmax",
    "labels": "1 for the label and 0 for all others: nothing else can be read",
}
"""What a foreign attack can be shown."""


class Finished(BaseException):
    """Ends a foreign attack: its image is fooled or its budget is spent.

    No Exception, as foreign code may catch those.
    """


class Door(nn.Module):
    """What a foreign attack gets for a model: images (n, C, H, W) of one image in, scores (n, classes) out.

    Each row is one query, in order. `task` says what is attacked: one image, its label, target and ball.
    Raises `Finished` once nothing more may be asked; no row is asked after that.
    """

    def __init__(self, oracle: Oracle, shows: str) -> None:
        super().__init__()
        self.task = oracle.task
        self.classes = oracle.scores.shape[1]
        self.shows = shows
        self.training = False
        door: Any = LabelOracle(oracle) if shows == "labels" else oracle  # no way to the scores through the former

        def ask(x: Tensor) -> Tensor:
            if not bool(door.live.any()):
                raise Finished
            answer: Tensor = door(x)
            if not bool(door.live.any()):
                raise Finished
            return answer

        self._ask = ask

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, classes), as `shows` says."""
        if not isinstance(x, Tensor) or x.shape[1:] != self.task.images.shape[1:] or not bool(x.isfinite().all()):
            got = f"{tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected finite images (n, {self._size()}) from the attack, but got {got}")
        x = x.detach().to(self.task.images)
        rows = [self._shown(self._ask(row[None])) for row in x]
        return torch.cat(rows) if rows else x.new_empty(0, self.classes)

    def _shown(self, answer: Tensor) -> Tensor:
        if self.shows == "labels":
            return nn.functional.one_hot(answer, self.classes).float()
        return answer.softmax(1) if self.shows == "probs" else answer

    def _size(self) -> str:
        return ", ".join(map(str, self.task.images.shape[1:]))


def foreign(
    attack: Callable[[Door], object],
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    budget: int = 2500,
    seed: int = 0,
    targets: Tensor | None = None,
    shows: str = "logits",
) -> Result:
    """Run somebody else's attack on a model, image by image, with our counting.

    `attack` is called with a `Door` for each image that the model gets right, after query 1, the clean
    image; what it returns does not count. Every row it asks about does, also those outside the ball.
    It is ended at its budget, or when the model is fooled inside the ball; if it ends by itself, the image has
    survived. `shows` is "logits", "probs" or "labels". The other arguments are those of `queryfoil.attack`. `seed`
    is for randomized defenses alone: the attack's own draws are its own affair. Bad input raises
    ValueError before the model is asked.

    >>> def brighter(door):
    ...     for step in range(1, 9):
    ...         door(door.task.images + step / 255)
    >>> x = torch.tensor([0.0, 0.8]).view(2, 1, 1, 1)
    >>> dark = lambda x: torch.cat([0.02 - x.flatten(1), x.flatten(1)], dim=1)
    >>> result = foreign(brighter, dark, x, torch.tensor([0, 1]), eps=8 / 255)
    >>> result.fooled_at[0], result.queries
    (tensor(4), tensor([4, 9]))
    """
    lookup(SHOWS, shows, "kind of answer to show")
    start = time.perf_counter()
    whole = Task.create(x, y, targets=targets, norm=norm, eps=eps, seed=seed)
    oracles, clean = [], []
    for row in range(len(x)):
        oracle = Oracle(model, whole.rows(slice(row, row + 1)), budget)
        clean.append(oracle(oracle.task.images))
        if bool(oracle.live.any()):
            with suppress(Finished):
                attack(Door(oracle, shows))
        oracles.append(oracle)
    fooled_at, queries, adversarial = (
        torch.cat([getattr(oracle, name) for oracle in oracles]) for name in ("fooled_at", "queries", "adversarial")
    )
    return Result(fooled_at, queries, adversarial, torch.cat(clean), budget, time.perf_counter() - start)


def art_classifier(door: Door) -> Any:
    """The door as a classifier of the Adversarial Robustness Toolbox, for images in [0, 1], channels first."""
    try:
        from art.estimators.classification import BlackBoxClassifierNeuralNetwork
    except ModuleNotFoundError:
        raise ValueError("ART is not installed: pip install adversarial-robustness-toolbox") from None

    def predict(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(door(torch.from_numpy(x)).cpu())

    return BlackBoxClassifierNeuralNetwork(
        predict, tuple(door.task.images.shape[1:]), door.classes, channels_first=True, clip_values=(0.0, 1.0)
    )


def foolbox_model(door: Door) -> Any:
    """The door as a model of Foolbox 3, for images in [0, 1]."""
    try:
        foolbox: Any = import_module("foolbox")
    except ModuleNotFoundError:
        raise ValueError("Foolbox is not installed: pip install foolbox") from None
    return foolbox.PyTorchModel(door, bounds=(0, 1), device=door.task.images.device)
