"""Reverse sigmoid against its formula, number by number."""

import math

import pytest
import torch
from torch import nn

from helpers import Declared
from queryfoil import losses
from queryfoil.defenses.reverse_sigmoid import ReverseSigmoid, reversed_sigmoid
from queryfoil.oracle import answers


def by_loop(row, beta, gamma):
    new = []
    for p in row:
        p = min(max(p, 1e-9), 1 - 1e-9)
        r = beta * (1 / (1 + math.exp(-gamma * math.log(p / (1 - p)))) - 0.5)
        new.append(min(max(p - r, 0.0), 1.0))
    return [value / sum(new) for value in new]


def rows(classes, scale, n=200):
    z = scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z.softmax(1)


def test_known_probabilities():
    p = torch.tensor([0.99, 0.999, 1e-6, 0.1, 0.5, 0.0, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.877, 0.833, 0.299, 0.155, 0.5, 0.388, 0.612], dtype=torch.float64)
    torch.testing.assert_close(reversed_sigmoid(p, 1.0, 0.1), expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.1), (0.3, 1.0), (5.0, 0.5)])
def test_rows_are_those_of_a_loop(beta, gamma):
    probs = rows(10, 3.0)
    shown = ReverseSigmoid(Declared(nn.Identity(), "logits"), beta=beta, gamma=gamma, keep_label=False)
    shown.output = "probs"
    expected = torch.tensor([by_loop(row, beta, gamma) for row in probs.tolist()], dtype=torch.float64)
    torch.testing.assert_close(shown(probs), expected, atol=1e-9, rtol=0)


def test_many_classes_lose_their_label_in_the_original_and_keep_it_by_default():
    z = rows(1000, 2.0).log()
    original, kept = ReverseSigmoid(nn.Identity(), keep_label=False), ReverseSigmoid(nn.Identity())
    flipped = original(z).argmax(1) != z.argmax(1)
    assert float(flipped.double().mean()) > 0.7
    assert torch.equal(kept(z).argmax(1), z.argmax(1))
    assert (original.keeps_label, kept.keeps_label) == (False, True)
    # two classes change places, all else stays
    torch.testing.assert_close(kept(z).sort(1).values, original(z).sort(1).values, atol=3e-5, rtol=0)
    assert int((kept(z)[~flipped] - original(z)[~flipped]).abs().gt(1e-4).sum()) == 0
    assert int((kept(z)[flipped] - original(z)[flipped]).abs().gt(1e-4).sum(1).max()) == 2


@pytest.mark.parametrize("output", ["logits", "log_probs", "probs"])
def test_the_kept_label_is_a_clear_answer_to_an_oracle(output):
    z = torch.cat([rows(10, 0.01), rows(10, 1.0), rows(10, 5.0), rows(10, 40.0), torch.full((1, 10), 0.1).double()])
    z = z.clamp_min(1e-30).log()
    scores = answers(
        ReverseSigmoid(Declared(nn.Flatten(), output)),
        z.float().view(-1, 1, 1, 10),
        torch.arange(len(z)),
        torch.ones(len(z)).long(),
    )
    assert bool((losses.margin(scores, z.float().argmax(1)) > 0).all())
