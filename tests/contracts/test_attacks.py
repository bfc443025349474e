"""What every attack of the registry must do. An attack joins by being registered."""

import dataclasses

import pytest
import torch
from torch import nn

from helpers import Linear, Watch, images, labels_of, levels
from queryfoil.attacks import ATTACKS, build
from queryfoil.attacks.blind_square import BlindSquare
from queryfoil.attacks.rays import RayS
from queryfoil.attacks.signhunter import SignHunter
from queryfoil.losses import LOSSES
from queryfoil.metrics import NEVER
from queryfoil.oracle import quantize
from queryfoil.run import run
from queryfoil.task import NORMS, Task, length

EPS = {"linf": 8 / 255, "l2": 0.25}  # some of 8 x 8 images are fooled within the queries of a test, not all
HYPER = {  # so that attacks made for larger images and budgets get somewhere here
    "nes": {"pairs": 3},
    "nes-l2": {"lr": 0.1},
    "hopskipjump": {"probes": 8},
    "signopt": {"turns": 20},
    "surfree": {"low": 1.0},
    "cgba": {"probes": 8, "reduction": 1.0},
    "querynet": {"steps": 2, "batch": 16, "width": 4},
    "bandits": {"lr": 3 / 255, "prior_lr": 0.1},
    "bandits-l2": {"lr": 0.05, "probe": 0.1, "exploration": 0.1},
}
NEAR = {"linf": 1.3, "l2": 1.6}  # of the distance of a linear model, where 15 of 16 fall within 2,000 queries


def enough(attack, queries):
    """As many queries, and more for an attack that sees labels alone."""
    return queries if attack.loss is not None else 6 * queries


WITHOUT_DRAWS = (SignHunter, RayS)
BLIND = (BlindSquare,)  # attacks that use no answer, so that chance is all they have
TRAINING = {"querynet"}  # attacks that train networks at every query: their contract is for `make test-all`
SLOW = pytest.mark.slow


def attack_of(name, norm):
    return build(name, norm=norm, **{**HYPER.get(name, {}), **HYPER.get(f"{name}-{norm}", {})})


KINDS = [
    pytest.param(attack_of(name, norm), norm, id=f"{name}-{norm}", marks=SLOW if name in TRAINING else ())
    for name, kind in ATTACKS.items()
    for norm in kind.norms
]
ROWWISE = [p for p in KINDS if p.values[0].rowwise]
WITH_SCORES = [p for p in KINDS if p.values[0].loss is not None]
SEEING = [p for p in KINDS if not isinstance(p.values[0], BLIND)]
TARGETABLE = [p for p in KINDS if p.values[0].targetable]

every_attack = pytest.mark.parametrize(("attack", "norm"), KINDS)
every_seeing_attack = pytest.mark.parametrize(("attack", "norm"), SEEING)
every_rowwise_attack = pytest.mark.parametrize(("attack", "norm"), ROWWISE)


def right_task(model, x, norm, **other):
    """A task whose images are all right at the start."""
    return Task.create(x, labels_of(model, x), **{"norm": norm, "eps": EPS[norm], **other})


def some_wrong(model, x, norm, **other):
    """A task with every fifth image wrong from the start."""
    labels = labels_of(model, x)
    labels[::5] = (labels[::5] + 1) % 10
    return Task.create(x, labels, ids=torch.arange(len(x)) * 7 + 100, norm=norm, eps=EPS[norm], **other)


def fooled(result):
    """Which images the attack fooled (N,), without those that were wrong from the start."""
    return (result.fooled_at > 1) & (result.fooled_at < NEVER)


def assert_in_the_ball(task, x):
    """The ball is checked before the floor to 8 bits, which moves each value by less than 1/255."""
    floored = 0 if task.norm == "linf" else x[0].numel() ** 0.5 / 255
    size = {"linf": length_inf, "l2": length}[task.norm](x - task.images)
    assert bool((size <= task.eps + floored + 1e-6).all())


def length_inf(delta):
    return delta.abs().flatten(1).amax(1)


def assert_replays(model, task, result):
    """Every recorded success reaches the goal again, is inside the ball and on the 8-bit grid."""
    rows = fooled(result)
    won = task.rows(rows)
    x = result.adversarial[rows]
    assert bool((won.margin(model(x)) <= 0).all())
    assert_in_the_ball(won, x)
    levels(x)
    assert torch.equal(result.queries[rows], result.fooled_at[rows])
    lost = task.rows(result.fooled_at == NEVER)
    assert torch.equal(result.adversarial[result.fooled_at == NEVER], lost.images)


