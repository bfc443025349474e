"""RamBo stage by stage: the walk, the descent of blocks, the refinement, and when one follows the other."""

import itertools
import math

import pytest
import torch

from helpers import Door, Linear, Played, away, images, labels_of, levels, nearest
from queryfoil.attacks import build, signopt
from queryfoil.attacks.hopskipjump import HopSkipJump
from queryfoil.attacks.rambo import DESCENT, REFINEMENT, WALK, RamBo
from queryfoil.attacks.signopt import SignOpt
from queryfoil.oracle import quantize
from queryfoil.run import run
from queryfoil.task import Task, length

SHORT = {"walk_patience": 50, "walk_gain": 10}  # the walk ends after its first iteration


def two_class_task(n=8, shape=(1, 8, 8), **other):
    """Images about 0.5 from the boundary of a linear model."""
    model = Linear(shape, classes=2)
    x = away(model, images(n, shape, low=120, high=136), 0.5)
    return model, Task.create(x, labels_of(model, x), **{"norm": "l2", "eps": 1e-4, **other})


def even(n, value=0.0):
    return Task.create(torch.full((n, 1, 8, 8), value), torch.zeros(n, dtype=torch.int64), norm="l2", eps=1e-4)


def descending(task, x, **other):
    """The state of rows that are about to descend from x."""
    start = RamBo(**other).init(task, Door(task, lambda y: torch.ones(len(y), dtype=torch.bool)))
    size = (x - task.images).abs().flatten(1).amax(1)
    stage = torch.full_like(start.stage, DESCENT)
    return start._replace(x=x, stage=stage, size=size * RamBo(**other).shrink, before=length(x - task.images))


@pytest.fixture(scope="module")
def played():
    """All three stages on one model."""
    model, task = two_class_task()
    attack = RamBo(**SHORT, descent_patience=20, descent_gain=0.05, turns=60)
    return model, Played(attack, model, task, steps=32)


def test_the_three_stages_follow_each_other(played):
    stages = torch.stack([state.stage for state in played[1].states])
    assert bool((stages.diff(dim=0) >= 0).all())
    assert stages[0].tolist() == [WALK] * 8
    assert stages[1].tolist() == [DESCENT] * 8
    assert stages[-1].tolist() == [REFINEMENT] * 8


def test_every_image_held_fools_and_only_the_walk_may_take_it_further(played):
    model, played = played
    for before, after in zip(played.states, played.states[1:], strict=False):
        assert bool((labels_of(model, quantize(after.x)) != played.task.labels).all())
        nearer = length(after.x - played.task.images) <= length(before.x - played.task.images) + 1e-6
        assert bool((nearer | (before.stage == WALK)).all())


def test_each_stage_brings_the_images_nearer(played):
    model, played = played
    stages = torch.stack([state.stage for state in played.states])
    last = int((stages < REFINEMENT).all(1).sum()) - 1  # state before the first row is refined
    distances = [length(played.states[i].x - played.task.images) for i in (0, 1, last, -1)]
    for further, nearer in itertools.pairwise(distances):
        assert float(nearer.mean()) < 0.998 * float(further.mean())
    assert float((distances[-1] / nearest(model, played.task.images, "l2")).max()) < 1.5


def test_the_walk_is_hopskipjumps():
    model, task = two_class_task()
    rambo, walk = (Played(attack, model, task, steps=3) for attack in (RamBo(), HopSkipJump()))
    for ours, theirs in zip(rambo.states, walk.states, strict=True):
        assert ours.stage.tolist() == [WALK] * 8
        assert torch.equal(ours.x, theirs.x)


@pytest.mark.parametrize(("patience", "iterations"), [(99, 1), (100, 2), (240, 2), (241, 3)])
def test_the_walk_is_checked_after_more_probes_than_its_patience(patience, iterations):
    model, task = two_class_task(3)
    stages = [s.stage.tolist() for s in Played(RamBo(walk_patience=patience, walk_gain=10), model, task, 3).states]
    assert stages == [[WALK] * 3] * iterations + [[DESCENT] * 3] * (4 - iterations)


def test_a_walk_that_gains_enough_goes_on():
    model, task = two_class_task(3)
    played = Played(RamBo(walk_patience=50, walk_gain=0.01), model, task, 2)
    assert length(played.states[0].x - task.images).min() - length(played.states[1].x - task.images).max() > 0.01
    assert played.states[1].stage.tolist() == [WALK] * 3


@pytest.mark.parametrize(("percentile", "rank"), [(1.0, 64), (0.5, 32), (1e-9, 1)])
def test_the_first_step_of_the_descent_is_a_percentile_of_the_changes(percentile, rank):
    model, task = two_class_task(3)
    rambo, walk = (Played(a, model, task, 1).states[1] for a in (RamBo(**SHORT, percentile=percentile), HopSkipJump()))
    change = (walk.x - task.images).abs().flatten(1).sort(1).values
    torch.testing.assert_close(rambo.size, change[:, rank - 1])


