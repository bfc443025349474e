"""1,000 classes and colour: AAA and attacks on a random network with margins like those of a real one."""

import pytest
import torch
from torch import Tensor, nn

import queryfoil as qf
from helpers import images, labels_of
from queryfoil.defenses.disguise import disguise

CLASSES = 1000
SCALE = 18.0
"""Makes the median margin 2.2, about that of networks on ImageNet."""


class RandomFeatures(nn.Module):
    """Colour images of 32 x 32: random filters, normalization, and a random linear layer for 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.filters = nn.Parameter(torch.randn(48, 3, 8, 8, generator=generator) / 8)
        self.weight = nn.Parameter(torch.randn(CLASSES, 48 * 16, generator=generator) / 48)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        features = nn.functional.conv2d(x - 0.5, self.filters, stride=8).relu().flatten(1)
        return SCALE * nn.functional.layer_norm(features, features.shape[1:]) @ self.weight.T


@pytest.fixture(scope="module")
def network() -> RandomFeatures:
    return RandomFeatures()


@pytest.fixture(scope="module")
def logits(network: RandomFeatures) -> Tensor:
    with torch.no_grad():
        return network(images(400, (3, 32, 32)))


def margins(scores: Tensor) -> Tensor:
    top = scores.topk(2).values
    return top[:, 0] - top[:, 1]


def test_the_network_is_like_a_real_one(logits: Tensor) -> None:
    assert 1.5 < float(margins(logits).median()) < 3
    assert len(logits.argmax(1).unique()) > 300


@pytest.mark.parametrize("curve", ["linear", "sine"])
@pytest.mark.parametrize("tau", [0.5, 1.1, 6.0])
def test_aaa_keeps_answers_of_1000_classes_and_hides_the_margin(logits: Tensor, curve: str, tau: float) -> None:
    shown = disguise(logits, curve=curve, tau=tau, temperature=1.3)
    assert shown.shape == logits.shape
    assert torch.isfinite(shown).all()
    assert torch.equal(shown.argmax(1), logits.argmax(1))
    assert float((margins(shown) - margins(logits)).abs().mean()) > 0.1 * tau
    inside = margins(logits) < tau  # in the first interval a larger true margin is shown as a smaller one
    if curve == "linear" and tau < 2:
        ranks = torch.stack([margins(logits)[inside], margins(shown)[inside]]).argsort(1).argsort(1).double()
        assert float(torch.corrcoef(ranks)[0, 1]) < -0.5


def test_rows_are_independent(logits: Tensor) -> None:
    whole = disguise(logits, tau=1.1)
    for rows in (slice(0, 1), slice(7, 9), slice(100, 357)):
        assert torch.equal(whole[rows], disguise(logits[rows], tau=1.1))


def test_a_fit_of_1000_classes_calibrates(logits: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (logits / 3).softmax(1).multinomial(1, generator=generator).squeeze(1)
    found = qf.fit(logits[:120], labels[:120], objective="greedy", tau=1.1)
    assert found.classes == CLASSES
    assert found.temperature > 1.5
    assert found.ece < found.ece_undefended


@pytest.mark.parametrize(("attack", "loss"), [("square", "margin"), ("signhunter", "cross_entropy"), ("simba", None)])
def test_attacks_run_through_and_aaa_does_not_help_them(network: RandomFeatures, attack: str, loss: str | None) -> None:
    x = images(12, (3, 32, 32), seed=1)
    y = labels_of(network, x)
    protected = qf.AAA(network, tau=1.1)
    found, behind = (
        qf.attack(model, x, y, attack, eps=8 / 255, budget=60, loss=loss) for model in (network, protected)
    )
    assert found.accuracy(1) == behind.accuracy(1) == 1
    for result in (found, behind):
        assert int(result.queries.max()) <= 60
        assert float((result.adversarial - x).abs().max()) <= 8 / 255 + 1e-6
    assert found.accuracy() <= behind.accuracy()
    assert found.accuracy() < 1