def assert_same(one, other):
    for field in ("fooled_at", "queries", "adversarial", "clean_scores"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


@every_attack
@pytest.mark.parametrize("budget", [1, 2, 3, 40])
def test_the_budget_is_exact_at_the_models_door(attack, norm, budget):
    model = Watch(Linear(lead=100))  # never fooled
    result = run(attack, model, right_task(model.model, images(6), norm), budget)
    assert sum(map(len, model.batches)) == 6 * budget
    assert result.queries.tolist() == [budget] * 6
    assert result.fooled_at.tolist() == [NEVER] * 6


@every_attack
def test_a_fooled_image_costs_its_queries_and_the_others_the_budget(attack, norm):
    model, asked = Linear(), []
    task = some_wrong(model, images(30), norm)
    result = run(attack, model, task, 60, observe=lambda ids, queries, sent, scores: asked.append((ids, queries)))
    assert 1 <= int(fooled(result).sum()) < 24  # both kinds occur
    assert torch.equal(result.queries, result.fooled_at.clamp(max=60))
    ids, queries = (torch.cat(column) for column in zip(*asked, strict=True))
    for i, spent in zip(task.ids, result.queries, strict=True):
        assert queries[ids == i].tolist() == list(range(1, int(spent) + 1))


@every_rowwise_attack
@pytest.mark.parametrize("size", [1, 7])
def test_a_run_in_chunks_is_the_whole_run_bit_for_bit(attack, norm, size):
    model = Linear()
    task = some_wrong(model, images(20), norm)
    whole = run(attack, model, task, enough(attack, 40))
    parts = [run(attack, model, task.rows(rows), enough(attack, 40)) for rows in torch.arange(20).split(size)]
    for field in ("fooled_at", "queries", "adversarial", "clean_scores"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field
    assert len(whole.fooled_at.unique()) > 3


@every_rowwise_attack
def test_chunks_of_the_shipped_network_are_the_whole_run_bit_for_bit(attack, norm, network, clothes):
    some = clothes[:9]
    task = Task.create(some.images, some.labels, some.ids, norm=norm, eps=4 * EPS[norm])
    whole = run(attack, network, task, 12)
    parts = [run(attack, network, task.rows(rows), 12) for rows in (slice(0, 1), slice(1, 9))]
    for field in ("fooled_at", "queries", "adversarial"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field
    # the network's own sums depend on the size of the batch in the last bit
    torch.testing.assert_close(whole.clean_scores, torch.cat([part.clean_scores for part in parts]))


@every_rowwise_attack
def test_dropping_finished_rows_changes_nothing(attack, norm):
    model = Linear()
    task = right_task(model, images(24), norm)
    dropping = run(attack, model, task, enough(attack, 80))
    keeping = run(type("Keeping", (type(attack),), {"rowwise": False})(**vars(attack)), model, task, enough(attack, 80))
    assert_same(dropping, keeping)
    assert int(fooled(dropping).sum()) >= 12  # so rows were dropped


@pytest.mark.parametrize(("attack", "norm"), WITH_SCORES)
@pytest.mark.parametrize("loss", LOSSES)
def test_with_every_loss_some_images_are_fooled_and_replay(attack, norm, loss):
    model = Linear()
    task = right_task(model, images(30), norm, loss=loss)
    result = run(attack, model, task, 60)
    assert int(fooled(result).sum()) >= 3
    assert_replays(model, task, result)


@pytest.mark.parametrize(("attack", "norm"), TARGETABLE)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_targeted_attack_reaches_its_targets(attack, norm, loss):
    model = Linear()
    x = images(30)
    targets = model(x).topk(2).indices[:, 1]
    task = right_task(model, x, norm, targets=targets, loss=loss)
    result = run(attack, model, task, 60)
    rows = fooled(result)
    assert int(rows.sum()) >= 3
    shown = model(result.adversarial[rows])
    assert torch.equal(shown.gather(1, targets[rows, None]).squeeze(1), shown.amax(1))  # a tie counts
    assert_replays(model, task, result)


@every_attack
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 6, 10), (3, 11, 5)], ids=str)
def test_grey_and_colour_images_of_any_shape_are_attacked(attack, norm, shape, classes):
    model = Linear(shape, classes)
    task = right_task(model, images(30, shape), norm)
    result = run(attack, model, task, enough(attack, 60))
    assert int(fooled(result).sum()) >= 3
    assert_replays(model, task, result)


@every_attack
def test_one_image_is_enough(attack, norm):
    model = Linear()
    x = images(30)
    near = model(x).topk(2).values.diff(dim=1).abs().argmin()  # the smallest margin
    task, watched = right_task(model, x[near : near + 1], norm), Watch(model)
    result = run(attack, watched, task, 60)
    assert fooled(result).tolist() == [True]
    assert_replays(model, task, result)
    assert [len(batch) for batch in watched.batches] == [1] * int(result.queries)


@every_attack
def test_images_that_are_all_wrong_cost_one_query_each(attack, norm):
    model = Watch(Linear())
    x = images(6)
    wrong = (labels_of(model.model, x) + 1) % 10
    result = run(attack, model, Task.create(x, wrong, norm=norm, eps=EPS[norm]), 50)
    assert [len(batch) for batch in model.batches] == [6]
    assert result.queries.tolist() == result.fooled_at.tolist() == [1] * 6
    assert result.accuracy(1) == result.accuracy() == 0


class Touchy(nn.Module):
    """Says 0 for an even grey of 128, and 1 as soon as any value differs."""

    def forward(self, x):
        moved = ((x * 255).round() != 128).flatten(1).any(1).float()
        return torch.stack([1 - moved, moved], 1)