@pytest.mark.parametrize(("block", "reach"), [(1, 1), (1, 0), (1, 2), (4, 1)])
def test_a_move_takes_windows_in_a_channel_by_the_step_towards_the_image(block, reach):
    model, task = two_class_task(8, (3, 8, 8))
    attack = RamBo(**SHORT, block=block, reach=reach, descent_patience=10**6)
    played = Played(attack, model, task, steps=25)
    accepted = rejected = 0
    for move, (before, after) in enumerate(itertools.pairwise(played.states[1:]), 2):
        ids, sent = played.of(move)
        assert sorted(ids.tolist()) == list(range(8))  # one query each
        old, new, clean = before.x[ids], after.x[ids], task.images[ids]
        fooled = labels_of(model, sent) != task.labels[ids]
        assert torch.equal(
            quantize(torch.where(fooled[:, None, None, None], new, old)),
            torch.where(fooled[:, None, None, None], sent, quantize(old)),
        )
        assert bool((length(new - clean) < length(old - clean))[fooled].all())
        step = after.size[ids][:, None, None, None]
        towards = quantize(old - step * (old - clean).sign())
        moved = levels(sent) != levels(quantize(old))
        assert torch.equal(sent[moved], towards[moved])
        for image in moved:
            assert 0 < int(image.sum()) <= block * (2 * reach + 1) ** 2
            if block == 1:
                channels, rows, columns = (found.unique() for found in image.nonzero(as_tuple=True))
                assert len(channels) == 1
                assert int(rows[-1] - rows[0]) <= 2 * reach
                assert int(columns[-1] - columns[0]) <= 2 * reach
        accepted += int(fooled.sum())
        rejected += int((~fooled).sum())
    assert accepted >= 2
    assert rejected > 50


def test_a_pass_asks_every_value_once_and_the_next_with_a_smaller_step():
    task = even(2)
    state = descending(task, torch.full_like(task.images, 0.6), reach=0, shrink=2)
    attack = RamBo(reach=0, shrink=2, descent_patience=10**6)
    door = Door(task, lambda y: torch.zeros(len(y), dtype=torch.bool))
    passes, sizes = [], []
    for t in range(128):
        state = attack.step(task, door, state, t)
        y, where = door.asked[t]
        assert where.tolist() == [True] * 2
        change = (state.x - y).flatten(1)
        passes.append(change.abs().argmax(1))
        sizes.append(change.sum(1))
    first, second = torch.stack(passes).split(64)
    for order in (*first.T, *second.T):
        assert order.unique().tolist() == list(range(64))
    assert len({tuple(order.tolist()) for order in (*first.T, *second.T)}) == 4  # of its own for each image and pass
    torch.testing.assert_close(torch.stack(sizes), torch.tensor([0.6] * 64 + [0.3] * 64)[:, None].expand(128, 2))


def test_three_passes_without_a_query_end_the_descent():
    task = even(2, 0.5)
    state = descending(task, task.images + 0.1, turns=3)._replace(size=torch.full((2,), 0.4))
    door = Door(task, lambda y: torch.zeros(len(y), dtype=torch.bool))
    after = RamBo(turns=3).step(task, door, state, 0)  # 0.4 / 1.2^3 = 0.23 overshoots by more than 0.1 still
    assert after.stage.tolist() == [REFINEMENT] * 2
    torch.testing.assert_close(after.size, torch.full((2,), 0.4 / 1.2**4))
    assert len([where for _, where in door.asked if bool(where.any())]) == 3 + 1 + 15  # all of the refinement

    state = state._replace(size=torch.full((2,), 0.3))  # 0.3 / 1.2^3 = 0.17 does not
    assert RamBo(turns=3).step(task, door, state, 0).stage.tolist() == [DESCENT] * 2


@pytest.mark.parametrize(("gain", "queries"), [(10, 20), (0, None)])
def test_the_descent_is_checked_after_as_many_queries_as_its_patience(gain, queries):
    model, task = two_class_task(4)
    played = Played(RamBo(**SHORT, descent_patience=20, descent_gain=gain, turns=2), model, task, 30)
    descent = [state.stage.tolist() for state in played.states].count([DESCENT] * 4)
    assert descent == (queries or 31) - 1  # the first query is asked in the step that ends the walk


