"""Training: PGD, the objectives, and a loop that a kill does not change."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import images
from queryfoil import data, models
from queryfoil.data import Images
from queryfoil.defenses.ensemble import Ensemble
from queryfoil.models import checkpoints, zoo
from queryfoil.models.checkpoints import PUBLISHED
from queryfoil.models.resnet import ResNet
from queryfoil.task import Task
from queryfoil.train import loop, recipe
from queryfoil.train.objectives import TRS, Adversarial, Helper, Standard
from queryfoil.train.pgd import pgd, robust_accuracy
from test_data import folder_with, idx


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Plane(nn.Module):
    """Two classes, parted by a plane: class 1 where w x > b."""

    def __init__(self, w, b=0.0):
        super().__init__()
        self.w, self.b = nn.Parameter(w), b
        self.eval()

    def forward(self, x):
        side = x.flatten(1) @ self.w - self.b
        return torch.stack([-side, side], 1)


def near_the_middle(n=40, seed=0):
    return images(n, (1, 4, 4), low=110, high=145, seed=seed)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_finds_the_worst_image_of_a_linear_model(norm):
    w = torch.randn(16, generator=generator(1))
    x, eps = near_the_middle(), 0.2 if norm == "l2" else 8 / 255
    task = Task.create(x, torch.ones(len(x), dtype=torch.int64), norm=norm, eps=eps, loss="cross_entropy")
    found = pgd(Plane(w), task, 60, eps / 4, generator())
    worst = x.flatten(1) - eps * (w.sign() if norm == "linf" else w / w.norm())
    torch.testing.assert_close(found.flatten(1), worst, atol=1e-3, rtol=0)
    assert bool(task.contains(found).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_without_a_step_is_a_random_point_of_the_ball(norm):
    x = near_the_middle(200)
    task = Task.create(x, torch.zeros(len(x), dtype=torch.int64), norm=norm, eps=8 / 255)
    start = pgd(Plane(torch.ones(16)), task, 0, 1.0, generator()) - x
    size = start.abs().flatten(1).amax(1) if norm == "linf" else start.flatten(1).norm(dim=1)
    assert 0.4 < float(size.mean()) / task.eps <= 1
    assert float(size.max()) <= task.eps + 1e-6
    assert abs(float(start.mean())) < 0.1 * float(start.std())


def test_pgd_leaves_mode_and_gradients_alone():
    model = ResNet(widths=(4, 8)).train()
    model.bn.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    task = Task.create(images(3, (1, 28, 28)), torch.tensor([0, 1, 2]), eps=8 / 255)
    pgd(model, task, 2, 0.01, generator())
    assert model.training
    assert not model.bn.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_robust_accuracy_of_a_linear_model_is_the_share_with_a_large_enough_margin():
    w = torch.randn(16, generator=generator(3))
    x = near_the_middle(100)
    side = x.flatten(1) @ w
    model, eps = Plane(w, float(side.median())), 4 / 255
    labels = (side > side.median()).long()
    labels[:10] = 1 - labels[:10]  # wrong from the start
    expected = ((side - side.median()).abs() > eps * w.abs().sum())[10:].sum() / 100
    task = Task.create(x, labels, eps=eps)
    assert robust_accuracy(model, task) == pytest.approx(float(expected))
    assert 0.2 < float(expected) < 0.85


def batch(n=6, seed=0):
    return Images(images(n, (1, 28, 28), seed=seed), torch.arange(n) % 10, torch.arange(n))


def small(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(widths=(4, 8))


LINF = {"norm": "linf", "eps": "8/255", "steps": 2, "step_size": "4/255"}


def test_adversarial_training_mixes_clean_and_adversarial_images_as_told():
    def loss(epoch=5, **settings):
        return Adversarial(**LINF, **settings).loss(small(), batch(), epoch, generator())

    model = small().train()
    clean = F.cross_entropy(model(batch().images), batch().labels)
    adversarial = loss()
    assert adversarial > clean
    torch.testing.assert_close(loss(clean_epochs=6), clean)
    torch.testing.assert_close(loss(clean_share=0.25), 0.25 * clean + 0.75 * adversarial)


def test_helper_images_lie_twice_as_far_and_have_the_label_of_the_teacher(monkeypatch):
    model, teacher = small().train(), small(1).eval()
    monkeypatch.setattr(zoo, "cached", lambda name, device: teacher)
    settings = {**LINF, "beta": 2.0, "gamma": 0.5, "teacher": "fashion-resnet"}
    total = Helper(**settings).loss(model, batch(), 0, generator())
    some, clean = batch(), small().eval()(batch().images).log_softmax(1).detach()

    def away(scores):
        return (clean.exp() * (clean - scores.log_softmax(1))).sum()

    task = Task.create(some.images, some.labels, eps=8 / 255)
    x = pgd(small(), task, 2, 4 / 255, generator(), away)
    plain, moved, twice = (small().train()(v) for v in (some.images, x, (2 * x - some.images).clamp(0, 1)))
    p, q = plain.softmax(1), moved.softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = F.cross_entropy(plain, some.labels) + 2 * divergence
    expected = expected + 0.5 * F.cross_entropy(twice, teacher(x).argmax(1))
    torch.testing.assert_close(total, expected)


def test_trs_adds_the_cosines_and_lengths_of_the_members_gradients():
    members = [small(seed).eval() for seed in range(3)]
    some = batch()
    total = TRS(coeff=2.0, smoothness=3.0, scale=5.0).loss(Ensemble(members), some, 0, generator())
    gradients, loss = [], 0.0
    for member in members:
        x = some.images.clone().requires_grad_()
        one = F.cross_entropy(member(x), some.labels)
        loss += one.item()
        gradients.append(torch.autograd.grad(one, x)[0].flatten(1).double())
    cosines = [
        abs(float(gradients[i][row] @ gradients[j][row] / gradients[i][row].norm() / gradients[j][row].norm()))
        for i, j in ((0, 1), (0, 2), (1, 2))
        for row in range(len(some))
    ]
    lengths = [2 * float(gradient[row] @ gradient[row]) for gradient in gradients for row in range(len(some))]
    expected = loss + 5 * (2 * np.mean(cosines) + 3 * np.mean(lengths))
    assert float(total.detach()) == pytest.approx(expected, rel=1e-4)


def test_trs_needs_an_ensemble():
    with pytest.raises(ValueError, match=r"expected an ensemble of at least 2 members"):
        TRS().loss(small(), batch(), 0, generator())


@pytest.fixture
def few_images(tmp_path, monkeypatch):
    """A folder with 64 training and 32 test images, and a small network under the name of the shipped one."""
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 64), ("t10k", 32)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        folder_with(tmp_path, idx(pixels), idx(rng.integers(0, 10, n, dtype=np.uint8)), prefix)
    monkeypatch.setitem(zoo.MODELS, "fashion-resnet", lambda: ResNet(widths=(4, 8)))
    monkeypatch.setitem(loop.NETWORKS, "fashion-resnet", lambda: ResNet(widths=(4, 8)))
    monkeypatch.setitem(loop.PGD, "fashion-mnist", (("linf", 8 / 255),))
    return tmp_path


def quick(**changes):
    settings = recipe.read("fashion-resnet").model_dump() | {"epochs": 3, "batch": 16} | changes
    return recipe.Recipe(**settings)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("objective", [{"method": "standard"}, {"method": "adversarial", **LINF, "clean_epochs": 1}])
def test_a_killed_training_ends_with_the_same_weights(few_images, tmp_path, objective, same_random_states):
    def kill(epoch):
        if epoch.epoch == 2:
            raise KilledError

    chosen = quick(objective=objective)
    whole = loop.train(chosen, few_images, tmp_path / "whole")
    with pytest.raises(KilledError):
        loop.train(chosen, few_images, tmp_path / "killed", report=kill)
    epochs = []
    card = loop.train(chosen, few_images, tmp_path / "killed", report=epochs.append)
    assert [epoch.epoch for epoch in epochs] == [3]
    assert card == whole
    one, other = (models.load("fashion-resnet", folder=tmp_path / f).state_dict() for f in ("whole", "killed"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "fashion-resnet.json",
        "fashion-resnet.safetensors",
    ]
    assert set(json.loads((tmp_path / "killed" / "fashion-resnet.json").read_text())) >= {"recipe", "pgd20_accuracy"}


def test_another_recipe_does_not_continue_a_training(few_images, tmp_path):
    def kill(epoch):
        raise KilledError

    with pytest.raises(KilledError):
        loop.train(quick(), few_images, tmp_path / "out", report=kill)
    with pytest.raises(ValueError, match=r"belongs to another recipe"):
        loop.train(quick(lr=0.2), few_images, tmp_path / "out")


def test_weight_decay_is_on_the_weights_of_convolutions_and_the_linear_layer_alone():
    model = ResNet(widths=(4, 8))
    decayed, others = loop._optimizer(model, quick()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    assert {names[id(p)].split(".")[-1] for p in others["params"]} == {"weight", "bias"}
    assert all(p.ndim == 1 for p in others["params"])
    assert others["weight_decay"] == 0 < decayed["weight_decay"]
    assert len(decayed["params"]) + len(others["params"]) == len(names)


RECIPES = sorted(p.stem for p in recipe.SHIPPED.glob("*.toml"))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_shipped_recipe_is_that_of_the_shipped_network(name):
    chosen = recipe.read(name)
    assert chosen.name == name
    assert zoo.card(name)["recipe"] == chosen.model_dump(mode="json")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_a_network_and_a_data_set(name):
    chosen = recipe.read(name)
    assert chosen.name in loop.NETWORKS
    assert chosen.dataset in data.DATASETS


def test_a_network_without_a_place_in_the_zoo_is_trained_and_loaded_by_its_file(few_images, tmp_path, monkeypatch):
    def small_ensemble():
        return Ensemble(ResNet(widths=(4, 8)) for _ in range(3))

    monkeypatch.setitem(loop.NETWORKS, "TRS", small_ensemble)
    monkeypatch.setitem(PUBLISHED, "TRS", PUBLISHED["TRS"]._replace(build=small_ensemble))
    card = loop.train(quick(name="TRS", epochs=1, objective={"method": "trs"}), few_images, tmp_path / "out")
    some = data.load("fashion-mnist", "test", few_images)
    loaded = checkpoints.load("TRS", tmp_path / "out/TRS.safetensors")
    right = float((loop.predict(loaded, some.images).argmax(1) == some.labels).double().mean())
    assert right == card["test_accuracy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr =", "is not valid TOML"),
        ('name = "fashion-resnet"', r"dataset: Field required"),
    ],
)
def test_a_bad_recipe_raises_and_says_where(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.read(str(tmp_path / "bad.toml"))


def test_a_standard_objective_is_the_cross_entropy():
    model = small().eval()
    expected = F.cross_entropy(model(batch().images), batch().labels)
    torch.testing.assert_close(Standard().loss(model, batch(), 0, generator()), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 5000}, "expected batch <= .*, the number of training images, but got 5000"),
        ({"lr": float("inf")}, r"lr\n  Input should be a finite number"),
        ({"objective": {"method": "trs"}}, "expected an ensemble of at least 2 members for the method trs"),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_first_epoch(few_images, tmp_path, changed, message):
    epochs = []
    with pytest.raises(ValueError, match=message):
        loop.train(quick(**changed), few_images, tmp_path / "out", report=epochs.append)
    assert not epochs


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"channels": 3}, "expected a model that answers such images, but the model raised RuntimeError"),
        ({"classes": 4}, "expected a network for the 10 classes of fashion-mnist, but fashion-resnet has 4"),
    ],
)
def test_a_network_for_other_images_is_refused_before_the_first_epoch(
    few_images, tmp_path, monkeypatch, network, message
):
    monkeypatch.setitem(loop.NETWORKS, "fashion-resnet", lambda: ResNet(widths=(4, 8), **network))
    with pytest.raises(ValueError, match=message):
        loop.train(quick(), few_images, tmp_path / "out")


def test_the_accuracy_of_a_noisy_network_under_pgd_is_a_function_of_the_seed():
    images = data.load("fashion-mnist", "attack")[:40]
    task = Task.create(images.images, images.labels, images.ids, eps=16 / 255)
    found = {robust_accuracy(models.load("fashion-pni"), task, steps=3) for _ in range(3)}
    assert len(found) == 1
