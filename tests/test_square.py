"""The Square attack move by move: its schedule, its stripes, its windows, its acceptance."""

import pytest
import torch
from torch import nn

from helpers import Linear, images, levels
from queryfoil.attacks.square import Square
from queryfoil.oracle import Oracle, quantize
from queryfoil.task import Task

LEVEL = 8
ATTACK = Square(p_init=0.2)
COLOUR = (3, 10, 12)
ENDS = (10, 50, 200, 500, 1000, 2000, 4000)
SIDES = {
    (32, 0.05): (7, 5, 4, 3, 2, 1, 1),
    (32, 0.1): (10, 7, 5, 4, 3, 2, 1),
    (32, 0.3): (18, 12, 9, 6, 4, 3, 2),
    (224, 0.05): (50, 35, 25, 18, 13, 9, 6),
    (224, 0.3): (123, 87, 61, 43, 31, 22, 15),
}


@pytest.mark.parametrize(("size", "p_init"), SIDES)
def test_the_side_of_the_window_follows_the_schedule(size, p_init):
    attack, sides = Square(p_init=p_init), SIDES[size, p_init]
    assert [attack.side(end, size, size) for end in ENDS] == list(sides)
    assert [attack.side(start, size, size) for start in (0, *(end + 1 for end in ENDS[:-1]))] == list(sides)


def test_the_side_is_at_least_one_and_below_the_image():
    assert Square().side(9000, 8, 8) == 1
    assert Square(p_init=1.0).side(0, 8, 8) == 7
    assert Square(p_init=1.0).side(0, 6, 20) == 5
    assert Square().side(0, 1, 1) == 1


def test_a_shorter_horizon_runs_through_the_schedule_faster():
    full, short = Square(p_init=0.3), Square(p_init=0.3, horizon=1000)
    assert [short.side(t, 32, 32) for t in range(500)] == [full.side(10 * t, 32, 32) for t in range(500)]


class Played:
    """Square on a model that is never fooled: what it sent, and held after, each query from the second on."""

    def __init__(self, model, x, steps, attack=ATTACK):
        self.task = Task.create(x, torch.zeros(len(x), dtype=torch.int64), eps=LEVEL / 255, seed=3)
        self.sent, self.states = [], []
        oracle = Oracle(model, self.task, 10**6, observe=lambda ids, queries, sent, scores: self.sent.append(sent))
        oracle(x)
        self.states.append(attack.init(self.task, oracle))
        for t in range(steps):
            self.states.append(attack.step(self.task, oracle, self.states[-1], t))
        assert [len(sent) for sent in self.sent] == [len(x)] * (2 + steps)
        del self.sent[0]


class Plateau(nn.Module):
    """Sure of class 0, whatever it sees."""

    def forward(self, x):
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


def black_grey_and_white():
    """Images with values at both ends of the range, where a perturbation is clipped."""
    x = images(6, COLOUR)
    x[:2] = (x[:2] > 0.5).float()
    x[2] = 0
    return x


def test_query_2_is_plus_or_minus_eps_constant_down_each_column():
    x = images(40, COLOUR, low=LEVEL, high=255 - LEVEL)
    (stripes,) = Played(Plateau().eval(), x, steps=0).sent
    change = levels(stripes) - levels(x)
    assert change.unique().tolist() == [-LEVEL, LEVEL]
    assert torch.equal(change, change[:, :, :1].expand_as(change))
    signs = change[:, :, 0].sign().float()
    assert len(signs.flatten(1).unique(dim=0)) == 40  # of their own for each image
    assert float(signs.mean().abs()) < 4 / 1440**0.5
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((signs[:, a] * signs[:, b]).mean().abs()) < 4 / 480**0.5  # and for each channel


