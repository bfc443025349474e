"""The networks that ship."""

import json
import shutil

import pytest
import torch

from helpers import images
from queryfoil import data, models
from queryfoil.models import zoo
from queryfoil.oracle import answers
from queryfoil.task import Task
from queryfoil.train.pgd import robust_accuracy

every_model = pytest.mark.parametrize("name", models.MODELS)


@every_model
def test_a_loaded_network_is_in_evaluation_mode_and_needs_no_gradient(name):
    model = models.load(name)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(images(2, (1, 28, 28))).requires_grad


@every_model
def test_the_weights_are_small_and_the_card_belongs_to_them(name):
    assert (zoo.SHIPPED / f"{name}.safetensors").stat().st_size < 1_500_000
    card = zoo.card(name)
    assert card["name"] == name
    assert card["parameters"] == sum(parameter.numel() for parameter in models.load(name).parameters())


@every_model
def test_the_network_is_as_accurate_as_its_card_says(name):
    card = zoo.card(name)
    some = data.load(card["recipe"]["dataset"], "attack")
    assert card["test_accuracy"] >= (0.9 if card["recipe"]["objective"]["method"] == "standard" else 0.8)
    scores = answers(models.load(name), some.images, some.ids, torch.ones_like(some.ids))
    right = scores.argmax(1) == some.labels
    assert abs(float(right.double().mean()) - card["test_accuracy"]) < 0.03


@pytest.mark.parametrize(
    "name", ["fashion-resnet-at", "fashion-wrn-pssilu", "fashion-wrn-hat", "fashion-resnext-denoise"]
)
def test_adversarial_training_makes_robust(name):
    """By their cards, at least 30 points above the undefended network under PGD; and asked again, on some images."""
    undefended = name.rsplit("-", 1)[0]
    ball = "linf 16/255"
    robust, bare = (zoo.card(n)["pgd20_accuracy"][ball] for n in (name, undefended))
    assert robust >= bare + 0.3
    some = data.load("fashion-mnist", "attack")[:100]
    task = Task.create(some.images, some.labels, some.ids, eps=16 / 255)
    assert robust_accuracy(models.load(name), task) == pytest.approx(robust, abs=0.15)


def test_training_in_l2_makes_robust_in_l2():
    robust, bare = (zoo.card(n)["pgd20_accuracy"]["l2 3/2"] for n in ("fashion-resnet-l2", "fashion-resnet"))
    assert robust >= bare + 0.3


def test_loading_twice_gives_the_same_network(network):
    x = images(2, (1, 28, 28))
    assert torch.equal(models.load("fashion-resnet")(x), network(x))


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    models.load("fashion-resnet")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_read_from_a_folder(tmp_path, network):
    shutil.copy(zoo.SHIPPED / "fashion-resnet.safetensors", tmp_path)
    (tmp_path / "fashion-resnet.json").write_text(json.dumps({"name": "mine"}))
    x = images(2, (1, 28, 28))
    assert torch.equal(models.load("fashion-resnet", folder=tmp_path)(x), network(x))
    assert zoo.card("fashion-resnet", tmp_path) == {"name": "mine"}


def test_missing_weights_raise_and_say_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the weights of fashion-resnet at .*queryfoil train"):
        models.load("fashion-resnet", folder=tmp_path)


def test_an_unknown_network_raises_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown model 'fashion-resnt': .*did you mean 'fashion-resnet'"):
        models.load("fashion-resnt")


@pytest.mark.parametrize("name", ["fashion-resnet", "fashion-wrn", "fashion-resnext-denoise", "fashion-trs"])
def test_the_answers_have_the_same_bits_in_any_batch(name: str) -> None:
    model, x = models.load(name), data.load("fashion-mnist", "attack")[:40].images
    with torch.no_grad():
        whole = model(x)
        for size in (1, 2, 3, 5, 7, 11, 13):
            assert torch.equal(torch.cat([model(part) for part in x.split(size)]), whole), size


@pytest.mark.parametrize("name", ["fashion-pni", "fashion-trs", "fashion-thermometer"])
def test_defenses_that_are_networks_declare_what_they_are_and_keep_rows_apart(name: str) -> None:
    model, images = models.load(name), data.load("fashion-mnist", "attack")[:9]
    assert (model.deterministic, model.keeps_label, model.rowwise) == (name != "fashion-pni", False, True)
    x, ids, query = images.images, images.ids, torch.full_like(images.ids, 3)
    whole = answers(model, x, ids, query)
    order = torch.tensor([4, 8, 0, 1, 7, 2, 6, 5, 3])
    assert torch.equal(answers(model, x[order], ids[order], query), whole[order])
    assert torch.equal(answers(model, x[:1], ids[:1], query[:1]), whole[:1])
