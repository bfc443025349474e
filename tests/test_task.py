"""A task checks its input once, and knows its ball."""

import warnings

import pytest
import torch

from helpers import images
from queryfoil.oracle import quantize
from queryfoil.task import Task

pytestmark = pytest.mark.filterwarnings("ignore:the images are no multiples")

X = images(3)
Y = torch.tensor([0, 1, 2])


def spoiled(value):
    x = X.clone()
    x[1, 0, 2, 3] = value
    return x


BAD = {
    "bytes": ({"images": (X * 255).byte()}, r"expected images as a float32 tensor.*got torch.uint8 \(3, 1, 8, 8\)"),
    "float64": ({"images": X.double()}, r"expected images as a float32 tensor.*got torch.float64"),
    "float16": ({"images": X.half()}, r"expected images as a float32 tensor.*got torch.float16"),
    "three dimensions": ({"images": X[0], "labels": Y[:1]}, r"expected images.*\(N, C, H, W\).*got.*\(1, 8, 8\)"),
    "a list": ({"images": X.tolist()}, "expected images as a float32 tensor.*got list"),
    "no image": ({"images": X[:0], "labels": Y[:0]}, r"expected at least one image.*got.*\(0, 1, 8, 8\)"),
    "NaN": ({"images": spoiled(torch.nan)}, r"expected images in \[0, 1\].*got.*nan"),
    "infinite": ({"images": spoiled(torch.inf)}, r"expected images in \[0, 1\].*got.*inf"),
    "above 1": ({"images": spoiled(1.5)}, r"expected images in \[0, 1\].*got.*1\.5"),
    "below 0": ({"images": spoiled(-0.5)}, r"expected images in \[0, 1\].*got.*-0\.5"),
    "too few labels": ({"labels": Y[:2]}, r"expected labels as an integer tensor \(3,\).*got torch.int64 \(2,\)"),
    "labels (N, 1)": ({"labels": Y[:, None]}, r"expected labels.*\(3,\).*got.*\(3, 1\)"),
    "float labels": ({"labels": Y.float()}, "expected labels as an integer tensor.*got torch.float32"),
    "boolean labels": ({"labels": Y > 0}, "expected labels as an integer tensor.*got torch.bool"),
    "listed labels": ({"labels": Y.tolist()}, "expected labels as an integer tensor.*got list"),
    "negative label": ({"labels": Y - 1}, "expected labels >= 0.*got -1"),
    "repeated ids": ({"ids": torch.tensor([4, 5, 4])}, "expected each id once.*got 1 repeated"),
    "float ids": ({"ids": Y.float()}, "expected ids as an integer tensor.*got torch.float32"),
    "negative id": ({"ids": Y - 1}, "expected ids >= 0.*got -1"),
    "too few targets": ({"targets": Y[:2]}, r"expected targets.*\(3,\).*got.*\(2,\)"),
    "a target that is the label": ({"targets": torch.tensor([1, 1, 0])}, "expected targets other than the labels"),
    "eps 0": ({"eps": 0.0}, "expected eps > 0.*got 0"),
    "eps negative": ({"eps": -8 / 255}, "expected eps > 0.*got -0.03"),
    "eps NaN": ({"eps": float("nan")}, "expected eps > 0.*got nan"),
    "eps infinite": ({"eps": float("inf")}, "expected eps > 0.*got inf"),
    "unknown norm": ({"norm": "linff"}, "unknown norm 'linff': expected one of l2, linf; did you mean 'linf'"),
    "unknown loss": ({"loss": "margins"}, "unknown loss 'margins': expected one of .*; did you mean 'margin'"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_input_says_what_was_expected_and_what_came(changed, message):
    with pytest.raises(ValueError, match=message):
        Task.create(**{"images": X, "labels": Y, **changed})


@pytest.mark.parametrize("eps", [0.05, 0.031, 1e-3, 0.5 / 255])
def test_an_eps_that_is_no_multiple_of_a_level_gives_a_warning(eps):
    with pytest.warns(UserWarning, match=rf"no multiple of 1/255.*use {max(round(eps * 255), 1)}/255"):
        Task.create(X, Y, eps=eps)


def test_multiples_of_a_level_and_any_l2_radius_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for level in range(1, 256):
            Task.create(X, Y, eps=level / 255)
            Task.create(X, Y, eps=float(torch.tensor(level / 255)))  # rounded to float32
        Task.create(X, Y, norm="l2", eps=0.5)


def test_ids_default_to_positions_and_integers_become_int64():
    task = Task.create(X, Y.to(torch.uint8), targets=(Y + 1).to(torch.int32))
    assert task.ids.tolist() == [0, 1, 2]
    assert task.labels.dtype == task.ids.dtype == task.targets.dtype == torch.int64


def test_rows_are_the_same_task_on_some_images():
    task = Task.create(X, Y, ids=Y + 10, targets=Y + 1, norm="l2", eps=0.7, loss="cross_entropy", seed=5)
    some = task.rows(torch.tensor([2, 0]))
    assert torch.equal(some.images, X[[2, 0]])
    assert (some.labels.tolist(), some.ids.tolist(), some.targets.tolist()) == ([2, 0], [12, 10], [3, 1])
    assert (some.norm, some.eps, some.loss, some.seed) == ("l2", 0.7, "cross_entropy", 5)
    assert Task.create(X, Y).rows(torch.tensor([1])).targets is None


def test_margin_and_objective_follow_the_goal_and_the_loss():
    scores = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    assert Task.create(X, Y).margin(scores).tolist() == [2, -2, -3]
    assert Task.create(X, Y, targets=(Y + 1) % 3).margin(scores).tolist() == [2, 3, -2]
    probable = Task.create(X, Y, loss="probability_margin")
    assert probable.margin(scores).tolist() == [2, -2, -3]  # success is always a matter of the logits
    p = scores[0].softmax(0)
    torch.testing.assert_close(probable.objective(scores)[0], p[0] - p[1])


def point(*values):
    return torch.tensor(values).view(1, 1, 1, -1)


def ball(norm, eps, *centre):
    return Task.create(point(*centre), torch.tensor([0]), norm=norm, eps=eps)


def test_projection_in_linf_clips_each_value_to_the_ball_and_to_0_1():
    task = ball("linf", 51 / 255, 0.5, 0.5, 0.9, 0.1)
    torch.testing.assert_close(task.project(point(0.6, 0.0, 1.5, -1.0)), point(0.6, 0.3, 1.0, 0.0))


def test_projection_in_l2_shortens_to_the_radius_and_clips_to_0_1():
    task = ball("l2", 0.5, 0.5, 0.5)
    torch.testing.assert_close(task.project(point(0.8, 0.9)), point(0.8, 0.9))  # just inside
    torch.testing.assert_close(task.project(point(0.5, 2.0)), point(0.5, 1.0))
    torch.testing.assert_close(ball("l2", 0.5, 0.2, 0.2).project(point(0.8, 1.0)), point(0.5, 0.6))
    torch.testing.assert_close(ball("l2", 0.5, 0.9, 0.5).project(point(5.9, 0.5)), point(1.0, 0.5))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 0.5)])
