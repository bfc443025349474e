"""HopSkipJump move by move: its start, its bisections, its probes, its steps; and what labels alone allow."""

import math

import pytest
import torch
from torch import nn

from helpers import Door, Linear, Played, away, images, labels_of, nearest
from queryfoil.attacks.hopskipjump import HopSkipJump, State, bisect, clipped, distance, straight, unit
from queryfoil.oracle import LabelOracle, Oracle, quantize
from queryfoil.run import run
from queryfoil.task import Task

NORMS = ("l2", "linf")
SMALLEST = {"l2": 1e-4, "linf": 1 / 255}  # balls that hold no fooling image, so that no row ever ends
BISECTION = {"l2": 9, "linf": 12}  # queries, for 64 values

both_norms = pytest.mark.parametrize("norm", NORMS)


def black(n, norm="l2", shape=(1, 8, 8)):
    """Images of zeros, of class 0."""
    return Task.create(torch.zeros(n, *shape), torch.zeros(n, dtype=torch.int64), norm=norm, eps=SMALLEST[norm])


def two_class_task(norm, n=12, shape=(1, 8, 8), **other):
    """Images about 0.5 from the boundary of a linear model in L2, and about 19 levels in L-inf."""
    model = Linear(shape, classes=2)
    x = away(model, images(n, shape, low=120, high=136), 0.5)
    return model, Task.create(x, labels_of(model, x), **{"norm": norm, "eps": SMALLEST[norm], **other})


def test_the_number_of_probes_grows_with_the_root_of_the_iteration():
    assert [HopSkipJump().count(t) for t in range(6)] == [100, 141, 173, 200, 223, 244]
    assert HopSkipJump().count(10_000) == 10_000
    assert HopSkipJump(probes=7, most_probes=9).count(8) == 9


@both_norms
def test_the_bisection_ends_at_the_papers_share_of_the_distance(norm):
    theta = HopSkipJump(gamma=2).theta(black(1, norm, (3, 4, 5)))
    assert theta == pytest.approx(2 / 60**1.5 if norm == "l2" else 2 / 60**2)


@pytest.mark.parametrize("path", [straight, clipped])
@pytest.mark.parametrize(("width", "queries"), [(0.25, 2), (1e-3, 10), (1e-5, 17)])
def test_a_bisection_ends_within_its_width_on_the_far_side(path, width, queries):
    task = black(5, "linf")
    cuts = torch.tensor([0.0001, 0.2, 0.5, 0.7, 0.9999])
    door = Door(task, lambda x: x[:, 0, 0, 0] >= cuts)
    found = bisect(task, door, door.live, lambda share: path(task, torch.ones_like(task.images), share), width)
    assert len(door.asked) == queries
    shares = found[:, 0, 0, 0]
    assert bool((cuts <= shares).all())
    assert bool((shares <= cuts + width).all())
    assert torch.equal(found, shares[:, None, None, None].expand_as(found))


def test_the_two_paths_blend_and_clip():
    task, x = black(1, "linf", (1, 1, 3)), torch.tensor([0.8, 0.2, 0.4]).view(1, 1, 1, 3)
    half = torch.tensor([0.5])
    assert straight(task, x, half).flatten().tolist() == pytest.approx([0.4, 0.1, 0.2])
    assert clipped(task, x, half).flatten().tolist() == pytest.approx([0.4, 0.2, 0.4])


def test_noise_is_tried_until_it_fools_and_no_longer():
    class Picky(nn.Module):
        """Fooled where the first value is above three quarters."""

        def forward(self, x):
            fooled = (x[:, 0, 0, 0] > 0.75).float()
            return torch.stack([1 - fooled, fooled], 1)

    played = Played(HopSkipJump(), Picky().eval(), black(40), steps=0)
    trials = torch.tensor(played.counts(0)) - (10 + BISECTION["l2"])
    assert int(trials.min()) == 1
    assert 3 < float(trials.double().mean()) < 5.5  # 4 expected
    first = played.sent[0]
    assert torch.equal(trials == 1, first[:, 0, 0, 0] > 0.75)
    assert abs(float(first.mean()) - 0.5) < 0.03
    assert len(first.flatten(1).unique(dim=0)) == 40  # of its own for each image


@both_norms
def test_a_model_that_never_errs_is_asked_for_the_whole_budget(norm):
    result = run(HopSkipJump(), Linear(lead=1000), black(4, norm), 57)
    assert result.queries.tolist() == [57] * 4
    assert result.accuracy() == 1


@both_norms
def test_the_first_iteration_of_a_cifar_image_costs_110_to_200_queries(norm):
    model, task = two_class_task(norm, 6, (3, 32, 32))
    played = Played(HopSkipJump(), model, task, steps=1)
    search = math.ceil(math.log2(3072 ** (1.5 if norm == "l2" else 2)))
    for start, first in zip(played.counts(0), played.counts(1), strict=True):
        assert start >= 1 + 10 + search
        assert 100 + 1 + search <= first <= 100 + 10 + search
        assert 110 <= first + start <= 200


