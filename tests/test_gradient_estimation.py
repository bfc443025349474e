"""NES and Bandits move by move: their probes, their steps, their counting."""

import pytest
import torch
from torch import nn

from helpers import Linear, Plateau, Played, images
from queryfoil import rng
from queryfoil.attacks import build
from queryfoil.attacks.bandits import Bandits
from queryfoil.attacks.nes import NES, steepest
from queryfoil.oracle import quantize
from queryfoil.task import Task, length

EPS = {"linf": 20 / 255, "l2": 1.0}


def task_of(x, norm="linf", **other):
    return Task.create(
        x, torch.zeros(len(x), dtype=torch.int64), **{"norm": norm, "eps": EPS[norm], "seed": 3, **other}
    )


class Smooth(nn.Module):
    """Two classes; the lead of the first falls evenly along a direction."""

    def __init__(self, direction):
        super().__init__()
        self.direction = direction
        self.eval()

    def forward(self, x):
        lead = 50 - (x * self.direction).flatten(1).sum(1)
        return torch.stack([lead, torch.zeros_like(lead)], 1)


def test_the_steepest_direction_has_length_1_in_its_norm():
    gradient = torch.tensor([[[[3.0, -4.0, 0.0]]]])
    assert steepest(gradient, "linf").flatten().tolist() == [1, -1, 0]
    torch.testing.assert_close(steepest(gradient, "l2").flatten(), torch.tensor([0.6, -0.8, 0]))
    assert steepest(torch.zeros(1, 1, 1, 2), "l2").flatten().tolist() == [0, 0]


def test_nes_asks_pairs_on_both_sides_and_steps_against_their_mean_difference():
    x = images(5, (1, 6, 6), low=100, high=150)
    model = Linear((1, 6, 6), lead=100)
    task = task_of(x, loss="margin")
    attack = NES(pairs=4, probe=2.0)  # of a length that shows in 8 bits
    played = Played(attack, model, task, 1)
    assert len(played.sent) == 8
    gradient = torch.zeros_like(x)
    for pair in range(4):
        u = rng.normal(3, task.ids, 0, pair, 36).view(x.shape) / 6
        up, down = played.sent[2 * pair : 2 * pair + 2]
        assert torch.equal(up, quantize(x + 2 * u))
        assert torch.equal(down, quantize(x - 2 * u))
        gradient += (task.margin(model(up)) - task.margin(model(down)))[:, None, None, None] * u
    torch.testing.assert_close(played.states[1].x, x - 2 / 255 * gradient.sign())


def test_the_directions_of_nes_have_expected_length_1():
    u = rng.normal(0, torch.arange(500), 0, 0, 784) / 28
    assert float(length(u).mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["nes", "bandits"])
def test_on_a_smooth_model_the_steps_follow_the_gradient(name, norm):
    x = images(8, (1, 6, 6), low=100, high=150)
    direction = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(1))
    hyper = {"nes": {"probe": 0.5, "pairs": 10}, "bandits": {"probe": 0.5, "prior_lr": 1.0, "exploration": 0.3}}[name]
    attack = build(name, norm=norm, **hyper)
    played = Played(attack, Smooth(direction), task_of(x, norm, loss="margin"), 100)
    found = (played.states[-1].x - x).flatten(1)
    cosine = (found @ direction.flatten()) / found.norm(dim=1) / direction.norm()
    assert bool((cosine > (0.5 if norm == "linf" else 0.65)).all())
    assert bool(played.oracle.task.contains(played.states[-1].x).all())


