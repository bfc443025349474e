"""What a recipe's training minimizes: a class each, whose fields are its hyper-parameters in the recipe's file."""

import itertools
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil.checks import lookup
from queryfoil.data import Images
from queryfoil.models import zoo
from queryfoil.plan import Number
from queryfoil.task import Task
from queryfoil.train.pgd import pgd


class Objective(BaseModel):
    """Base: no unknown fields, and `loss` gives a scalar.

    Its arguments: a network in training mode, augmented images, the epoch from 0, and where random starts come from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def check(self, model: nn.Module) -> None:
        """ValueError for a network that cannot be trained so, before the data are read."""
        return


class Standard(Objective):
    """Cross-entropy on the training images."""

    method: Literal["standard"] = "standard"

    def loss(self, model: nn.Module, batch: Images, epoch: int, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(model(batch.images), batch.labels)


class Ball(Objective):
    """Where training looks for adversarial images, and how."""

    norm: Literal["linf", "l2"]
    eps: Annotated[Number, Field(gt=0)]
    steps: int = Field(ge=1)
    step_size: Annotated[Number, Field(gt=0)]

    def task(self, batch: Images) -> Task:
        """The ball around these images."""
        return Task(batch.images, batch.labels, batch.ids, None, self.norm, self.eps, "cross_entropy", 0)


class Adversarial(Ball):
    """Cross-entropy on images of PGD (Madry et al., ICLR 2018), beside a share of clean ones.

    The first `clean_epochs` are on clean images alone. PNI trains with half of both (He et al., CVPR 2019).
    """

    method: Literal["adversarial"] = "adversarial"
    clean_share: float = Field(default=0.0, ge=0, lt=1)
    clean_epochs: int = Field(default=0, ge=0)

    def loss(self, model: nn.Module, batch: Images, epoch: int, generator: torch.Generator) -> Tensor:
        if epoch < self.clean_epochs:
            return F.cross_entropy(model(batch.images), batch.labels)
        x = pgd(model, self.task(batch), self.steps, self.step_size, generator)
        loss = F.cross_entropy(model(x), batch.labels)
        if self.clean_share:
            clean = F.cross_entropy(model(batch.images), batch.labels)
            loss = self.clean_share * clean + (1 - self.clean_share) * loss
        return loss


class Helper(Ball):
    """HAT: adversarial training with helper images (Rade and Moosavi-Dezfooli, ICLR 2022).

    CE(x, y) + beta KL(f(x) || f(x + r)) + gamma CE(x + 2 r, label that the network `teacher` gives x + r), where
    r raises the KL term within the ball.
    """

    method: Literal["helper"] = "helper"
    beta: float = Field(ge=0)
    gamma: float = Field(ge=0)
    teacher: str

    def check(self, model: nn.Module) -> None:
        lookup(zoo.MODELS, self.teacher, "teacher")

    def loss(self, model: nn.Module, batch: Images, epoch: int, generator: torch.Generator) -> Tensor:
        model.eval()
        with torch.no_grad():
            clean = model(batch.images).log_softmax(1)
        model.train()

        def away(scores: Tensor) -> Tensor:
            return _divergence(clean, scores.log_softmax(1))

        x = pgd(model, self.task(batch), self.steps, self.step_size, generator, away)
        with torch.no_grad():
            label = zoo.cached(self.teacher, str(x.device))(x).argmax(1)
        helper = (batch.images + 2 * (x - batch.images)).clamp(0, 1)
        scores, adversarial, helped = (model(images) for images in (batch.images, x, helper))
        kept = _divergence(scores.log_softmax(1), adversarial.log_softmax(1)) / len(x)
        return F.cross_entropy(scores, batch.labels) + self.beta * kept + self.gamma * F.cross_entropy(helped, label)


def _members(model: nn.Module) -> nn.ModuleList:
    """The members of an ensemble; ValueError for another network."""
    members = getattr(model, "members", None)
    if not isinstance(members, nn.ModuleList) or len(members) < 2:
        raise ValueError("expected an ensemble of at least 2 members for the method trs, but got another network")
    return members


class TRS(Objective):
    """TRS, on an ensemble: members whose gradients are small and point elsewhere (Yang et al., NeurIPS 2021).

    The sum of the members' cross-entropies, plus `scale` times (`coeff` times the mean absolute cosine between the
    input gradients of two members, plus `smoothness` times twice the mean squared length of a gradient). As in
    the release, a gradient is that of the batch's mean cross-entropy.
    """

    method: Literal["trs"] = "trs"
    coeff: float = Field(default=2.0, ge=0)
    smoothness: float = Field(default=2.0, ge=0)
    scale: float = Field(default=5.0, ge=0)

    def check(self, model: nn.Module) -> None:
        _members(model)

    def loss(self, model: nn.Module, batch: Images, epoch: int, generator: torch.Generator) -> Tensor:
        members = _members(model)
        x = batch.images.detach().requires_grad_()
        losses = [F.cross_entropy(member(x), batch.labels) for member in members]
        gradients = [torch.autograd.grad(loss, x, create_graph=True)[0].flatten(1) for loss in losses]
        alike = [F.cosine_similarity(a, b).abs().mean() for a, b in itertools.combinations(gradients, 2)]
        length = [2 * gradient.square().sum(1).mean() for gradient in gradients]
        penalty = self.coeff * torch.stack(alike).mean() + self.smoothness * torch.stack(length).mean()
        return torch.stack(losses).sum() + self.scale * penalty


AnyObjective = Annotated[Standard | Adversarial | Helper | TRS, Field(discriminator="method")]


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities (N, K), summed over rows."""
    return F.kl_div(q, p, reduction="sum", log_target=True)
