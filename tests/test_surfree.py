"""SurFree move by move: its directions, its two sides, its arcs, its 8 bits, and the closed form."""

import math

import pytest
import torch

from helpers import Door, Linear, Played, away, images, labels_of, levels, nearest
from queryfoil.attacks import surfree
from queryfoil.attacks.boundary import dot
from queryfoil.attacks.hopskipjump import unit
from queryfoil.attacks.surfree import State, SurFree, orthogonal, rounded, zigzag
from queryfoil.oracle import quantize
from queryfoil.run import run
from queryfoil.task import Task, length


def grey(n=1, shape=(1, 8, 8), value=0.5):
    return Task.create(torch.full((n, *shape), value), torch.zeros(n, dtype=torch.int64), norm="l2", eps=1e-4)


def two_class_task(n=8, shape=(1, 8, 8)):
    """Images about 0.5 from the boundary of a linear model."""
    model = Linear(shape, classes=2)
    x = away(model, images(n, shape, low=120, high=136), 0.5)
    return model, Task.create(x, labels_of(model, x), norm="l2", eps=1e-4)


def state_of(attack, task, x, angle=30.0):
    ortho = min(attack.ortho, task.images[0].numel() // 2)
    basis = torch.zeros(len(x), 1 + ortho, *task.images.shape[1:])
    basis[:, 0] = unit(x - task.images)
    return State(x, torch.full((len(x),), angle, dtype=torch.float64), basis)


def random(n, shape=(1, 8, 8)):
    """Random unit directions."""
    return unit(torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def exact(monkeypatch):
    """Images as they are proposed, not rounded."""
    monkeypatch.setattr(surfree, "rounded", lambda x: x)


def test_frequencies_are_counted_along_diagonals():
    assert zigzag(2, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert zigzag(4, 2).tolist() == [[0, 1], [2, 4], [3, 5], [6, 7]]
    jpeg = [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33]  # the standard's first twenty
    assert zigzag(8, 8).flatten().argsort()[:20].tolist() == jpeg


def test_directions_weigh_the_images_own_low_frequencies():
    x = images(2, (3, 6, 5))
    weights = SurFree(low=0.4).weights(x)
    kept = zigzag(6, 5) < 12
    assert int((weights != 0).flatten(2).sum(2).unique()) == 12
    assert bool((weights[:, :, ~kept] == 0).all())
    mean = x.double().mean((2, 3)) * math.sqrt(30)  # the cosine of frequency zero
    torch.testing.assert_close(weights[:, :, 0, 0], mean.tanh())
    assert float(weights.abs().max()) < 1


def test_directions_are_unit_and_orthogonal_to_the_last_ones_and_to_the_boundary():
    task = Task.create(images(3, (1, 8, 8)), torch.zeros(3, dtype=torch.int64), norm="l2", eps=1e-4)
    attack = SurFree(ortho=5)
    door = Door(task, lambda x: length(x - task.images) > 0.5)  # some circles fool
    state = state_of(attack, task, rounded(task.images + 2 * random(3)))
    first = state.basis[:, 0]
    drawn = []
    for t in range(12):
        towards = unit(state.x - task.images)
        drawn.append(attack.direction(task, state, towards, t))
        state = attack.step(task, door, state, t)
        assert float(dot(drawn[-1], towards).abs().max()) < 1e-4
        last = [first, *drawn[-5:]]
        inner = torch.stack([torch.stack([dot(a, b) for a in last]) for b in last])
        torch.testing.assert_close(inner, torch.eye(len(last))[:, :, None].expand_as(inner), rtol=1e-4, atol=1e-4)
    assert float(length(state.x - task.images).max()) < 1.5
    assert float(dot(drawn[0], drawn[-1]).abs().max()) > 1e-3  # forgotten by then


def test_a_direction_is_orthogonal_to_the_way_to_the_boundary_also_when_that_is_in_no_basis():
    task, attack = grey(3, value=0.4), SurFree()
    state = state_of(attack, task, task.images + 0.1)
    towards = random(3)
    assert float(dot(attack.direction(task, state, towards, 0), towards).abs().max()) < 1e-5


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_even_image_gets_directions_of_noise(value):
    task, attack = grey(4, value=value), SurFree()
    state = state_of(attack, task, (task.images + torch.linspace(-0.2, 0.3, 64).view(1, 1, 8, 8)).clamp(0, 1))
    state.basis[:, 1] = unit(without_mean(state.basis[:, 0]))  # so that frequency zero is taken
    direction = attack.direction(task, state, state.basis[:, 0], 1)
    torch.testing.assert_close(length(direction), torch.ones(4))
    assert float(direction.abs().max()) < 0.6
    assert len(direction.flatten(1).unique(dim=0)) == 4


def without_mean(first):
    """The constant direction without its part along `first`."""
    even = torch.full_like(first, 1 / 8)
    return even - dot(even, first)[:, None, None, None] * first


def test_where_both_sides_fail_the_angle_falls_for_two_queries():
    task, attack = grey(3), SurFree(rho=0.9)
    x = rounded(task.images + random(3))
    state = state_of(attack, task, x)
    door = Door(task, lambda y: length(y - task.images) > 0.95)
    after = attack.step(task, door, state, 0)
    assert torch.equal(after.x, x)
    assert after.angle.tolist() == [27.0] * 3
    (plus, _), (minus, _) = door.asked
    towards, across = unit(x - task.images), after.basis[:, 1]
    for y, side in ((plus, 1), (minus, -1)):
        # a circle of diameter 1 through the image and x, turned by 30 degrees seen from the image
        assert dot(y - task.images, towards).tolist() == pytest.approx([0.75] * 3, abs=0.01)
        assert dot(y - task.images, across).tolist() == pytest.approx([side * math.sqrt(3) / 4] * 3, abs=0.01)


def test_the_side_that_fools_is_followed():
    task, attack = grey(40), SurFree()
    x = task.images + 0.1
    state = state_of(attack, task, x)
    across = attack.direction(task, state, unit(x - task.images), 0)
    sides = torch.where(torch.arange(40) < 20, 1, -1)
    door = Door(task, lambda y: sides * dot(y - task.images, across) > 0)
    after = attack.step(task, door, state, 0)
    assert door.asked[1][1].tolist() == [False] * 20 + [True] * 20
    assert bool((sides * dot(after.x - task.images, across) > 0).all())
    assert bool((length(after.x - task.images) < 0.2 * length(x - task.images)).all())
    torch.testing.assert_close(after.angle, torch.full((40,), 30 / 0.95, dtype=torch.float64))


@pytest.mark.usefixtures("exact")
def test_an_arc_is_followed_in_equal_steps_and_then_halved():
    task, attack = grey(), SurFree()
    x = task.images + 0.1
    ends = math.cos(math.radians(47))
    door = Door(task, lambda y: length(y - task.images) >= ends * length(x - task.images))
    after = attack.step(task, door, state_of(attack, task, x, angle=10.0), 0)
    asked = [float(length(y - task.images) / length(x - task.images)) for y, _ in door.asked]
    angles = [round(math.degrees(math.acos(share)), 3) for share in asked]
    assert angles == [10, 20, 30, 40, 50, 45, 47.5, 46.25, 46.875]  # cos 46.875 - cos 47.5 < 0.01
    assert float(length(after.x - task.images) / length(x - task.images)) >= ends


@pytest.mark.usefixtures("exact")
def test_an_arc_that_never_ends_is_followed_up_to_the_image():
    task, attack = grey(), SurFree(angle=40.0)
    x = task.images + 0.1
    door = Door(task, lambda y: torch.tensor([True]))
    after = attack.step(task, door, state_of(attack, task, x, angle=40.0), 0)
    asked = [float(length(y - task.images) / length(x - task.images)) for y, _ in door.asked]
    angles = [math.degrees(math.acos(share)) for share in asked]
    assert angles[:2] == pytest.approx([40, 80], abs=1e-3)
    assert max(angles) < 90
    assert len(angles) <= 2 + 7
    late = attack.step(task, door, after._replace(angle=torch.tensor([88.9], dtype=torch.float64)), 1)
    assert late.angle.tolist() == [89]


def test_what_is_asked_and_kept_are_8_bit_images():
    model, task = two_class_task()
    played = Played(SurFree(low=1.0), model, task, steps=20)
    for state in played.states:
        levels(state.x)
        assert bool((labels_of(model, quantize(state.x)) != task.labels).all())
    assert torch.equal(rounded(torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 1.2])) * 255, torch.tensor([0.0, 0, 1, 255]))


def test_the_start_is_noise_that_fools_bisected_seven_times_and_counted():
    model, task = two_class_task()
    played = Played(SurFree(), model, task, steps=0)
    trials = [count - 7 for count in played.counts(0)]
    assert 1 == min(trials) <= max(trials) < 40
    first = played.sent[0] - task.images
    assert 0.3 < float(first.std()) < 0.5  # a normal of 0.5, clipped
    result = run(SurFree(), Linear(lead=1000), grey(8), 33)
    assert result.queries.tolist() == [33] * 8


def test_iterates_never_go_back_and_come_near_the_closed_form():
    model, task = two_class_task()
    states = Played(SurFree(low=1.0), model, task, steps=150).states
    near = torch.stack([length(state.x - task.images) for state in states]) / nearest(model, task.images, "l2")
    assert bool((near.diff(dim=0) <= 0).all())
    assert float(near[0].median()) > 1.5
    assert 0.8 < float(near[-1].min()) <= float(near[-1].max()) < 1.3


@pytest.mark.parametrize(
    ("towards", "left"),
    [([1.0, 0, 0, 0], [0, 0, 3, 4]), ([0.6, 0, 0.8, 0], [0, 0, 0, 4]), ([0, 0.8, 0, 0.6], [0, 0, 3, 0])],
)
def test_a_basis_and_what_it_has_not_of_a_direction_are_taken_out(towards, left):
    basis = torch.eye(4, dtype=torch.float64)[None, :2]
    u, towards = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2), torch.tensor(towards).view(1, 1, 2, 2)
    assert orthogonal(u, basis, towards).flatten().tolist() == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"angle": 90}, r"expected angle in \(0, 90\), in degrees, but got 90"),
        ({"rho": 1}, r"expected rho in \(0, 1\), but got 1"),
        ({"ortho": 0}, "expected ortho as a whole number >= 1, but got 0"),
        ({"low": 0}, r"expected low in \(0, 1\], but got 0"),
        ({"low": math.nan}, r"expected low in \(0, 1\], but got nan"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        SurFree(**chosen)
