"""Draws are pure functions of (seed, id, step, draw), and have the distribution they claim."""

import itertools
import math
from functools import partial

import pytest
import torch

import queryfoil as qf
from helpers import Linear, images, labels_of
from queryfoil import rng

DRAWS = {
    "bits": rng.bits,
    "uniform": rng.uniform,
    "integers": partial(rng.integers, high=10),
    "signs": rng.signs,
    "normal": rng.normal,
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)

IDS = torch.tensor([3, 0, 12345, 7, 2**40])


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def assert_even(counts):
    """Chi-square of equal cells within five standard deviations of its mean."""
    freedom = len(counts) - 1
    assert chi_square(counts.double()) < freedom + 5 * math.sqrt(2 * freedom)


@every_draw
def test_a_draw_does_not_depend_on_the_other_ids_of_the_batch(draw):
    whole = draw(5, IDS, step=9, draw=2, size=6)
    order = torch.tensor([4, 1, 0, 3, 2])
    assert torch.equal(draw(5, IDS[order], step=9, draw=2, size=6), whole[order])
    for i in range(len(IDS)):
        assert torch.equal(draw(5, IDS[i : i + 1], step=9, draw=2, size=6), whole[i : i + 1])


@every_draw
def test_a_step_for_each_row_gives_what_calls_for_single_rows_give(draw):
    steps = torch.tensor([0, 1, 1, 2500, 10**9])
    together = draw(5, IDS, step=steps, draw=2, size=6)
    alone = [draw(5, IDS[i : i + 1], step=int(steps[i]), draw=2, size=6) for i in range(len(IDS))]
    assert torch.equal(together, torch.cat(alone))


@every_draw
def test_the_shape_is_rows_by_size(draw):
    for size in (1, 2, 3, 784):
        assert draw(0, IDS, step=0, draw=0, size=size).shape == (5, size)


def test_bits_of_different_seeds_ids_steps_draws_and_places_all_differ():
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 100, 9999, 2**31, 2**40])
    names = itertools.product((-1, 0, 1, 2, 3, 2**33), (0, 1, 2, 3, 10, 2500), (0, 1, 2, 3, 4, 1 << 40))
    drawn = torch.cat([rng.bits(seed, ids, step, draw, size=20).flatten() for seed, step, draw in names])
    assert len(drawn.unique()) == len(drawn) == 43_200


