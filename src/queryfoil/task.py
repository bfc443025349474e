"""What an attack is up to: images, labels, goal, ball and loss, checked once and frozen."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from queryfoil import losses, rng
from queryfoil.checks import is_real, lookup

NORMS = {"linf": "largest absolute change of a value", "l2": "Euclidean length of the change of an image"}
TARGETS = 1 << 20  # name of the draw of targets, far from those of attacks
SLACK = {"linf": 3e-7, "l2": 1e-6}
"""Rounding allowed in a ball check. In L-inf it is less than what `oracle.quantize` makes up for, so that the
floor to 8 bits never leaves the ball."""


@dataclass(frozen=True)
class Task:
    """Images (N, C, H, W) float32 in [0, 1], labels (N,), ids (N,), targets (N,) or None, ball, loss, seed.

    `eps` is the radius in the norm "linf" or "l2", on the [0, 1] scale. `ids` name the images in every
    random draw. Build one with `Task.create`, which checks everything.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    targets: Tensor | None
    norm: str
    eps: float
    loss: str
    seed: int

    @classmethod
    def create(
        cls,
        images: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        targets: Tensor | None = None,
        norm: str = "linf",
        eps: float = 8 / 255,
        loss: str = "margin",
        seed: int = 0,
    ) -> "Task":
        """Check every part and build the task; ValueError says what was expected and what came.

        `ids` default to 0..N-1. For L-inf, an eps or images that are no multiples of 1/255 give a warning:
        the oracle floors to 8 bits, which moves such a perturbation out of its ball.

        >>> Task.create(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])).norm
        'linf'
        """
        check_images(images)
        n = len(images)
        ids = torch.arange(n) if ids is None else ids
        _check_integers("labels", labels, n)
        _check_integers("ids", ids, n)
        if (repeated := n - len(set(ids.tolist()))) > 0:
            raise ValueError(f"expected each id once, but got {repeated} repeated ones of {n}")
        if targets is not None:
            _check_integers("targets", targets, n)
            if bool((targets == labels).any()):
                raise ValueError("expected targets other than the labels, but some are equal")
            targets = targets.to(images.device, torch.int64)
        lookup(NORMS, norm, "norm")
        lookup(losses.LOSSES, loss, "loss")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"expected seed as an integer from 0 to 2^63 - 1, but got {seed!r}")
        if not is_real(eps) or not 0 < eps < float("inf"):
            raise ValueError(f"expected eps > 0 on the [0, 1] scale (such as 8/255), but got {eps!r}")
        if norm == "linf" and eps > 1:
            raise ValueError(f"expected eps <= 1 for L-inf, on the [0, 1] scale, but got {eps:g}; is it {eps:g}/255?")
        if norm == "linf" and abs(eps * 255 - round(eps * 255)) > 1e-4:
            warnings.warn(
                f"eps = {eps:.5g} is no multiple of 1/255: images are floored to 8 bits after the ball is checked, "
                f"so what the model sees can lie up to 1/255 outside; use {max(round(eps * 255), 1)}/255",
                stacklevel=2,
            )
        images = images.detach()
        if norm == "linf" and float((images * 255 - (images * 255).round()).abs().max()) > 1e-2:
            warnings.warn(
                "the images are no multiples of 1/255: they are floored to 8 bits after the ball is checked, so what "
                "the model sees can lie up to 1/255 outside; pass oracle.quantize(images)",
                stacklevel=2,
            )
        device = images.device
        labels, ids = (t.to(device, torch.int64) for t in (labels, ids))
        return cls(images, labels, ids, targets, norm, float(eps), loss, seed)

    def rows(self, index: Tensor | slice) -> "Task":
        """The same task on some of its images."""
        targets = None if self.targets is None else self.targets[index]
        return replace(self, images=self.images[index], labels=self.labels[index], ids=self.ids[index], targets=targets)

    def check_classes(self, classes: int) -> None:
        """ValueError for labels or targets that a model with so many classes cannot give."""
        for name, values in (("labels", self.labels), ("targets", self.targets)):
            if values is not None and int(values.max()) >= classes:
                raise ValueError(
                    f"expected {name} in 0..{classes - 1}, as the model has {classes} classes, "
                    f"but got {int(values.max())}"
                )

    def margin(self, scores: Tensor) -> Tensor:
        """The logit margin that decides success: <= 0 where the goal is reached (N,)."""
        return losses.margin(scores, self.labels, self.targets)

    def reached(self, labels: Tensor) -> Tensor:
        """Whether labels shown (N,) are what the attacker wants (N,)."""
        return labels != self.labels if self.targets is None else labels == self.targets

    def objective(self, scores: Tensor) -> Tensor:
        """What the attack minimizes, by the task's loss (N,)."""
        return losses.LOSSES[self.loss](scores, self.labels, self.targets)

    def project(self, x: Tensor) -> Tensor:
        """The nearest images in the ball, and in [0, 1]."""
        delta = x - self.images
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * (self.eps / length(delta).clamp_min(1e-12)).clamp_max(1)[:, None, None, None]
        return (self.images + delta).clamp(0, 1)

    def contains(self, x: Tensor) -> Tensor:
        """Whether each proposed image lies in the ball (N,), up to rounding; [0, 1] is not asked for."""
        delta = x - self.images
        size = delta.abs().flatten(1).amax(1) if self.norm == "linf" else length(delta)
        return size <= self.eps + SLACK[self.norm]


def length(delta: Tensor) -> Tensor:
    """Euclidean length of each row of (N, ...), (N,).

    Summed in float64, as the order of the sum depends on the batch, which float32 would show in the last bit.

    >>> length(torch.tensor([[3.0, 4.0]]))
    tensor([5.])
    """
    norm: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64)
    return norm.to(delta)


def random_targets(labels: Tensor, ids: Tensor, classes: int, seed: int) -> Tensor:
    """A wrong class for each image (N,), uniformly over the others, a function of seed and id.

    >>> random_targets(torch.tensor([0, 1]), torch.tensor([7, 8]), classes=2, seed=0)
    tensor([1, 0])
    """
    offset = rng.integers(seed, ids, 0, TARGETS, classes - 1).squeeze(1) + 1
    return (labels + offset) % classes


def check_images(images: Tensor) -> None:
    """ValueError unless images are float32 (N, C, H, W), N >= 1, finite and in [0, 1]."""
    if not isinstance(images, Tensor) or images.dtype != torch.float32 or images.ndim != 4:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"expected images as a float32 tensor (N, C, H, W), but got {got}")
    if not images.numel():
        raise ValueError(f"expected at least one image, but got an empty batch {tuple(images.shape)}")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"expected images in [0, 1], but got values from {low:.4g} to {high:.4g}; "
            "divide bytes by 255 and leave normalization to the model"
        )


def _check_integers(name: str, values: Tensor, n: int) -> None:
    if (
        not isinstance(values, Tensor)
        or values.shape != (n,)
        or values.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    ):
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"expected {name} as an integer tensor ({n},), but got {got}")
    if bool((values < 0).any()):
        raise ValueError(f"expected {name} >= 0, but got {int(values.min())}")