def test_a_projection_is_inside_and_an_inner_point_its_own(norm, eps):
    task = Task.create(X, Y, norm=norm, eps=eps)
    far = X + torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    near = task.project(far)
    assert not bool(task.contains(far).any())
    assert bool(task.contains(near).all())
    assert 0 <= float(near.min()) <= float(near.max()) <= 1
    torch.testing.assert_close(task.project(near), near)
    assert torch.equal(task.project(X), X)


def test_contains_is_exact_up_to_rounding_for_each_image_alone():
    linf = Task.create(images(2, low=100, high=150), Y[:2], eps=8 / 255)
    step = torch.zeros(2, 1, 8, 8)
    step[0, 0, 0, 0], step[1, 0, 0, 0] = 8 / 255, -8.01 / 255
    assert linf.contains(linf.images + step).tolist() == [True, False]
    l2 = Task.create(linf.images, Y[:2], norm="l2", eps=0.4)
    step[0], step[1] = 0.05, 0.0501  # 64 values: length 0.4 and a bit more
    assert l2.contains(l2.images + step).tolist() == [True, False]


def test_contains_does_not_ask_for_values_in_0_1():
    task = Task.create(torch.ones(1, 1, 2, 2), Y[:1], eps=8 / 255)
    assert task.contains(task.images + 8 / 255).tolist() == [True]


@pytest.mark.filterwarnings("default")
def test_images_off_the_grid_of_8_bits_give_a_warning():
    x = torch.full((1, 1, 2, 2), 0.5)
    with pytest.warns(UserWarning, match="no multiples of 1/255"):
        Task.create(x, torch.tensor([0]))


@pytest.mark.parametrize("level", [1, 4, 8, 16, 77])
def test_what_is_just_inside_the_ball_in_l_inf_is_inside_after_the_floor_to_8_bits(level):
    x = (torch.arange(256.0) / 255).view(-1, 1, 1, 1)
    task = Task.create(x, torch.zeros(256, dtype=torch.int64), eps=level / 255)
    inside = 0
    for excess in torch.logspace(-9, -5, 40):
        for sign in (1, -1):
            y = x + sign * (level / 255 + excess)
            sent = quantize(y)
            rows = task.contains(y)
            inside += int(rows.sum())
            assert int((sent - x)[rows].mul(255).round().abs().max() if bool(rows.any()) else 0) <= level
    assert 256 < inside < 256 * 80  # the slack takes in some, not all
