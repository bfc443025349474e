"""The Square attack move by move: its schedule, its stripes, its windows, its acceptance."""

import pytest
import torch

from helpers import Linear, Plateau, Played, images, levels
from queryfoil.attacks.square import Square, bump
from queryfoil.oracle import quantize
from queryfoil.task import Task, length

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


def play(model, x, steps, attack=ATTACK, **task):
    """Square on a model that is never fooled."""
    return Played(attack, model, square_task(x, **task), steps)


def square_task(x, **other):
    return Task.create(x, torch.zeros(len(x), dtype=torch.int64), **{"eps": LEVEL / 255, "seed": 3, **other})


def black_grey_and_white():
    """Images with values at both ends of the range, where a perturbation is clipped."""
    x = images(6, COLOUR)
    x[:2] = (x[:2] > 0.5).float()
    x[2] = 0
    return x


def test_query_2_is_plus_or_minus_eps_constant_down_each_column():
    x = images(40, COLOUR, low=LEVEL, high=255 - LEVEL)
    (stripes,) = play(Plateau(), x, steps=0).sent
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
    played = play(Linear(COLOUR, lead=100), x, steps=60)
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
    played = play(Linear(lead=100), x, steps=20, attack=Square(p_init=1e-6))
    for t, sent in enumerate(played.sent[1:]):
        change = levels(sent) != levels(quantize(played.states[t].best))
        assert change.flatten(1).sum(1).tolist() == [1] * 12


def test_a_window_has_one_sign_in_each_channel():
    x = images(6, COLOUR, low=LEVEL, high=255 - LEVEL)
    played = play(Linear(COLOUR, lead=100), x, steps=30)
    for t, sent in enumerate(played.sent[1:]):
        move = levels(sent) - levels(quantize(played.states[t].best))
        for channel in move.flatten(0, 1):
            assert len(channel[channel != 0].unique()) <= 1


def test_all_values_are_the_clean_ones_plus_or_minus_eps_clipped():
    x = black_grey_and_white()
    up, down = (levels(x) + LEVEL).clamp(max=255), (levels(x) - LEVEL).clamp(min=0)
    for sent in play(Linear(COLOUR, lead=100), x, steps=40).sent:
        assert bool(((levels(sent) == up) | (levels(sent) == down)).all())


def test_the_stripes_are_accepted_even_where_they_are_worse():
    x, model = images(30), Linear(lead=100)
    played = play(model, x, steps=0)
    (state,), (stripes,) = played.states, played.sent
    assert 0 < int((state.loss > played.task.objective(model(x))).sum()) < 30
    assert torch.equal(quantize(state.best), stripes)
    assert torch.equal(state.loss, played.task.objective(model(stripes)))


def test_later_a_proposal_is_accepted_exactly_where_the_loss_falls():
    x, model = images(30), Linear(lead=100)
    played = play(model, x, steps=30)
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
    played = play(Plateau(), x, steps=20)
    assert torch.equal(played.states[-1].best, played.states[0].best)


def test_each_image_has_windows_of_its_own():
    played = play(Plateau(), images(20), steps=5)
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
    with pytest.raises(ValueError, match=rf"expected horizon as a whole number >= 1, but got {horizon}"):
        Square(horizon=horizon)


# L2


L2_SIDES = {
    (32, 0.05): (7, 5, 5, 3, 3, 3, 3),
    (32, 0.1): (11, 7, 5, 5, 3, 3, 3),
    (224, 0.1): (71, 51, 35, 25, 19, 13, 9),
}


@pytest.mark.parametrize(("size", "p_init"), L2_SIDES)
def test_windows_of_l2_have_an_odd_side_of_at_least_3(size, p_init):
    attack = Square(p_init=p_init)
    assert [attack.odd_side(end, size, size) for end in ENDS] == list(L2_SIDES[size, p_init])
    assert [Square(p_init=1.0).odd_side(0, size, 40) for size in (2, 3, 4, 7, 8)] == [1, 3, 3, 7, 7]