@both_norms
def test_probes_have_the_length_of_the_paper_but_no_less_than_the_grain(norm):
    def lengths(attack, t):
        task = black(3, norm)
        x = torch.full_like(task.images, 0.5)
        door = Door(task, lambda y: y.flatten(1).sum(1) > 32)
        attack.iterate(task, door, State(x, torch.tensor([1.0, 2.0, 16.0])), t, door.live)
        probes = torch.stack([y - x for y, _ in door.asked[: attack.count(t)]])
        return probes.flatten(2).norm(dim=2)

    grainless = HopSkipJump(probes=5, gamma=2, grain=0)
    torch.testing.assert_close(lengths(grainless, 0), torch.full((5, 3), 0.1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        lengths(grainless, 1), torch.tensor([2.0, 4.0, 32.0]).expand(7, 3) / 64, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        lengths(HopSkipJump(probes=5, gamma=2, grain=0.01), 1),
        torch.tensor([0.08, 0.08, 0.5]).expand(7, 3),
        rtol=1e-4,
        atol=1e-6,
    )


@both_norms
def test_the_estimate_points_along_the_normal_into_the_wrong_class(norm):
    task, attack = black(8, norm), HopSkipJump(probes=1000)
    normal = unit(Linear(classes=2).weight[:1].detach().view(1, 1, 8, 8))
    x, delta = torch.full_like(task.images, 0.5), torch.full((8,), 0.1)
    for side in (1, -1):
        door = Door(task, lambda y, side=side: side * ((y - x) * normal).flatten(1).sum(1) > 0.005)  # off the boundary
        found = attack.normal(task, door, x, delta, 0, door.live)
        cosine = (found * normal).flatten(1).sum(1) * side
        assert float(cosine.min()) > 0.9
        assert torch.allclose(found.flatten(1).norm(dim=1), torch.ones(8))


def test_where_all_probes_agree_the_estimate_is_their_mean_or_its_opposite():
    task, attack = black(2), HopSkipJump(probes=20)
    x, delta = torch.full_like(task.images, 0.5), torch.full((2,), 0.1)
    fooled, honest = (Door(task, lambda y, all=all: torch.full((2,), all)) for all in (True, False))
    found = attack.normal(task, fooled, x, delta, 0, fooled.live)
    mean = torch.stack([y - x for y, _ in fooled.asked]).mean(0)
    torch.testing.assert_close(found, unit(mean), rtol=1e-3, atol=1e-4)
    assert torch.equal(found, -attack.normal(task, honest, x, delta, 0, honest.live))


def test_clipped_probes_count_as_they_were_asked():
    task = black(1)
    door = Door(task, lambda y: y[:, 0, 0, 0] > 0)
    found = HopSkipJump(probes=400).normal(task, door, task.images, torch.tensor([0.1]), 0, door.live)
    assert float(found.min()) > -0.25  # no value can go below 0; unclipped, half of them would
    assert int(found.flatten().argmax()) == 0


def test_a_step_is_halved_until_it_fools_and_given_up_at_last():
    task = black(1)
    x = torch.full_like(task.images, 0.5)
    state = State(x, torch.ones(1))
    attack = HopSkipJump(probes=3)

    door = Door(task, lambda y: torch.tensor([False]))
    after = attack.iterate(task, door, state, 0, door.live)
    assert torch.equal(after.x, x)
    assert len(door.asked) == 3 + 50 + BISECTION["l2"]

    door = Door(task, lambda y: (y - x).norm() < 0.2)  # all probes fool, and steps up to 0.2 do
    attack.iterate(task, door, state, 15, door.live)
    steps = [float((y - x).norm()) for y, _ in door.asked[12:][: -BISECTION["l2"]]]
    assert steps == pytest.approx([1, 0.5, 0.25, 0.125], rel=1e-3)  # a distance of 4 over the root of t = 16


@both_norms
def test_every_iterate_fools_and_they_come_near_the_closed_form(norm):
    model, task = two_class_task(norm)
    played = Played(HopSkipJump(), model, task, steps=6)
    for state in played.states:
        assert bool((labels_of(model, quantize(state.x)) != task.labels).all())
    shares = distance(task, played.states[-1].x) / nearest(model, task.images, norm)
    first = distance(task, played.states[0].x) / nearest(model, task.images, norm)
    assert float(first.median()) > 2.5
    assert 0.8 < float(shares.min()) <= float(shares.max()) < (1.25 if norm == "l2" else 1.5)


@both_norms
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.usefixtures("same_random_states")
def test_iterations_in_chunks_are_those_of_the_whole_bit_for_bit(norm, size):
    model, task = two_class_task(norm, n=8, eps={"l2": 0.75, "linf": 29 / 255}[norm])
    whole = run(HopSkipJump(), model, task, 500)
    parts = [run(HopSkipJump(), model, task.rows(rows), 500) for rows in torch.arange(8).split(size)]
    for field in ("fooled_at", "queries", "adversarial"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field
    assert len(whole.queries.unique()) > 4
    assert int(whole.queries.max()) > 200


def test_labels_are_all_there_is_to_see():
    model, task = two_class_task("l2")
    oracle = Oracle(model, task, 10)
    oracle(task.images)
    door = LabelOracle(oracle)
    assert [name for name in dir(door) if not name.startswith("_")] == ["live"]
    assert not [value for value in vars(door).values() if isinstance(value, torch.Tensor | Oracle | nn.Module)]
    shown = door(task.images)
    assert shown.dtype == torch.int64
    assert torch.equal(shown, task.labels)


def test_targets_are_refused():
    model, task = two_class_task("l2")
    aimed = Task.create(task.images, task.labels, targets=1 - task.labels, norm="l2", eps=1.0)
    with pytest.raises(ValueError, match="HopSkipJump is untargeted"):
        run(HopSkipJump(), model, aimed, 10)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"probes": 0}, "expected probes as a whole number >= 1, but got 0"),
        ({"probes": 20, "most_probes": 10}, "expected most_probes as a whole number >= 20, but got 10"),
        ({"gamma": 0}, "expected gamma > 0 and finite, but got 0"),
        ({"gamma": "1"}, "expected gamma > 0 and finite, but got '1'"),
        ({"gamma": math.inf}, "expected gamma > 0 and finite, but got inf"),
        ({"grain": -0.1}, r"expected grain in \[0, 1\].*got -0.1"),
        ({"grain": math.nan}, r"expected grain in \[0, 1\].*got nan"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        HopSkipJump(**chosen)
