"""CGBA move by move: its probes, its half circle, its tolerance, and the closed form."""

import math

import pytest
import torch

from helpers import Door, Linear, Played, away, images, labels_of, nearest
from queryfoil.attacks.boundary import dot, smooth
from queryfoil.attacks.cgba import CGBA, State
from queryfoil.attacks.hopskipjump import unit
from queryfoil.attacks.simba import cosines
from queryfoil.oracle import quantize
from queryfoil.run import run
from queryfoil.task import Task, length


def grey(n=1, shape=(1, 8, 8)):
    return Task.create(torch.full((n, *shape), 0.5), torch.zeros(n, dtype=torch.int64), norm="l2", eps=1e-4)


def two_class_task(n=8, shape=(1, 8, 8)):
    """Images about 0.5 from the boundary of a linear model."""
    model = Linear(shape, classes=2)
    x = away(model, images(n, shape, low=120, high=136), 0.5)
    return model, Task.create(x, labels_of(model, x), norm="l2", eps=1e-4)


def random(n, shape=(1, 8, 8), seed=0):
    return unit(torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)))


class Knowing(CGBA):
    """Told the normal instead of having to estimate it."""

    told: torch.Tensor

    def normal(self, task, query, x, t):
        return self.told


def knowing(normal, **hyper):
    attack = Knowing(**hyper)
    object.__setattr__(attack, "told", normal)
    return attack


def angles_asked(door, task, radius):
    """Angles of a half circle, from the distances asked."""
    return [math.degrees(math.acos(float(length(y - task.images)[0]) / radius)) for y, _ in door.asked]


def test_the_number_of_probes_grows_with_the_root_of_the_iteration():
    assert [CGBA().count(t) for t in range(5)] == [30, 42, 51, 60, 67]
    assert CGBA(probes=7).count(8) == 21


@pytest.mark.parametrize(("reduction", "kept"), [(1, (12, 9)), (2.5, (5, 4)), (3, (4, 3)), (100, (1, 1))])
def test_probes_have_low_frequencies_only_and_the_size_of_a_level(reduction, kept):
    task = grey(4, (3, 12, 9))
    door = Door(task, lambda y: torch.zeros(4))
    attack = CGBA(probes=40, reduction=reduction, sigma=0.01)
    attack.normal(task, door, task.images, 0)
    assert len(door.asked) == 40
    probes = torch.stack([y - task.images for y, _ in door.asked]).double()
    spectrum = cosines(12, 12) @ probes @ cosines(9, 9).T
    inside = torch.zeros(12, 9, dtype=torch.bool)
    inside[: kept[0], : kept[1]] = True
    assert float(spectrum[..., ~inside].abs().max() if not inside.all() else 0) < 1e-5
    assert float((probes**2).mean().sqrt()) == pytest.approx(0.01, rel=0.1)
    assert len(probes.flatten(2).flatten(0, 1).unique(dim=0)) == 160  # no draw twice


@pytest.mark.parametrize("side", [1, -1])
def test_the_estimate_points_along_a_smooth_normal_into_the_wrong_class(side):
    task = grey(6)
    normal = unit(smooth(torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)), 8, 8))
    door = Door(task, lambda y: side * dot(y - task.images, normal.expand_as(y)) > 0)
    found = CGBA(probes=300).normal(task, door, task.images, 0)
    assert float((side * dot(found, normal.expand_as(found))).min()) > 0.9
    torch.testing.assert_close(length(found), torch.ones(6))


@pytest.mark.parametrize(("degrees", "first"), [(30, [45]), (50, [45, 67.5]), (80, [45, 67.5, 78.75, 84.375])])
def test_the_half_circle_meets_a_flat_boundary_at_its_nearest_point(degrees, first):
    """A plane whose normal is so many degrees from the way to x is met that far along the circle."""
    task, turn = grey(), math.radians(degrees)
    towards = random(1)
    across = unit(random(1, seed=1) - dot(random(1, seed=1), towards)[:, None, None, None] * towards)
    normal = math.cos(turn) * towards + math.sin(turn) * across
    x = task.images + towards
    door = Door(task, lambda y: dot(y - task.images, normal) >= math.cos(turn))
    after = knowing(normal, tolerance=0.002).step(task, door, State(x), 0)
    assert angles_asked(door, task, 1)[: len(first)] == pytest.approx(first, abs=0.01)
    near = float(length(after.x - task.images))
    assert near == pytest.approx(math.cos(turn), abs=0.002)
    assert float(dot(after.x - task.images, normal)) >= math.cos(turn) - 1e-6
    assert float(dot((after.x - task.images) / near, normal)) > 0.999


@pytest.mark.parametrize("radius", [0.5, 2.0])
@pytest.mark.parametrize("tolerance", [0.01, 0.001])
def test_a_bisection_ends_at_the_tolerance_as_a_length(radius, tolerance):
    task = grey()
    x = task.images + radius * random(1)
    share = math.cos(math.radians(20))
    door = Door(task, lambda y: length(y - task.images) >= share * radius)
    knowing(random(1, seed=1), tolerance=tolerance).step(task, door, State(x), 0)
    first = radius * math.sin(math.radians(45))  # the chord from 0 to 45 degrees
    assert abs(len(door.asked) - 1 - math.log2(first / tolerance)) < 1.2


def test_where_no_angle_fools_the_image_stays():
    task = grey()
    x = task.images + random(1)
    door = Door(task, lambda y: torch.tensor([False]))
    after = knowing(random(1, seed=1)).step(task, door, State(x), 0)
    assert torch.equal(after.x, x)
    assert 9 < len(door.asked) < 13


def test_where_every_angle_fools_the_search_ends_beside_the_image():
    task = grey()
    x = task.images + random(1)
    door = Door(task, lambda y: torch.tensor([True]))
    after = knowing(random(1, seed=1)).step(task, door, State(x), 0)
    assert angles_asked(door, task, 1)[:10] == pytest.approx([90 * (1 - 2.0**-k) for k in range(1, 11)], abs=0.05)
    assert float(length(after.x - task.images)) < 0.002


def test_the_start_is_noise_bisected_to_the_tolerance():
    model, task = two_class_task()
    played = Played(CGBA(tolerance=0.01), model, task, steps=0)
    far = length(played.sent[0] - task.images)
    for i, count in enumerate(played.counts(0)):
        assert math.ceil(math.log2(float(far[i]) / 0.01)) + 1 <= count < 25
    x = played.states[0].x
    assert bool((labels_of(model, quantize(x)) != task.labels).all())
    result = run(CGBA(), Linear(lead=1000), grey(8), 33)
    assert result.queries.tolist() == [33] * 8


def test_every_iterate_fools_never_goes_back_and_comes_near_the_closed_form():
    model, task = two_class_task()
    states = Played(CGBA(reduction=1), model, task, steps=12).states
    near = torch.stack([length(state.x - task.images) for state in states]) / nearest(model, task.images, "l2")
    for state in states:
        assert bool((labels_of(model, quantize(state.x)) != task.labels).all())
    assert bool((near.diff(dim=0) <= 1e-5).all())
    assert float(near[0].median()) > 1.5
    assert 0.8 < float(near[-1].min()) <= float(near[-1].max()) < 1.2


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"probes": 0}, "expected probes as a whole number >= 1, but got 0"),
        ({"reduction": 0.5}, "expected reduction finite and >= 1, but got 0.5"),
        ({"sigma": 0}, "expected sigma > 0 and finite, but got 0"),
        ({"tolerance": math.inf}, "expected tolerance > 0 and finite, but got inf"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        CGBA(**chosen)