def test_every_bit_is_set_half_of_the_time():
    drawn = rng.bits(0, torch.arange(20_000), step=0, draw=0)
    share = ((drawn >> torch.arange(64)) & 1).double().mean(0)
    assert float((share - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(20_000)


ALONG = {
    "ids": lambda: rng.uniform(0, torch.arange(20_000), 0, 0),
    "steps": lambda: rng.uniform(0, torch.zeros(20_000, dtype=torch.int64), torch.arange(20_000), 0),
    "places": lambda: rng.uniform(0, torch.zeros(1, dtype=torch.int64), 0, 0, size=20_000),
    "seeds": lambda: torch.cat([rng.uniform(seed, torch.tensor([4]), 0, 0) for seed in range(2000)]),
    "draws": lambda: torch.cat([rng.uniform(0, torch.tensor([4]), 0, draw) for draw in range(2000)]),
}


@pytest.mark.parametrize("along", ALONG.values(), ids=ALONG)
def test_uniform_is_even_in_0_to_1_along_each_of_its_names(along):
    u = along().flatten()
    n = len(u)
    assert u.dtype == torch.float64
    assert 0 <= float(u.min()) < 0.01 < 0.99 < float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    assert_even(torch.histc(u, 40, 0, 1))
    assert abs(correlation(u[:-1], u[1:])) < 4 / math.sqrt(n)


@pytest.mark.parametrize("high", [2, 7, 10, 224])
def test_integers_cover_their_range_evenly(high):
    drawn = rng.integers(1, torch.arange(500), step=3, draw=1, high=high, size=100)
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == high - 1
    assert_even(drawn.flatten().bincount(minlength=high))


def test_integers_below_one_are_zero():
    assert not bool(rng.integers(1, IDS, step=3, draw=1, high=1, size=100).any())


def test_signs_are_plus_and_minus_one_in_balance():
    drawn = rng.signs(2, torch.arange(1000), step=0, draw=0, size=100)
    assert drawn.dtype == torch.float32
    assert drawn.unique().tolist() == [-1, 1]
    assert abs(float(drawn.mean())) < 4 / math.sqrt(100_000)
    assert abs(correlation(drawn[:, :-1], drawn[:, 1:])) < 4 / math.sqrt(100_000)


def test_normals_have_the_normal_distribution():
    z = rng.normal(3, torch.arange(1000), step=0, draw=0, size=201).flatten()  # an odd size leaves half a pair
    n = len(z)
    assert z.dtype == torch.float32
    z = z.double()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * n)
    assert abs(float((z**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    below = torch.special.ndtr(z.sort().values)
    assert float((below - torch.arange(n) / n).abs().max()) < 1.95 / math.sqrt(n)  # Kolmogorov and Smirnov, p = 0.001


def test_normals_do_not_depend_on_their_neighbours():
    z = rng.normal(4, torch.arange(1000), step=0, draw=0, size=100).double()
    pairs = {
        "places": (z[:, :-1], z[:, 1:]),
        "rows": (z[:-1], z[1:]),
        "the two of one pair": (z[:, :50], z[:, 50:]),
        "steps": (z, rng.normal(4, torch.arange(1000), step=1, draw=0, size=100)),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < 4 / math.sqrt(50_000), name
        assert abs(correlation(a**2, b**2)) < 4 / math.sqrt(50_000), name


def noise(x, seed, ids, queries, calls=1):
    with rng.rows(seed, ids, queries):
        for _ in range(calls):
            drawn = rng.noise_like(x)
    return drawn


def test_noise_in_rows_is_a_function_of_seed_id_and_query():
    x, ids, queries = torch.zeros(5, 3, 4, 6), IDS, torch.tensor([1, 2, 3, 1, 1])
    whole = noise(x, 0, ids, queries)
    assert whole.shape == x.shape
    assert whole.dtype == x.dtype
    assert torch.equal(noise(x, 0, ids, queries), whole)
    order = torch.tensor([3, 1])
    assert torch.equal(noise(x[order], 0, ids[order], queries[order]), whole[order])
    for other in (noise(x, 1, ids, queries), noise(x, 0, ids + 1, queries), noise(x, 0, ids, queries + 1)):
        assert not bool((other == whole).flatten(1).all(1).any())


def test_the_second_noise_of_a_query_differs_from_the_first_and_is_reproducible():
    x, queries = torch.zeros(5, 1, 4, 4), torch.ones(5, dtype=torch.int64)
    second = noise(x, 0, IDS, queries, calls=2)
    assert not torch.equal(second, noise(x, 0, IDS, queries))
    assert torch.equal(second, noise(x, 0, IDS, queries, calls=2))


def test_noise_for_another_batch_than_the_oracle_sent_raises():
    with (
        rng.rows(0, IDS, torch.ones(5, dtype=torch.int64)),
        pytest.raises(ValueError, match=r"expected a batch of 5 rows.* got 4"),
    ):
        rng.noise_like(torch.zeros(4, 1, 2, 2))


def test_noise_outside_of_rows_is_fresh_each_time():
    x = torch.zeros(2, 1, 8, 8)
    first, second = rng.noise_like(x), rng.noise_like(x)
    assert first.shape == x.shape
    assert not bool((first == second).any())


def test_an_exception_in_rows_ends_them():
    x, queries = torch.zeros(5, 1, 2, 2), torch.ones(5, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"model fails"), rng.rows(0, IDS, queries):
        raise RuntimeError("model fails")
    assert not torch.equal(rng.noise_like(x), rng.noise_like(x))
    assert len(rng.noise_like(torch.zeros(3, 1, 2, 2))) == 3


@pytest.mark.usefixtures("same_random_states")
def test_an_attack_on_a_noisy_model_leaves_the_global_random_states_alone():
    x, model = images(4), Linear()
    result = qf.attack(qf.InputNoise(model), x, labels_of(model, x), budget=5)
    assert int(result.queries.max()) > 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 97, 3072])
def test_an_order_holds_every_number_once(size):
    for step in (0, 7):
        order = rng.permuted(5, torch.full((size,), 3), step, 2, torch.arange(size), size)
        assert torch.equal(order.sort().values, torch.arange(size))


def test_a_place_of_an_order_does_not_depend_on_the_batch():
    places, steps = torch.tensor([0, 3, 9, 9, 1]), torch.tensor([0, 0, 1, 2, 5])
    whole = rng.permuted(5, IDS, steps, 2, places, 10)
    for i in range(len(IDS)):
        assert int(rng.permuted(5, IDS[i : i + 1], int(steps[i]), 2, places[i : i + 1], 10)) == int(whole[i])


def test_orders_are_even_and_differ_by_seed_id_step_and_draw():
    ids, place = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    first, second = (rng.permuted(5, ids, 0, 2, place + i, 7) for i in (0, 1))
    assert_even(first.bincount(minlength=7))
    pairs = (7 * first + second).bincount(minlength=49).view(7, 7)
    assert int(pairs.diagonal().sum()) == 0
    assert_even(pairs[~torch.eye(7, dtype=torch.bool)])
    for other in ((6, 0, 2), (5, 1, 2), (5, 0, 3)):
        seed, step, draw = other
        again = rng.permuted(seed, ids, step, draw, place, 7)
        assert abs(float((again == first).double().mean()) - 1 / 7) < 0.02
