"""Sign-OPT as an attack: its start from several directions, and that the rest is the iteration of `signopt`."""

import math

import pytest
import torch
from torch import nn

from helpers import Linear, Played, away, images, labels_of, nearest
from queryfoil.attacks.sign_opt import SignOPT
from queryfoil.attacks.signopt import SignOpt
from queryfoil.oracle import LabelOracle, Oracle, quantize
from queryfoil.run import run
from queryfoil.task import Task, length

BISECTION = 14  # queries, to a ten-thousandth


def two_class_task(n=8, shape=(1, 8, 8)):
    """Images about 0.5 from the boundary of a linear model."""
    model = Linear(shape, classes=2)
    x = away(model, images(n, shape, low=120, high=136), 0.5)
    return model, Task.create(x, labels_of(model, x), norm="l2", eps=1e-4)


def test_of_several_directions_the_nearest_to_fool_is_the_start():
    model, task = two_class_task()
    starts = [Played(SignOPT(starts=k), model, task, steps=0) for k in (1, 5, 20)]
    near = torch.stack([length(played.states[0].x - task.images) for played in starts])
    assert bool((near.diff(dim=0) <= 0).all())
    assert float((near[2] / near[0]).median()) < 0.9
    for played in starts:
        assert bool((labels_of(model, quantize(played.states[0].x)) != task.labels).all())


def test_a_direction_that_is_no_nearer_costs_one_query():
    model, task = two_class_task()
    played = Played(SignOPT(starts=20), model, task, steps=0)
    bisected = [(count - 20) / BISECTION for count in played.counts(0)]
    assert all(times == int(times) for times in bisected)
    assert 1 <= min(bisected) <= max(bisected) < 10


def test_directions_are_tried_until_one_fools():
    class Picky(nn.Module):
        """Fooled where the first value is 1."""

        def forward(self, x):
            fooled = (x[:, 0, 0, 0] == 1).float()
            return torch.stack([1 - fooled, fooled], 1)

    x = torch.full((20, 1, 4, 4), 51 / 255)  # a normal draw of 0.8 or more fools: every fifth
    task = Task.create(x, torch.zeros(20, dtype=torch.int64), norm="l2", eps=1e-4)
    trials = [count - BISECTION for count in Played(SignOPT(starts=1), Picky().eval(), task, steps=0).counts(0)]
    assert min(trials) == 1
    assert 2.5 < sum(trials) / 20 < 8
    result = run(SignOPT(starts=3), Linear((1, 4, 4), lead=1000), task, 33)
    assert result.queries.tolist() == [33] * 20


def test_its_iteration_is_that_of_signopt():
    model, task = two_class_task()
    played = Played(SignOPT(turns=20, alpha=0.3, beta=0.01), model, task, steps=2)
    oracle = Oracle(model, task, 10**6)
    oracle(task.images)
    state = played.states[0]
    for t in range(2):
        found = SignOpt(20, 1 / 255).iterate(
            task, LabelOracle(oracle), state.x, state.alpha, state.beta, t, oracle.live
        )
        state = played.states[t + 1]
        assert all(torch.equal(one, other) for one, other in zip(state, found, strict=True))
    assert played.states[0].alpha.tolist() == pytest.approx([0.3] * 8)
    assert played.states[0].beta.tolist() == pytest.approx([0.01] * 8)


def test_every_iterate_fools_and_they_come_near_the_closed_form():
    model, task = two_class_task()
    states = Played(SignOPT(turns=50), model, task, steps=8).states
    for state in states:
        assert bool((labels_of(model, quantize(state.x)) != task.labels).all())
    near = torch.stack([length(state.x - task.images) for state in states]) / nearest(model, task.images, "l2")
    assert bool((near.diff(dim=0) <= 1e-6).all())
    assert float(near[0].min()) > 1.5
    assert 0.8 < float(near[-1].min()) <= float(near[-1].max()) < 1.3


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"starts": 0}, "expected starts as a whole number >= 1, but got 0"),
        ({"turns": 2.5}, "expected turns as a whole number >= 1, but got 2.5"),
        ({"alpha": 0}, "expected alpha > 0 and finite, but got 0"),
        ({"beta": -1}, "expected beta > 0 and finite, but got -1"),
        ({"grain": math.nan}, r"expected grain in \[0, 1\].*got nan"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        SignOPT(**chosen)