@pytest.mark.parametrize(("attack", "norm"), WITH_SCORES)
def test_images_that_are_all_fooled_at_once_end_the_run(attack, norm):
    model = Watch(Touchy())
    task = right_task(model.model, images(6, low=128, high=128), norm, eps=4 * EPS[norm])
    result = run(attack, model, task, 50)
    assert result.fooled_at.tolist() == result.queries.tolist() == [2] * 6
    assert len(model.batches) == 2
    assert_replays(model.model, task, result)


DISTANCE = {"linf": 20 / 255, "l2": 0.5}


@torch.no_grad()
def at_the_same_distance(norm):
    """A linear two-class model and 16 images, all well inside [0, 1], about DISTANCE from its boundary.

    The smallest change that fools is the margin over the dual norm of the weights; here it is at most
    DISTANCE, and more than 0.95 DISTANCE.
    """
    model = Linear(classes=2)
    weight = (model.weight[0] - model.weight[1]) * 255 / 1024
    best = weight.sign() if norm == "linf" else weight / weight.norm()  # the change that moves the margin most
    dual = float(weight @ best)
    x = images(16, low=100, high=150)
    wanted = torch.tensor([1.0, -1.0]).repeat(8) * 0.975 * DISTANCE[norm] * dual
    steps = (wanted - model(x) @ torch.tensor([1.0, -1.0])) / dual
    x += (steps[:, None] * best).view(x.shape)
    x = (x * 255 + torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).floor() / 255
    distance = model(x).diff(dim=1).abs() / dual
    assert bool(((0.95 * DISTANCE[norm] < distance) & (distance <= DISTANCE[norm])).all())
    assert 0.2 < float(x.min()) < float(x.max()) < 0.8
    return model, x


@every_seeing_attack
def test_it_comes_near_the_closed_form_of_a_linear_model(attack, norm):
    model, x = at_the_same_distance(norm)
    task = right_task(model, x, norm, eps=NEAR[norm] * DISTANCE[norm])
    result = run(attack, model, task, 2000)
    assert int(fooled(result).sum()) >= 15
    assert_replays(model, task, result)


@every_attack
def test_no_image_falls_below_the_closed_form_of_a_linear_model(attack, norm):
    model, x = at_the_same_distance(norm)
    result = run(attack, model, right_task(model, x, norm, eps=0.95 * DISTANCE[norm]), 400)
    assert int(fooled(result).sum()) == 0


@torch.no_grad()
def fallen_to_random_corners(model, task, queries):
    """How many images fall to as many independent random points on the surface of the ball."""
    generator = torch.Generator().manual_seed(0)
    reached = torch.zeros(len(task.images), dtype=torch.bool)
    for _ in range(queries):
        signs = torch.randint(0, 2, task.images.shape, generator=generator) * 2.0 - 1
        reached |= task.margin(model(quantize(task.project(task.images + signs)))) <= 0
    return int(reached.sum())


@every_seeing_attack
def test_it_beats_random_corners_of_the_ball_at_equal_budget(attack, norm):
    model, x = at_the_same_distance(norm)
    task = right_task(model, x, norm, eps=1.8 * DISTANCE[norm])
    by_chance = fallen_to_random_corners(model, task, 499)
    assert by_chance <= 8
    assert int(fooled(run(attack, model, task, 500)).sum()) >= by_chance + 6


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        pytest.param(kind, norm, id=f"{name}-{norm}")
        for name, kind in ATTACKS.items()
        for norm in NORMS
        if norm not in kind.norms
    ],
)
def test_an_unsupported_norm_raises_before_any_query(kind, norm):
    model = Watch(Linear())
    with pytest.raises(ValueError, match=f"{kind.__name__} supports norm .* but got '{norm}'"):
        run(kind(), model, Task.create(images(2), torch.tensor([0, 1]), norm=norm), 50)
    assert model.batches == []


@pytest.mark.parametrize("kind", ATTACKS.values(), ids=ATTACKS)
def test_it_is_a_frozen_value_that_names_its_hyper_parameters(kind):
    attack = kind()
    assert attack == kind()
    assert set(kind.norms) <= set(NORMS)
    assert kind.norms
    for field in dataclasses.fields(attack):
        assert f"{field.name}={getattr(attack, field.name)!r}" in repr(attack)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(attack, field.name, None)


@every_attack
@pytest.mark.usefixtures("same_random_states")
def test_it_neither_reads_nor_changes_the_global_random_states(attack, norm):
    model = Linear()
    task = right_task(model, images(8), norm)
    state = torch.get_rng_state()
    try:
        torch.rand(1)  # which gives another global state
        first = run(attack, model, task, 30)
    finally:
        torch.set_rng_state(state)
    assert_same(first, run(attack, model, task, 30))


@pytest.mark.parametrize(("attack", "norm"), [p for p in KINDS if not isinstance(p.values[0], WITHOUT_DRAWS)])
def test_another_seed_gives_another_course(attack, norm):
    model = Linear()
    first, second = (run(attack, model, right_task(model, images(30), norm, seed=seed), 60) for seed in (0, 1))
    assert not torch.equal(first.fooled_at, second.fooled_at)
