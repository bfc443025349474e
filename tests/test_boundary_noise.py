"""Boundary defense: who gets noise, and how much."""

import pytest
import torch
from torch import nn

from helpers import Declared
from queryfoil import rng
from queryfoil.defenses.boundary import BoundaryNoise


def shown(model, z):
    with rng.rows(0, torch.arange(len(z)), torch.ones(len(z)).long()):
        return model(z)


def logits(n):
    return torch.randn(n, 10, generator=torch.Generator().manual_seed(0))


def test_only_unsure_answers_get_noise_of_the_given_strength():
    z = logits(4000)
    scores = shown(BoundaryNoise(nn.Identity(), theta=0.3, std=0.2), z)
    unsure = z.softmax(1).amax(1) < 0.3
    assert 1000 < int(unsure.sum()) < 3000
    assert torch.equal(scores[~unsure], z[~unsure])
    noise = (scores - z)[unsure]
    assert float(noise.std()) == pytest.approx(0.2, rel=0.03)
    assert abs(float(noise.mean())) < 0.01
    assert bool((noise != 0).all(1).float().mean() > 0.99)


def test_the_confidence_is_the_one_before_the_noise():
    z = torch.zeros(2000, 10)
    z[:, 0] = torch.tensor([2.0, 1.2]).repeat(1000)  # confidences of 0.45 and 0.27; noise of 3 would mix them
    scores = shown(BoundaryNoise(nn.Identity(), std=3.0), z)
    assert torch.equal(scores[::2], z[::2])
    assert bool((scores[1::2] != z[1::2]).any(1).all())


def test_labels_of_unsure_images_flip():
    z = torch.zeros(2000, 10)
    z[:, 3] = 0.05
    model = BoundaryNoise(nn.Identity())
    flipped = shown(model, z).argmax(1) != 3
    assert 0.5 < float(flipped.double().mean()) < 0.9
    assert not model.keeps_label


@pytest.mark.parametrize("output", ["log_probs", "probs"])
def test_probabilities_get_it_on_their_logarithm(output):
    z = logits(200)
    expected = shown(BoundaryNoise(nn.Identity(), std=0.5), z).softmax(1)
    given = shown(BoundaryNoise(Declared(nn.Identity(), output), std=0.5), z)
    torch.testing.assert_close(given.exp() if output == "log_probs" else given, expected)