def test_the_refinement_turns_to_where_the_boundary_is_nearer():
    task = even(6)
    model = Linear(classes=2)
    normal = (model.weight[0] - model.weight[1]).detach().abs().view(1, 1, 8, 8)
    normal = normal / normal.norm()
    door = Door(task, lambda y: (y * normal).flatten(1).sum(1) > 0.5)
    x = torch.full_like(task.images, 0.5 / float(normal.sum()) + 1e-4)
    alpha, beta = torch.full((6,), 0.2), torch.full((6,), 1e-3)
    distances = [length(x)]
    for t in range(8):
        x, alpha, beta = SignOpt(turns=200, grain=0.0).iterate(task, door, x, alpha, beta, t, door.live)
        assert bool(door.fools(x).all())
        distances.append(length(x))
        assert bool((distances[-1] <= distances[-2]).all())
    assert float(distances[0].min()) > 0.57
    assert 0.5 <= float(distances[-1].min()) <= float(distances[-1].max()) < 0.53


def test_a_refinement_that_finds_nothing_leaves_the_image_and_starts_over_with_smaller_turns():
    task = even(2)
    x = torch.rand(task.images.shape, generator=torch.Generator().manual_seed(0))
    door = Door(task, lambda y: torch.zeros(len(y), dtype=torch.bool))
    alpha, beta = torch.full((2,), 0.2), torch.full((2,), 1e-3)
    after, alpha, beta = SignOpt(turns=10, grain=0.0).iterate(task, door, x, alpha, beta, 0, door.live)
    assert torch.equal(after, x)
    assert alpha.tolist() == [1, 1]  # doubled once, then quartered 15 times, below 1e-4
    assert beta.tolist() == pytest.approx([1e-4] * 2)


def test_a_model_that_never_errs_is_asked_for_the_whole_budget():
    result = run(RamBo(), Linear(lead=1000), even(4), 57)
    assert result.queries.tolist() == [57] * 4
    assert result.accuracy() == 1


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.usefixtures("same_random_states")
def test_all_stages_in_chunks_are_those_of_the_whole_bit_for_bit(size):
    model, task = two_class_task(7, eps=0.7)
    attack = RamBo(**SHORT, descent_patience=10, descent_gain=0.01, turns=30)
    whole = run(attack, model, task, 450)
    parts = [run(attack, model, task.rows(rows), 450) for rows in torch.arange(7).split(size)]
    for field in ("fooled_at", "queries", "adversarial"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field
    assert len(whole.queries.unique()) > 3
    assert int(whole.queries.max()) > 250


def test_the_preset_for_imagenet_is_the_releases():
    assert build("rambo", norm="l2", preset="imagenet") == RamBo(2000, 1, 0.5, 16, 1, 2, 1000, 0.1)
    assert build("rambo", norm="l2", preset="cifar10") == RamBo()


def test_l_inf_and_targets_are_refused():
    model, task = two_class_task()
    with pytest.raises(ValueError, match="RamBo supports norm l2, but got 'linf'"):
        run(RamBo(), model, Task.create(task.images, task.labels), 10)
    with pytest.raises(ValueError, match="RamBo is untargeted"):
        run(RamBo(), model, Task.create(task.images, task.labels, targets=1 - task.labels, norm="l2", eps=1.0), 10)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"block": 0}, "expected block as a whole number >= 1, but got 0"),
        ({"block": 1.5}, "expected block as a whole number >= 1, but got 1.5"),
        ({"turns": math.nan}, "expected turns as a whole number >= 1, but got nan"),
        ({"walk_patience": math.inf}, "expected walk_patience as a whole number >= 1, but got inf"),
        ({"reach": "1"}, "expected reach as a whole number >= 0, but got '1'"),
        ({"descent_gain": -1}, "expected descent_gain finite and >= 0, but got -1"),
        ({"alpha": 0}, "expected alpha > 0 and finite, but got 0"),
        ({"shrink": 1}, "expected shrink finite and > 1, but got 1"),
        ({"percentile": 0}, r"expected percentile in \(0, 1\], but got 0"),
        ({"percentile": 100}, r"expected percentile in \(0, 1\], but got 100"),
        ({"grain": 2}, r"expected grain in \[0, 1\].*got 2"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        RamBo(**chosen)


@pytest.mark.parametrize("radius", [3.0, 20.0, 40.0])
def test_the_bisection_along_a_direction_ends_at_any_distance(radius):
    x = torch.full((2, 3, 64, 64), 0.5)
    theta = torch.zeros_like(x)
    theta[:, 0] = 1 / 64
    task = Task.create(x, torch.zeros(2).long(), norm="l2", eps=1.0)
    door = Door(task, lambda shown: length(shown - x) > 0.123 * min(radius, 20))
    start = torch.full((2,), radius)
    signopt._nearer(task, door, theta, start, (start * 0 + 2e-6).maximum(start * 2.0**-22), door.live)
    assert len(door.asked) < 400
