"""The attacker's losses against plain loops."""

import math

import pytest
import torch

from queryfoil.losses import LOSSES, cross_entropy, margin, probability_margin

N, K = 40, 6
GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(N, K, generator=GENERATOR).double() * 3
LABELS = torch.randint(0, K, (N,), generator=GENERATOR)
TARGETS = (LABELS + torch.randint(1, K, (N,), generator=GENERATOR)) % K


def softmax(row):
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def best_other(row, chosen):
    return max(z for k, z in enumerate(row) if k != chosen)


def plain_margin(row, label, target):
    return row[label] - best_other(row, label) if target is None else best_other(row, target) - row[target]


def plain_probability_margin(row, label, target):
    return plain_margin(softmax(row), label, target)


def plain_cross_entropy(row, label, target):
    p = softmax(row)
    return math.log(p[label]) if target is None else -math.log(p[target])


def plain_probability(row, label, target):
    p = softmax(row)
    return p[label] if target is None else -p[target]


PLAIN = {
    "margin": plain_margin,
    "probability_margin": plain_probability_margin,
    "cross_entropy": plain_cross_entropy,
    "probability": plain_probability,
}


@pytest.mark.parametrize("targets", [None, TARGETS], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_agrees_with_a_plain_loop(name, targets):
    goals = [None] * N if targets is None else targets.tolist()
    expected = [PLAIN[name](*row) for row in zip(SCORES.tolist(), LABELS.tolist(), goals, strict=True)]
    found = LOSSES[name](SCORES, LABELS, targets)
    assert found.shape == (N,)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("loss", [margin, probability_margin])
def test_a_margin_is_negative_exactly_where_the_goal_is_reached(loss):
    answers = SCORES.argmax(1)
    assert torch.equal(loss(SCORES, LABELS) < 0, answers != LABELS)
    assert torch.equal(loss(SCORES, LABELS, TARGETS) < 0, answers == TARGETS)
    assert 0 < int((answers == TARGETS).sum()) < N  # both cases occur


@pytest.mark.parametrize("loss", [margin, probability_margin])
def test_a_tie_for_the_top_gives_exactly_zero(loss):
    tied = torch.tensor([[2.0, 1.0, 2.0]])
    assert float(loss(tied, torch.tensor([0]))) == 0
    assert float(loss(tied, torch.tensor([2]))) == 0
    assert float(loss(tied, torch.tensor([0]), torch.tensor([2]))) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_falls_as_the_attack_gets_on(name):
    near, far = torch.tensor([[2.0, 1.5, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
    label, target = torch.tensor([0]), torch.tensor([1])
    assert LOSSES[name](near, label) < LOSSES[name](far, label)
    assert LOSSES[name](near, label, target) < LOSSES[name](far, label, target)


def test_a_constant_on_all_logits_changes_no_loss():
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(SCORES + 7, LABELS, TARGETS), loss(SCORES, LABELS, TARGETS))


def test_cross_entropy_of_huge_logits_is_finite():
    huge = torch.tensor([[1e4, 0.0]])
    assert float(cross_entropy(huge, torch.tensor([1]))) == -1e4
    assert float(cross_entropy(huge, torch.tensor([0]), torch.tensor([1]))) == 1e4
