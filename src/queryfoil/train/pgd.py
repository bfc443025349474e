"""Projected gradient descent: the white-box attack of adversarial training, and the yardstick of a robust network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil import rng
from queryfoil.task import Task, length


def pgd(
    model: nn.Module,
    task: Task,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Images (N, C, H, W) in the task's ball on which a loss is high (Madry et al., ICLR 2018).

    From a random point of the ball, `steps` steps of length `step_size` in the task's norm up the gradient, each
    followed by a projection. `loss` maps scores (N, K) to a scalar, summed over rows; by default it is
    the cross-entropy with the labels. The network is asked in evaluation mode and left as it was.

    >>> model, task = nn.Flatten(), Task.create(torch.full((1, 1, 1, 2), 0.4), torch.tensor([0]), eps=51 / 255)
    >>> (pgd(model, task, steps=5, step_size=0.1, generator=torch.Generator()) * 255).round()
    tensor([[[[ 51., 153.]]]])
    """

    def wrong(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, task.labels, reduction="sum")

    objective = loss or wrong
    x = task.project(task.images + _start(task, generator))
    with evaluating(model), torch.enable_grad():
        for _ in range(steps):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(model(x)), x)
            x = task.project(x.detach() + step_size * _direction(gradient, task.norm))
    return x


def robust_accuracy(model: nn.Module, task: Task, steps: int = 20, seed: int = 0, micro_batch: int = 250) -> float:
    """Share of the task's images that are right before and after `pgd` with steps of 2.5 eps / steps.

    A randomized network draws its noise anew at each call, as a function of the task's seed.
    """
    generator = torch.Generator().manual_seed(seed)
    right = 0
    with evaluating(model):
        for start in range(0, len(task.images), micro_batch):
            part = task.rows(slice(start, start + micro_batch))
            with rng.rows(task.seed, part.ids, torch.zeros_like(part.ids)):
                x = pgd(model, part, steps, 2.5 * task.eps / steps, generator)
                with torch.no_grad():
                    stands = (model(part.images).argmax(1) == part.labels) & (model(x).argmax(1) == part.labels)
            right += int(stands.sum())
    return right / len(task.images)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _start(task: Task, generator: torch.Generator) -> Tensor:
    """A random point of the ball, seen from its centre."""
    shape = task.images.shape
    if task.norm == "linf":
        return (torch.rand(shape, generator=generator).to(task.images) * 2 - 1) * task.eps
    direction = _direction(torch.randn(shape, generator=generator).to(task.images), "l2")
    return direction * task.eps * torch.rand(shape[0], 1, 1, 1, generator=generator).to(task.images)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """The step of length 1 in the norm that follows a gradient best."""
    return gradient.sign() if norm == "linf" else gradient / length(gradient).clamp_min(1e-12)[:, None, None, None]