def test_bandits_by_hand():
    x = images(3, (1, 4, 4), low=100, high=150)
    model = Linear((1, 4, 4), lead=100)
    task = task_of(x, loss="margin")
    attack = Bandits(probe=1.0, lr=2 / 255, prior_lr=0.1, exploration=0.5)
    played = Played(attack, model, task, 2)
    assert len(played.sent) == 4
    prior, now = torch.zeros_like(x), x  # prior: where the reference's loss, minus ours, rises
    for t in range(2):
        noise = 0.5 * rng.normal(3, task.ids, t, 0, 16).view(x.shape) / 4
        losses = []
        for sent, sign in zip(played.sent[2 * t : 2 * t + 2], (-1, 1), strict=True):
            probe = now + (prior + sign * noise) / length(prior + sign * noise)[:, None, None, None]
            assert int(((sent - quantize(probe)) * 255).abs().max()) <= 1  # up to rounding before the floor
            losses.append(-task.margin(model(sent)))
        gradient = ((losses[1] - losses[0]) / 0.5)[:, None, None, None] * noise
        share = (1 + prior) / 2 * (0.1 * gradient).exp()  # exponentiated gradient, as in the paper
        rest = (1 - prior) / 2 * (-0.1 * gradient).exp()
        prior = 2 * share / (share + rest) - 1
        now = now + 2 / 255 * prior.sign()
        torch.testing.assert_close(played.states[t + 1].prior, -prior, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(played.states[t + 1].x, now)


def test_huge_gradients_leave_the_prior_finite():
    attack = Bandits()
    prior = torch.tensor([0.0, 0.5, 1.0, -1.0]).repeat(2)
    gradient = torch.tensor([1e6, -1e6]).repeat_interleave(4)
    found = attack._corrected(prior, gradient, "linf")
    assert bool(found.isfinite().all())
    assert float(found.abs().max()) <= 1
    assert found[:2].tolist() == [1, 1]
    assert found[4:6].tolist() == [-1, -1]


def test_a_tiled_prior_is_stretched_over_the_image():
    x = images(3, (2, 8, 12), low=100, high=150)
    played = Played(Bandits(tile=4, prior_lr=0.1), Linear((2, 8, 12), lead=100), task_of(x), 3)
    assert played.states[-1].prior.shape == (3, 2, 4, 4)
    step = (played.states[-1].x - played.states[-2].x).sign()
    assert torch.equal(step, step[:, :, ::2, ::3].repeat_interleave(2, 2).repeat_interleave(3, 3))
    assert int(step.unique().numel()) >= 2


class Edge(nn.Module):
    """Fooled as soon as the first value is 30 levels up or more."""

    def __init__(self, clean):
        super().__init__()
        self.clean = clean
        self.eval()

    def forward(self, x):
        up = ((x - self.clean[:1]) * 255).round()[:, 0, 0, 0]
        return torch.stack([torch.where(up >= 30, -1.0, 1.0) + up * -0.01, torch.zeros_like(up)], 1)


@pytest.mark.parametrize("attack", [NES(pairs=2, probe=0.6), Bandits(probe=0.6)], ids=["nes", "bandits"])
def test_the_image_itself_is_asked_only_where_a_probe_outside_the_ball_reached_the_goal(attack):
    x = images(1, (1, 4, 4), low=128, high=128).expand(40, 1, 4, 4).contiguous()
    played = Played(attack, Edge(x), task_of(x, eps=20 / 255), 2)
    probes = 4 if isinstance(attack, NES) else 2
    assert played.counts(1) == [probes] * 40  # the first image is the clean one, which was asked
    played.sent, played.asked = played.sent[probes:], played.asked[probes:]
    now = quantize(played.states[1].x)
    assert [len(ids) for ids in played.asked[:probes]] == [40] * probes  # outside the ball, none has won
    reached = torch.stack([Edge(x)(sent).argmax(1) == 1 for sent in played.sent[:probes]]).any(0)
    assert 0 < int(reached.sum()) < 40
    assert torch.equal(played.asked[probes], reached.nonzero().flatten())
    assert torch.equal(played.sent[probes], now[reached])
    assert played.oracle.queries.tolist() == (1 + 2 * probes + reached.long()).tolist()


def test_on_a_plateau_nothing_moves_in_l_inf():
    x = images(3, low=100, high=150)
    for attack in (NES(pairs=2), Bandits()):
        assert torch.equal(Played(attack, Plateau(), task_of(x), 3).states[-1].x, x)


def test_the_defaults_of_l2_are_others():
    assert build("nes", norm="l2") == NES(lr=64 / 255, pairs=4)
    assert build("nes", norm="l2", lr=0.1) == NES(lr=0.1, pairs=4)
    assert build("bandits", norm="l2") == Bandits(probe=0.01, lr=0.5, prior_lr=0.1, exploration=0.01)


def test_presets_are_the_papers_table():
    assert build("nes", preset="cifar10") == NES(probe=0.01, lr=2 / 255, pairs=20)
    assert build("nes", preset="imagenet") == NES(probe=0.1, lr=0.02, pairs=100)
    assert build("bandits", preset="imagenet") == Bandits(probe=0.1, lr=0.01, prior_lr=100.0, exploration=1.0)
    assert build("nes", preset="imagenet", pairs=7).pairs == 7


@pytest.mark.parametrize(
    ("kind", "hyper", "message"),
    [
        (NES, {"probe": 0.0}, "expected probe > 0 and finite, but got 0"),
        (NES, {"lr": float("inf")}, "expected lr > 0 and finite"),
        (NES, {"pairs": 0}, "expected pairs as a whole number >= 1, but got 0"),
        (Bandits, {"exploration": -1.0}, "expected exploration > 0"),
        (Bandits, {"prior_lr": float("nan")}, "expected prior_lr > 0"),
        (Bandits, {"tile": -1}, "expected tile as a whole number >= 0, but got -1"),
    ],
)
def test_hyper_parameters_that_make_no_sense_raise(kind, hyper, message):
    with pytest.raises(ValueError, match=message):
        kind(**hyper)