def test_a_bump_is_two_opposite_halves_that_fall_off_from_their_centres():
    third, half = 1 + 1 / 4, 1 / 4  # heights at the centre and beside it, of a half with 1 and 2 rows
    upper = torch.tensor([[half, third, half]])
    lower = torch.tensor([[half, half, half], [half, third, half]])[:, [0, 1, 2]]
    expected = torch.cat([upper / upper.norm(), -lower / lower.norm()])
    torch.testing.assert_close(bump(3), expected / 2**0.5)
    for side in (1, 2, 5, 9, 35):
        assert float(bump(side).norm()) == pytest.approx(1, abs=1e-6)
    assert float(bump(9).sum(1)[:4].min()) > 0 > float(bump(9).sum(1)[4:].max())


def test_the_start_in_l2_is_a_grid_of_five_by_five_bumps_on_the_sphere():
    x = images(20, (2, 10, 10), low=100, high=150)
    played = play(Plateau(), x, steps=0, norm="l2", eps=1.0)
    delta = played.states[0].best - x
    torch.testing.assert_close(length(delta), torch.ones(20))
    tiles = delta.view(20, 2, 5, 2, 5, 2).transpose(3, 4).reshape(20, 2, 25, 2, 2)
    upright, turned = bump(2), bump(2).T
    scale = float(tiles.abs().max() / upright.abs().max())
    kinds = torch.stack([upright, -upright, turned, -turned]) * scale
    nearest = (tiles[..., None, :, :] - kinds).abs().flatten(-2).amax(-1)
    assert float(nearest.amin(-1).max()) < 1e-4  # each tile is one of the four
    assert bool((nearest.argmin(-1).flatten().bincount(minlength=4) > 150).all())  # of 1,000
    turned_tile = nearest.argmin(-1) >= 2
    assert torch.equal(turned_tile[:, 0], turned_tile[:, 1])  # channels share the turn, not the sign


def test_an_image_that_is_not_square_has_more_bumps_along_its_longer_side():
    x = images(3, (1, 10, 23), low=100, high=150)
    delta = play(Plateau(), x, steps=0, norm="l2", eps=1.0).states[0].best - x
    columns = (delta != 0).any(2).any(1).any(0)
    assert int(columns.sum()) == 22
    assert not bool(columns[22])


def test_a_proposal_of_l2_stays_on_the_sphere_and_changes_two_windows():
    x = images(12, (2, 15, 15), low=100, high=150)
    attack = Square(p_init=0.1)
    played = play(Linear((2, 15, 15), lead=100), x, steps=40, attack=attack, norm="l2", eps=0.3)
    for t, state in enumerate(played.states[:-1]):
        side = attack.odd_side(t, 15, 15)
        proposal = attack._moved(played.task, state.best, t)
        torch.testing.assert_close(length(proposal - x), torch.full((12,), 0.3), atol=1e-5, rtol=0)
        change = ((proposal - state.best).abs() > 1e-6).any(1)
        # everything outside is only scaled by the last normalization, which is 1 up to rounding
        assert bool((change.flatten(1).sum(1) <= 2 * side**2).all())
        assert float(change.flatten(1).sum(1).float().mean()) > side**2  # rarely, both windows are empty


def test_the_length_of_both_windows_moves_to_the_new_one():
    x = images(1, (1, 15, 15), low=100, high=150)
    task = square_task(x, norm="l2", eps=0.3)
    delta = torch.zeros_like(x)
    delta[0, 0, :, :] = 0.3 / 15
    proposal = ATTACK._moved(task, x + delta, 300) - x
    side = ATTACK.odd_side(300, 15, 15)
    emptied = (proposal.abs() < 1e-6).flatten(1).sum(1)
    assert int(emptied) >= 1
    kept = (proposal - delta).abs() < 1e-5
    assert int(kept.sum()) >= 225 - 2 * side**2  # outside, nothing is scaled: the length was conserved


def test_where_clipping_took_length_away_l2_uses_the_spare():
    x = images(6, (1, 15, 15), low=100, high=150)
    task = square_task(x, norm="l2", eps=0.3)
    short = x + 0.5 * (play(Plateau(), x, steps=0, norm="l2", eps=0.3).states[0].best - x)
    torch.testing.assert_close(length(ATTACK._moved(task, short, 0) - x), torch.full((6,), 0.3), atol=1e-5, rtol=0)
