"""What attacks along the boundary share, by hand: starts, circles, bisections, smooth directions."""

import math

import pytest
import torch

from helpers import Door
from queryfoil.attacks.boundary import dot, first_that_fools, narrow, on_circle, smooth, without
from queryfoil.attacks.hopskipjump import unit
from queryfoil.attacks.simba import cosines
from queryfoil.task import Task, length


def black(n, shape=(1, 4, 4)):
    return Task.create(torch.zeros(n, *shape), torch.zeros(n, dtype=torch.int64), norm="l2", eps=1e-4)


def random(n, shape=(1, 4, 4), seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def test_a_start_is_each_images_first_proposal_that_fools():
    task = black(3)
    wanted = torch.tensor([0, 3, 1])
    door = Door(task, lambda x: (x[:, 0, 0, 0] * 10).round() >= wanted)
    x, found = first_that_fools(task, door, lambda trial: torch.full_like(task.images, trial / 10))
    assert found.tolist() == [True] * 3
    assert x[:, 0, 0, 0].tolist() == pytest.approx([0, 0.3, 0.1])
    assert [rows.tolist() for _, rows in door.asked] == [[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 1, 0]]


def test_a_start_is_sought_no_longer_than_a_row_is_live():
    task = black(2)
    door = Door(task, lambda x: torch.tensor([False, True]))

    def propose(trial):
        door.live[0] = trial < 4  # whose budget ends
        return torch.full_like(task.images, 0.5)

    x, found = first_that_fools(task, door, propose)
    assert found.tolist() == [False, True]
    assert float(x[0].max()) == 0
    assert len(door.asked) == 5


def test_a_gap_is_halved_row_by_row_until_it_is_narrow_enough():
    task = black(4)
    cuts = torch.tensor([0.3, 0.3, 0.71, 0.3], dtype=torch.float64)
    least = torch.tensor([0.25, 0.01, 0.01, 0.01], dtype=torch.float64)
    door = Door(task, lambda x: x[:, 0, 0, 0] >= cuts)
    where = torch.tensor([True, True, True, False])
    ones = torch.ones(4, dtype=torch.float64)
    found = narrow(
        task,
        door,
        where,
        ones,
        0 * ones,
        lambda share: share[:, None, None, None].expand_as(task.images),
        lambda fools, does_not: (fools - does_not) / least,
    )
    assert found.tolist() == [0.5, 0.3046875, 0.7109375, 1]
    assert torch.stack([rows for _, rows in door.asked]).sum(0).tolist() == [2, 7, 7, 0]


def test_a_gap_is_halved_for_so_many_rounds_at_most():
    task, ones = black(1), torch.ones(1, dtype=torch.float64)
    door = Door(task, lambda x: x[:, 0, 0, 0] >= 0)
    at = lambda share: share[:, None, None, None].expand_as(task.images)  # noqa: E731
    assert narrow(task, door, door.live, ones, 0 * ones, at, lambda a, b: (a - b) / 1e-9, 3).tolist() == [0.125]
    assert len(door.asked) == 3


def test_a_circle_leads_from_the_point_to_the_image_and_is_nearer_by_the_cosine():
    task = Task.create(torch.full((6, 1, 4, 4), 0.5), torch.zeros(6, dtype=torch.int64), norm="l2", eps=1.0)
    one = unit(random(6))
    other = unit(without(random(6, seed=1), one))
    angle = torch.tensor([0.0, 90.0, 60.0, -60.0, 45.0, 30.0], dtype=torch.float64)
    radius = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 4.0])
    change = on_circle(task, radius, one, other, angle) - task.images
    torch.testing.assert_close(length(change), radius * torch.deg2rad(angle).cos().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(change[0], one[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dot(change, one), radius * torch.deg2rad(angle).cos().float() ** 2, rtol=1e-4, atol=1e-6)
    across = [0, 0, math.sqrt(3) / 2, -math.sqrt(3) / 2, 1.5, math.sqrt(3)]
    assert dot(change, other).tolist() == pytest.approx(across, abs=1e-5)


def test_parts_along_a_direction_are_taken_out():
    u = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    assert without(u, torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 4]
    assert dot(u, u).tolist() == [25]


def test_smooth_images_have_the_given_cosines_and_no_others():
    low = random(2, (3, 2, 3))
    x = smooth(low, 6, 5)
    assert x.shape == (2, 3, 6, 5)
    assert x.dtype == torch.float32
    back = cosines(6, 6).float() @ x @ cosines(5, 5).float().T
    torch.testing.assert_close(back[:, :, :2, :3], low, rtol=1e-4, atol=1e-5)
    back[:, :, :2, :3] = 0
    assert float(back.abs().max()) < 1e-5
    assert torch.allclose(length(x), length(low))
