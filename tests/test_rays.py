"""RayS move by move: its blocks, its corners, its bisections in levels, and the closed form."""

import math

import pytest
import torch
from torch import nn

from helpers import Door, Linear, Plateau, Played, away, images, labels_of, nearest
from queryfoil.attacks.hopskipjump import distance
from queryfoil.attacks.rays import RayS, block
from queryfoil.oracle import quantize
from queryfoil.run import run
from queryfoil.task import Task

LEVEL = 1 / 255


def grey(n=1, shape=(1, 4, 4)):
    return Task.create(torch.full((n, *shape), 128 / 255), torch.zeros(n, dtype=torch.int64), eps=LEVEL)


def two_class_task(n=8, shape=(1, 8, 8), eps=LEVEL):
    """Images about 0.5 from the boundary of a linear model in L2, some 19 levels in L-inf."""
    model = Linear(shape, classes=2)
    x = away(model, images(n, shape, low=120, high=136), 0.5)
    return model, Task.create(x, labels_of(model, x), eps=eps)


def test_blocks_are_all_then_halves_then_quarters_and_at_last_values_again_and_again():
    cut = [(0, 6), (0, 3), (3, 6), (0, 2), (2, 4), (4, 6), *((i, i + 1) for i in range(6)), (0, 1)]
    assert [block(t, 6) for t in range(13)] == cut
    assert [block(t, 5) for t in range(7)] == [(0, 5), (0, 3), (3, 5), (0, 2), (2, 4), (4, 5), (0, 1)]
    assert block(7, 1) == (0, 1)
    sides = [end - start for start, end in (block(t, 3072) for t in range(2**12))]
    assert sides[:4] == [3072, 1536, 1536, 768]
    assert sides[-1] == 1


def test_until_something_fools_it_asks_for_corners_of_the_cube():
    played = Played(RayS(), Plateau(), grey(2, (1, 2, 2)), steps=4)
    first, second = ([x[i].flatten().tolist() for x in played.sent] for i in (0, 1))
    assert first == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],
        [1, 1, 0, 0],
        [0, 1, 1, 1],
    ]  # the order of blocks, one turned at a time
    assert first == second


@pytest.mark.parametrize(("tolerance", "queries"), [(0.5 / 255, 9), (1 / 255, 8), (0.3, 2), (1.0, 0)])
def test_a_radius_is_bisected_down_to_the_tolerance(tolerance, queries):
    task = grey(1)
    door = Door(task, lambda x: (x - task.images).abs().amax((1, 2, 3)) > 0.1)
    attack = RayS(tolerance)
    state = attack.step(task, door, attack.init(task, door), 0)
    assert len(door.asked) == 1 + queries
    assert bool((state.signs == -1).all())
    assert (int(state.radius) - 1) * tolerance <= 0.1 < int(state.radius) * tolerance


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 32, 32)])
def test_radii_are_of_single_values_whatever_the_size_of_the_image(shape):
    task = grey(1, shape)
    door = Door(task, lambda x: (x - task.images).abs().amax((1, 2, 3)) > 20.25 / 255)
    attack = RayS()
    assert attack.step(task, door, attack.init(task, door), 0).radius.tolist() == [41]  # 20.5 levels


def test_a_block_that_is_no_better_costs_one_query_and_is_turned_back():
    task = grey()
    door = Door(task, lambda x: (x - task.images).abs().amax((1, 2, 3)) > 20.25 / 255)  # no ray is better than another
    attack = RayS()
    state = attack.step(task, door, attack.init(task, door), 0)
    door.asked.clear()
    after = attack.step(task, door, state, 1)
    assert torch.equal(after.signs, state.signs)
    assert torch.equal(after.radius, state.radius)
    ((x, _),) = door.asked
    change = ((x - task.images) * 255).flatten()
    assert change.tolist() == pytest.approx(
        [20] * 8 + [-20] * 8, abs=1e-3
    )  # half a level nearer, the first half turned


def test_rays_that_fool_here_and_there_are_no_trouble():
    class Rings(nn.Module):
        """Fooled where the first value is odd."""

        def forward(self, x):
            odd = (x[:, 0, 0, 0] * 255).round() % 2
            return torch.stack([1 - odd, odd], 1)

    result = run(RayS(), Rings().eval(), Task.create(torch.full((1, 1, 4, 4), 128 / 255), torch.tensor([0])), 60)
    assert 1 < int(result.fooled_at) <= 60


def test_every_radius_fools_as_the_model_sees_it_and_the_one_below_does_not():
    model, task = two_class_task()
    attack = RayS()
    for state in Played(attack, model, task, steps=40).states[1:]:
        found = state.radius <= 510
        assert bool(found.any())
        for radius, fools in ((state.radius, True), (state.radius - 1, False)):
            x = (task.images + radius[:, None, None, None] / 510 * state.signs).clamp(0, 1)
            assert bool(((labels_of(model, quantize(x)) != task.labels) == fools)[found].all())


def test_it_finds_the_signs_and_the_radius_of_a_linear_model():
    model, task = two_class_task()
    state = Played(RayS(), model, task, steps=127 + 64).states[-1]
    weight = (model.weight[0] - model.weight[1]).detach().view(1, 1, 8, 8)
    best = weight.sign() * torch.where(task.labels == 0, -1, 1).view(-1, 1, 1, 1)
    heavy = weight.abs() > 4  # a lighter value moves the radius by less than half a level
    assert bool((state.signs == best)[heavy.expand_as(best)].all())
    radius, least = state.radius / 510, nearest(model, task.images, "linf")
    assert bool((radius > least - LEVEL).all())
    assert bool((radius < 1.15 * least + LEVEL).all())


def test_successes_lie_in_the_ball_though_radii_are_half_levels():
    model, task = two_class_task(eps=24 * LEVEL)
    result = run(RayS(), model, task, 400)
    assert bool((result.fooled_at < 400).all())
    assert float(distance(task, result.adversarial).max()) <= 24 * LEVEL + 1e-6


@pytest.mark.parametrize("tolerance", [0, -0.1, 1.5, math.nan, "0.1", True])
def test_a_tolerance_that_makes_no_sense_is_refused(tolerance):
    with pytest.raises(ValueError, match=r"expected tolerance in \(0, 1\], but got"):
        RayS(tolerance)


def test_targets_are_refused():
    model, task = two_class_task()
    aimed = Task.create(task.images, task.labels, targets=1 - task.labels)
    with pytest.raises(ValueError, match="RayS is untargeted"):
        run(RayS(), model, aimed, 10)
