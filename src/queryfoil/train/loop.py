"""Training by a recipe: SGD, random shifts and mirrors, the recipe's objective; resumable after every epoch."""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil import data, files, metrics, rng
from queryfoil.checks import lookup
from queryfoil.models.checkpoints import PUBLISHED
from queryfoil.models.resnet import initialize
from queryfoil.models.victim import classes_of
from queryfoil.models.zoo import MODELS, on_device
from queryfoil.oracle import answers
from queryfoil.task import Task
from queryfoil.train.pgd import robust_accuracy
from queryfoil.train.recipe import Recipe

PGD = {
    "fashion-mnist": (("linf", 8 / 255), ("linf", 16 / 255), ("l2", 1.5)),
    "cifar10": (("linf", 8 / 255), ("l2", 0.5)),
}
"""Balls in which a card tells the accuracy under 20 steps of PGD; the largest ones are those of the plans."""


NETWORKS: dict[str, Callable[[], nn.Module]] = {name: published.build for name, published in PUBLISHED.items()}
NETWORKS.update((name, network.__call__) for name, network in MODELS.items())
"""What can be trained: the networks of the zoo, and those whose weights others published."""


class Epoch(NamedTuple):
    """What is reported after an epoch; `loss` is the mean over the training images."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float


def train(
    recipe: Recipe,
    folder: str | Path,
    out: str | Path,
    device: str = "cpu",
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> dict[str, object]:
    """Train a network by its recipe and write OUT/NAME.safetensors and OUT/NAME.json (the card).

    `folder` holds the full data set. After every epoch the state goes to OUT/NAME.resume.safetensors,
    from which a killed run continues; the result is the same as without the interruption, because every
    draw depends on the seed and the epoch alone. Returns the card.
    """
    builder = lookup(NETWORKS, recipe.name, "model")
    lookup(PGD, recipe.dataset, "data set for training")
    Path(out).mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        model = builder()
    recipe.objective.check(model)
    initialize(model, torch.Generator().manual_seed(recipe.seed))
    on_device(model, device)
    train_set, test_set = (data.load(recipe.dataset, split, folder) for split in ("train", "test"))
    _check_fit(model, train_set, recipe, device)
    optimizer = _optimizer(model, recipe)
    resume = Path(out) / f"{recipe.name}.resume.safetensors"
    log = _restore(resume, recipe, model, optimizer) if resume.exists() else []
    for epoch in range(len(log), recipe.epochs):
        loss = _train_epoch(model, optimizer, train_set, recipe, epoch)
        accuracy = (predict(model, test_set.images).argmax(1) == test_set.labels).double().mean().item()
        log.append({"loss": round(loss, 4), "test_accuracy": round(accuracy, 4)})
        _save_resume(resume, recipe, model, optimizer, log)
        report(Epoch(epoch + 1, recipe.epochs, loss, accuracy))
    return _finish(model, test_set, recipe, folder, Path(out), resume, log)


def _check_fit(model: nn.Module, train_set: data.Images, recipe: Recipe, device: str) -> None:
    """ValueError unless the network answers such images, for all their classes, and a batch is no larger than all."""
    if recipe.batch > len(train_set):
        raise ValueError(f"expected batch <= {len(train_set)}, the number of training images, but got {recipe.batch}")
    classes = classes_of(model.eval(), train_set[:2].to(device), recipe.seed)
    if int(train_set.labels.max()) >= classes:
        raise ValueError(
            f"expected a network for the {int(train_set.labels.max()) + 1} classes of {recipe.dataset}, but "
            f"{recipe.name} has {classes}"
        )


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Scores (N, K) of a model in evaluation mode, on the CPU."""
    device = next(model.parameters()).device
    rows = torch.arange(len(images), device=device)
    return answers(model.eval(), images.to(device), rows, torch.zeros_like(rows)).cpu()


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # batch norm, biases, noise: no weight decay
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.SGD, train_set: data.Images, recipe: Recipe, epoch: int
) -> float:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch + 1)
    order = torch.randperm(len(train_set), generator=generator)
    batches = len(order) // recipe.batch
    total = 0.0
    model.train()
    for i in range(batches):
        rows = order[i * recipe.batch : (i + 1) * recipe.batch]
        progress = epoch + i / batches
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(progress, recipe.epochs)
        images = augment(train_set.images[rows], recipe.shift, recipe.flip, generator)
        batch = data.Images(images, train_set.labels[rows], train_set.ids[rows]).to(device)
        with rng.rows(recipe.seed, batch.ids, torch.full_like(batch.ids, epoch * batches + i)):
            loss = recipe.objective.loss(model, batch, epoch, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item()
    return total / batches


def _schedule(epoch: float, epochs: int) -> float:
    """Share of the peak learning rate: up in the first epoch, then half a cosine down."""
    if epochs > 1 and epoch < 1:
        return epoch
    return 0.5 * (1 + math.cos(math.pi * (epoch - 1) / max(epochs - 1, 1))) if epochs > 1 else 1 - epoch


def augment(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image shifted by -shift..shift pixels in both directions and mirrored with probability 1/2."""
    n, _, h, w = images.shape
    padded = F.pad(images, (shift, shift, shift, shift))
    top, left = torch.randint(0, 2 * shift + 1, (2, n), generator=generator)
    rows = top[:, None] + torch.arange(h)
    columns = left[:, None] + torch.arange(w)
    if flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    batch = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Copies, as a layer that is used in several places is there several times."""
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}


def _save_resume(
    path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.SGD, log: list[dict[str, float]]
) -> None:
    tensors = {f"model.{k}": v for k, v in _state(model).items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors[f"momentum.{i}"] = state["momentum_buffer"].contiguous()
    meta = {"recipe": recipe.model_dump_json(), "log": json.dumps(log)}
    with files.replacing(path) as temporary:
        save_file(tensors, temporary, metadata=meta)


def _restore(path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.SGD) -> list[dict[str, float]]:
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        tensors = load_file(path)
        theirs, log = json.loads(meta["recipe"]), list(json.loads(meta["log"]))
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to start the training anew") from None
    ours = json.loads(recipe.model_dump_json())
    if any(theirs.get(name) != value for name, value in ours.items() if name not in ("notes", "about")):
        raise ValueError(f"{path} belongs to another recipe; remove it or choose another output folder")
    try:
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    except RuntimeError:
        raise ValueError(f"{path} is of another network; remove it to start the training anew") from None
    state = optimizer.state_dict()
    momenta = {int(k[9:]): {"momentum_buffer": v} for k, v in tensors.items() if k.startswith("momentum.")}
    optimizer.load_state_dict({**state, "state": momenta})
    return log


def _finish(
    model: nn.Module,
    test_set: data.Images,
    recipe: Recipe,
    folder: str | Path,
    out: Path,
    resume: Path,
    log: list[dict[str, float]],
) -> dict[str, object]:
    scores = predict(model, test_set.images)
    probs = metrics.probabilities(scores, "logits")  # for log-probabilities it is the same
    correct = int((scores.argmax(1) == test_set.labels).sum())
    card = {
        "name": recipe.name,
        "recipe": recipe.model_dump(),
        "test_images": len(test_set),
        "test_accuracy": correct / len(test_set),
        "test_ece": round(metrics.ece(probs, test_set.labels), 5),
        "pgd20_accuracy": _pgd20(model, recipe.dataset, folder),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "log": log,
    }
    with files.replacing(out / f"{recipe.name}.safetensors") as temporary:
        save_file(_state(model), temporary)
    files.write_text(out / f"{recipe.name}.json", json.dumps(card, indent=1) + "\n")
    resume.unlink(missing_ok=True)
    return card


def _pgd20(model: nn.Module, dataset: str, folder: str | Path) -> dict[str, float]:
    """Accuracy under 20 steps of PGD on the first 1,000 images that plans attack, by norm and radius."""
    device = next(model.parameters()).device
    images = data.load(dataset, "attack", folder)[:1000].to(device)
    found = {}
    for norm, eps in PGD[dataset]:
        task = Task.create(images.images, images.labels, images.ids, norm=norm, eps=eps)
        found[f"{norm} {Fraction(eps).limit_denominator(255)}"] = robust_accuracy(model, task)
    return found
