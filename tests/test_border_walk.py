"""The walk along borders: its bisections, its levels, and what it passes that a greedy search cannot."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from helpers import Linear, Plateau, Played, away, images, labels_of
from queryfoil.attacks import build, settings
from queryfoil.attacks.border_walk import BorderWalk
from queryfoil.attacks.square import Square
from queryfoil.defenses import DEFENSES
from queryfoil.metrics import NEVER
from queryfoil.oracle import quantize
from queryfoil.run import run
from queryfoil.task import Task

LEVEL = 1 / 255
SHAPE = (1, 8, 8)


class Stairs(nn.Module):
    """A model's own answer, with a margin rounded up to a multiple of `step`."""

    def __init__(self, model: nn.Module, step: float) -> None:
        super().__init__()
        self.model, self.step = model, step
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = self.model(x)
        best = z.topk(2, 1)
        stair = ((best.values[:, :1] - best.values[:, 1:]) / self.step).ceil() * self.step
        return torch.zeros_like(z).scatter(1, best.indices[:, :1], stair)


class Far(nn.Module):
    """Two classes, by the largest change of a grey image, in levels: margins 3, 2, 1, -1 from `borders` on."""

    def __init__(self, *borders: int) -> None:
        super().__init__()
        self.borders = torch.tensor(borders)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        change = (x * 255 - 128).round().abs().amax((1, 2, 3))
        place = (self.borders <= change[:, None]).sum(1)
        margin = torch.tensor([3.0, 2.0, 1.0, -1.0])[place]
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def grey(eps):
    return Task.create(torch.full((1, 1, 4, 4), 128 / 255), torch.zeros(1, dtype=torch.int64), eps=eps * LEVEL)


def task_of(model, n=16, levels=12, far=0.5):
    x = quantize(away(model, images(n, SHAPE, low=100, high=156), far))
    return Task.create(x, labels_of(model, x), eps=levels * LEVEL, seed=3)


ONE = BorderWalk(starts=1, tolerance=0.5 / 255)


def test_it_finds_the_border_on_the_first_ray_and_takes_the_level_of_the_edge():
    played = Played(ONE, Far(3, 9, 100), grey(16), steps=0)
    state = played.states[0]
    assert float(state.goal) == 1.0  # which the edge of the ball shows
    # in half levels, floored to bytes: minus signs are at 9 levels from 8.5 on, plus signs from 9
    assert int(state.radius) == 17
    assert len(played.sent) == 1 + 5  # the edge, and 32 radii bisected


def test_without_a_lower_level_in_the_ball_it_looks_from_the_corner_of_the_cube():
    played = Played(ONE, Far(40, 60, 200), grey(16), steps=1)
    first, second = played.states
    assert int(first.radius) == 511
    assert float(first.goal) < 3
    assert float((played.of(1)[1][0] * 255 - 128).abs().max()) >= 127
    assert int(second.radius) == 79  # the first of its levels, whichever it is


def test_it_begins_with_the_best_of_several_rays():
    model = Linear(SHAPE, classes=2)
    task = task_of(model, n=32, far=0.3, levels=8)
    labels = Stairs(model, 100.0)
    one, eight = (Played(BorderWalk(starts=n), labels, task, steps=0).states[0].radius.double() for n in (1, 8))
    assert bool((eight <= one).all())
    assert float(eight.mean()) < 0.9 * float(one.clamp_max(255).mean())


def test_the_level_falls_as_the_edge_of_the_ball_shows_lower_ones_and_radii_only_shrink_at_a_level():
    model = Linear(SHAPE, classes=2)
    task = task_of(model, far=1.0, levels=16)
    played = Played(BorderWalk(p_init=0.3), Stairs(model, 2.0), task, steps=60)
    falls = 0
    for before, after in itertools.pairwise(played.states):
        assert bool((after.goal <= before.goal).all())
        same = after.goal == before.goal
        assert bool((after.radius <= before.radius)[same].all())
        falls += int((~same).sum())
    assert falls > len(task.ids) / 2


def test_what_it_holds_shows_the_level_that_it_says_and_two_radii_nearer_it_does_not():
    model = Stairs(Linear(SHAPE, classes=2), 2.0)
    task = task_of(model.model, far=1.0)
    attack = BorderWalk(p_init=0.3)
    for state in Played(attack, model, task, steps=30).states:
        found = state.radius <= 255
        assert bool(found.any())
        shown, before = (
            task.objective(model(quantize(attack._at(task, state.signs, radius))))
            for radius in (state.radius, (state.radius - 2).clamp_min(0))  # one is lost where two levels fall at once
        )
        assert bool((shown <= state.goal)[found].all())
        assert bool((before > state.goal)[found].all())


def test_it_walks_on_where_a_turn_gains_nothing():
    model = Stairs(Linear(SHAPE, classes=2), 2.0)
    states = Played(BorderWalk(p_init=0.3), model, task_of(model.model, far=1.0), steps=30).states
    gained_nothing = [
        (after.goal == before.goal) & (after.radius == before.radius) & (after.signs != before.signs).flatten(1).any(1)
        for before, after in itertools.pairwise(states)
    ]
    assert any(bool(rows.any()) for rows in gained_nothing)


def test_it_fools_by_labels_where_greedy_search_stands_still():
    model = Linear(SHAPE, classes=2)
    task = task_of(model, n=16, far=0.3, levels=20)
    labels = Stairs(model, 100.0)  # one step: only the label shows
    walk, greedy = (run(kind(p_init=0.3, horizon=300), labels, task, 600) for kind in (BorderWalk, Square))
    assert walk.accuracy() < 0.5 * greedy.accuracy()


def test_by_labels_it_is_the_same_behind_every_defense_that_keeps_them():
    model = Linear(SHAPE, classes=2)
    task = task_of(model, n=6, far=0.3, levels=24)
    blind = build("border_walk", reading="label", horizon=300)
    assert settings(blind)["reading"] == "label"
    reached = [
        run(blind, defended, task, 250).fooled_at
        for defended in (model, DEFENSES["dld"](model, tau=1.0), DEFENSES["label_only"](model))
    ]
    reached.append(run(BorderWalk(horizon=300), DEFENSES["label_only"](model), task, 250).fooled_at)
    assert all(torch.equal(reached[0], other) for other in reached[1:])
    assert bool((reached[0] < NEVER).any())


def test_on_a_plateau_it_asks_for_corners_alone_and_holds_nothing():
    played = Played(ONE, Plateau(), grey(16), steps=10)
    assert played.counts(1) == [1]
    assert bool((played.states[-1].radius == 511).all())
    assert all(bool(((x == 0) | (x == 1)).all()) for x in played.sent[1:])


def test_a_tolerance_beyond_the_ball_is_refused_before_a_query():
    with pytest.raises(ValueError, match=r"expected a tolerance of at most eps, 0\.0039"):
        run(BorderWalk(tolerance=0.1), Plateau(), grey(1), 10)
    with pytest.raises(ValueError, match="expected tolerance in"):
        BorderWalk(tolerance=0)