def test_a_proposal_changes_one_window_of_the_side_and_always_something():
    x = black_grey_and_white()
    played = Played(Linear(COLOUR, lead=100), x, steps=60)
    last_row = last_column = False
    for t, sent in enumerate(played.sent[1:]):
        side = ATTACK.side(t, 10, 12)
        change = levels(sent) != levels(quantize(played.states[t].best))
        for image in change.any(1):  # over channels
            rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
            assert len(rows), "nothing changed"
            assert int(rows[-1] - rows[0]) < side
            assert int(columns[-1] - columns[0]) < side
            last_row |= int(rows[-1]) == 9
            last_column |= int(columns[-1]) == 11
    assert last_row
    assert last_column


def test_a_single_value_changes_even_where_it_would_be_clipped():
    x = torch.tensor([0.0, 1.0]).repeat(6)[:, None, None, None].expand(12, 1, 8, 8).contiguous()
    played = Played(Linear(lead=100), x, steps=20, attack=Square(p_init=1e-6))
    for t, sent in enumerate(played.sent[1:]):
        change = levels(sent) != levels(quantize(played.states[t].best))
        assert change.flatten(1).sum(1).tolist() == [1] * 12


def test_a_window_has_one_sign_in_each_channel():
    x = images(6, COLOUR, low=LEVEL, high=255 - LEVEL)
    played = Played(Linear(COLOUR, lead=100), x, steps=30)
    for t, sent in enumerate(played.sent[1:]):
        move = levels(sent) - levels(quantize(played.states[t].best))
        for channel in move.flatten(0, 1):
            assert len(channel[channel != 0].unique()) <= 1


def test_all_values_are_the_clean_ones_plus_or_minus_eps_clipped():
    x = black_grey_and_white()
    up, down = (levels(x) + LEVEL).clamp(max=255), (levels(x) - LEVEL).clamp(min=0)
    for sent in Played(Linear(COLOUR, lead=100), x, steps=40).sent:
        assert bool(((levels(sent) == up) | (levels(sent) == down)).all())


def test_the_stripes_are_accepted_even_where_they_are_worse():
    x, model = images(30), Linear(lead=100)
    played = Played(model, x, steps=0)
    (state,), (stripes,) = played.states, played.sent
    assert 0 < int((state.loss > played.task.objective(model(x))).sum()) < 30
    assert torch.equal(quantize(state.best), stripes)
    assert torch.equal(state.loss, played.task.objective(model(stripes)))


def test_later_a_proposal_is_accepted_exactly_where_the_loss_falls():
    x, model = images(30), Linear(lead=100)
    played = Played(model, x, steps=30)
    accepted = 0
    for before, after, sent in zip(played.states, played.states[1:], played.sent[1:], strict=False):
        loss = played.task.objective(model(sent))
        falls = loss < before.loss
        assert torch.equal(after.loss, torch.where(falls, loss, before.loss))
        assert torch.equal(quantize(after.best), torch.where(falls[:, None, None, None], sent, quantize(before.best)))
        accepted += int(falls.sum())
    assert 100 < accepted < 800  # of 900


def test_an_equal_loss_is_not_accepted():
    x = images(4)
    played = Played(Plateau().eval(), x, steps=20)
    assert torch.equal(played.states[-1].best, played.states[0].best)


def test_each_image_has_windows_of_its_own():
    played = Played(Plateau().eval(), images(20), steps=5)
    for t, sent in enumerate(played.sent[1:]):
        changed = (levels(sent) != levels(played.sent[0])).any(0)
        assert int(changed.sum()) > ATTACK.side(t, 8, 8) ** 2  # more than one window holds


@pytest.mark.parametrize("p_init", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_share_outside_of_0_to_1_raises(p_init):
    with pytest.raises(ValueError, match=r"expected p_init in \(0, 1\].*got"):
        Square(p_init=p_init)


@pytest.mark.parametrize(
    "horizon",
    [0, -5, float("nan"), float("inf")],
)
def test_a_horizon_below_one_or_not_finite_raises(horizon):
    with pytest.raises(ValueError, match=rf"expected horizon >= 1.*got {horizon}"):
        Square(horizon=horizon)


def test_an_unknown_acceptance_rule_raises_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown acceptance rule 'gredy': expected one of .*did you mean 'greedy'"):
        Square(accept="gredy")
