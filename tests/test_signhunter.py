"""SignHunter: which parts it flips, what it keeps, and a small case by hand."""

import pytest
import torch
from torch import nn

from helpers import Linear, Plateau, Played, images, labels_of, levels
from queryfoil.attacks.signhunter import SignHunter, parts
from queryfoil.task import Task


@pytest.mark.parametrize(("size", "counts"), {3072: [3583, 6655], 784: [432, 824, 1608], 5: [3, 6, 11], 1: [1]}.items())
def test_the_parts_of_a_level_cover_all_signs_once(size, counts):
    """Number of flips until levels are finished; for 3,072: `3583 to finish level 11, 6655 to finish level 12`."""
    found, flips, covered = [], 0, 0
    while (part := parts(size, flips)) is not None:
        assert part.start == covered
        covered = part.stop if part.stop < size else 0
        flips += 1
        if not covered:
            found.append(flips)
    assert found[-len(counts) :] == counts
    assert found[0] == 1  # first, all of them
    assert [parts(size, t) for t in range(flips + 1, 2 * flips + 2)] == [parts(size, t) for t in range(flips + 1)]


class Signs(nn.Module):
    """Logits by hand: the lead of class 0 falls by 1 for each value of the secret sign, and rises by 1 for others."""

    def __init__(self, secret, clean):
        super().__init__()
        self.secret, self.clean = secret, clean
        self.eval()

    def forward(self, x):
        change = ((x - self.clean[:1]) * 255).round().flatten(1).sign()
        lead = 100 - (change * self.secret).sum(1)
        return torch.stack([lead, torch.zeros_like(lead)], 1)


def test_four_signs_by_hand():
    x = images(2, (1, 2, 2), low=128, high=128)
    model = Signs(torch.tensor([1.0, -1.0, -1.0, 1.0]), x)
    task = Task.create(x, torch.zeros(2, dtype=torch.int64), eps=8 / 255)
    played = Played(SignHunter(), model, task, 8)
    signs = [state.signs[0].int().tolist() for state in played.states]
    assert signs == [
        [1, 1, 1, 1],  # query 2
        [-1, -1, -1, -1],  # all: a tie keeps the flip
        [1, 1, -1, -1],  # each half: ties again
        [1, 1, 1, 1],
        [1, 1, 1, 1],  # single values: the first was right,
        [1, -1, 1, 1],  # the second was wrong,
        [1, -1, -1, 1],  # the third was wrong,
        [1, -1, -1, 1],  # the fourth was right
        [1, 1, 1, 1],  # and again from the corner that was found
    ]
    assert [int(model(sent)[0, 0]) for sent in played.sent] == [100, 100, 100, 100, 102, 98, 96, 98, 98]
    torch.testing.assert_close(played.states[-1].origin, x + 8 / 255 * torch.tensor([1.0, -1, -1, 1]).view(1, 1, 2, 2))
    assert played.states[-1].loss.tolist() == task.objective(model(played.sent[-1])).tolist()


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_the_second_flip_is_the_first_half_of_the_layout(layout):
    x = images(3, (3, 4, 5), low=100, high=150)
    task = Task.create(x, torch.zeros(3, dtype=torch.int64), eps=8 / 255)
    sent = Played(SignHunter(layout=layout), Plateau(), task, 2).sent
    flipped = levels(sent[2]) != levels(sent[1])
    expected = torch.zeros(3, 4, 5, dtype=torch.bool)
    if layout == "hwc":
        expected[:, :2] = True  # the upper half, all channels
    else:
        expected.view(-1)[:30] = True  # one and a half channels
    assert torch.equal(flipped, expected.expand(3, 3, 4, 5))


def test_a_flip_that_raises_the_loss_is_undone():
    x = images(30)
    model = Linear(lead=100)
    task = Task.create(x, torch.zeros(30, dtype=torch.int64), eps=8 / 255, loss="margin")
    played = Played(SignHunter(), model, task, 40)
    losses = torch.stack([state.loss for state in played.states])
    assert bool((losses.diff(dim=0) <= 0).all())
    assert bool((losses[-1] < losses[0]).all())


def test_the_corner_in_l2_has_the_length_of_the_radius():
    x = images(3, low=100, high=150)
    task = Task.create(x, labels_of(Linear(), x), norm="l2", eps=0.5)
    attack = SignHunter()
    corner = attack._corner(task, x, torch.ones(3, 64))
    torch.testing.assert_close(corner - x, torch.full_like(x, 0.5 / 8))


def test_an_unknown_layout_raises():
    with pytest.raises(ValueError, match="unknown layout 'nchw': expected one of chw, hwc; did you mean 'chw'"):
        SignHunter(layout="nchw")
