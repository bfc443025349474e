"""SimBA move by move: its basis, its order, its second direction."""

import math

import pytest
import torch

from helpers import Linear, Plateau, Played, images, labels_of
from queryfoil.attacks.simba import SimBA, cosines
from queryfoil.task import Task, length

SHAPE = (2, 6, 9)


def task_of(x, labels=None, **other):
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    return Task.create(x, labels, **{"eps": 1.0, "norm": "l2", "seed": 3, **other})


def test_the_cosines_are_orthonormal_and_agree_with_their_definition():
    for size in (1, 5, 28):
        waves = cosines(size, size)
        torch.testing.assert_close(waves @ waves.T, torch.eye(size, dtype=torch.float64))
    waves = cosines(8, 3)
    for u in range(3):
        scale = math.sqrt((1 if u == 0 else 2) / 8)
        expected = [scale * math.cos(math.pi * (2 * i + 1) * u / 16) for i in range(8)]
        torch.testing.assert_close(waves[u], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_on_a_plateau_each_coordinate_is_tried_down_and_then_up_once_in_a_round(basis):
    x = images(3, SHAPE, low=100, high=150)
    attack = SimBA(step_size=0.05, basis=basis, frequencies=4)
    size = 2 * 4 * 4 if basis == "dct" else 2 * 6 * 9
    task = task_of(x)
    played = Played(attack, Plateau(), task, 2 * size)
    tried = torch.stack([attack._stepped(task, state) for state in played.states[:-1]], 1)  # (N, 2 size, ...)
    down, up = tried[:, ::2].flatten(2), tried[:, 1::2].flatten(2)
    assert torch.equal(down, -up)
    for image in up:
        gram = (image @ image.T) / 0.05**2
        torch.testing.assert_close(gram, torch.eye(size), atol=1e-4, rtol=0)  # a basis, none twice
    assert not torch.equal(up[0], up[1])  # an order of its own for each image
    assert played.states[-1].place.tolist() == [size] * 3
    again = Played(attack, Plateau(), task, 2 * size + 1).states[-1]
    assert again.place.tolist() == [size] * 3
    assert not torch.equal(attack._stepped(task, again), tried[:, 0])  # and a new one in the next round


def test_low_frequencies_alone_are_used():
    x = images(4, SHAPE, low=100, high=150)
    task = task_of(x)
    attack = SimBA(step_size=0.05, frequencies=2)
    for state in Played(attack, Plateau(), task, 16).states:
        spectrum = cosines(6, 6).float() @ attack._stepped(task, state) @ cosines(9, 9).float().T
        assert float(spectrum[:, :, 2:].abs().max()) < 1e-6
        assert float(spectrum[:, :, :, 2:].abs().max()) < 1e-6


def test_the_other_direction_is_asked_only_where_the_first_failed():
    x = images(20)
    model = Linear()
    task = task_of(x, labels_of(model, x), eps=0.3)
    attack = SimBA(basis="pixel", step_size=0.1)
    played = Played(attack, model, task, 60, budget=1000)
    seen = set()
    for before, after in zip(played.states, played.states[1:], strict=False):
        accepted = after.loss < before.loss
        assert torch.equal(after.second, ~(accepted | before.second))
        assert torch.equal(after.place - before.place, (accepted | before.second).long())
        moved = (after.delta != before.delta).flatten(1).any(1)
        assert torch.equal(moved, accepted)
        seen |= set(zip(accepted.tolist(), before.second.tolist(), strict=True))
    assert len(seen) == 4  # either direction was accepted, and refused


def test_the_sum_of_steps_is_not_projected_but_what_is_asked_is():
    x = images(10, low=100, high=150)
    model = Linear(lead=100)
    for norm, eps in (("linf", 4 / 255), ("l2", 0.2)):
        played = Played(SimBA(basis="pixel"), model, task_of(x, norm=norm, eps=eps), 60)
        delta = played.states[-1].delta
        size = delta.abs().flatten(1).amax(1) if norm == "linf" else length(delta)
        assert bool((size > eps + 0.1).all())
        assert bool(played.oracle.task.contains(played.oracle.task.project(x + delta)).all())
    assert int((played.sent[-1] * 255 - x * 255).abs().max()) <= 0.2 * 255 + 1


def test_its_own_loss_is_the_probability():
    assert SimBA.loss == "probability"


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"step_size": 0.0}, "expected step_size > 0"),
        ({"step_size": float("nan")}, "expected step_size > 0"),
        ({"frequencies": 0}, "expected frequencies as a whole number >= 1, but got 0"),
        ({"basis": "pixels"}, "unknown basis 'pixels': expected one of dct, pixel; did you mean 'pixel'"),
    ],
)
def test_hyper_parameters_that_make_no_sense_raise(hyper, message):
    with pytest.raises(ValueError, match=message):
        SimBA(**hyper)
