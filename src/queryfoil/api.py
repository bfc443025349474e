"""The library in one call: attack a model."""

from typing import Any

from torch import Tensor

from queryfoil.attacks import build_stated
from queryfoil.defenses import tau_of
from queryfoil.oracle import Model
from queryfoil.run import Result, check, run
from queryfoil.task import Task


def attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: str = "square",
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    budget: int = 2500,
    seed: int = 0,
    targets: Tensor | None = None,
    loss: str | None = None,
    accept: str = "greedy",
    **hyper: Any,
) -> Result:
    """Attack a model (protected or not) on images x (N, C, H, W) in [0, 1] with labels y (N,).

    The model maps images to scores (N, K): a module in evaluation mode or any other callable, on the
    device of x. `eps` is the radius of the ball on the [0, 1] scale, `budget` the most queries for each
    image, the clean one included. `loss` is what the attacker minimizes: "margin", "probability_margin", "probability"
    or "cross_entropy"; left out, what the attack's authors chose. `accept` is the acceptance rule of a random
    search. `targets` (N,) make the attack targeted. `hyper` are the attack's own parameters
    (see `ATTACKS`); a `tau` among them takes the place of the model's. Bad input raises ValueError
    before the model is asked, but for labels that exceed its number of classes, which its first answer tells.

    >>> import torch
    >>> from queryfoil import data, models
    >>> images = data.load("fashion-mnist", "attack")[:20]
    >>> result = attack(models.load("fashion-resnet"), images.images, images.labels, eps=16 / 255, budget=100)
    >>> bool(result.accuracy(100) < result.accuracy(1))
    True
    """
    chosen = build_stated(attack, accept, norm=norm, tau=tau_of(model), hyper=hyper)
    check(chosen, norm, targets is not None, loss)
    task = Task.create(x, y, targets=targets, norm=norm, eps=eps, loss=loss or chosen.loss or "margin", seed=seed)
    return run(chosen, model, task, budget)
