import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from queryfoil import metrics
from queryfoil.defenses.disguise import disguise
from test_metrics import random_probs

rows = st.integers(2, 4).flatmap(lambda k: st.tuples(*[st.lists(st.integers(0, 3), min_size=k, max_size=k)] * 2))


def kept_by_trying(shown, raw, k):
    """Is there an undefended order whose first k classes are each shown strictly above all that were below them?"""
    classes = range(len(raw))
    for order in itertools.permutations(classes):
        is_order = all(raw[a] >= raw[b] for a, b in itertools.pairwise(order))
        if is_order and all(shown[a] > shown[b] for a in order[:k] for b in classes if raw[a] > raw[b]):
            return True
    return False


@settings(deadline=None, max_examples=200)
@given(rows)
def test_an_order_is_kept_if_one_that_was_there_still_is(row):
    shown, raw = row
    for k in range(1, len(raw) + 1):
        assert metrics.rank_kept([shown], [raw], k) == kept_by_trying(shown, raw, k)
    assert metrics.rank_kept([shown], [raw]) == kept_by_trying(shown, raw, len(raw))
    opposed = any((shown[a] - shown[b]) * (raw[a] - raw[b]) < 0 for a in range(len(raw)) for b in range(a))
    assert metrics.rank_reversed([shown], [raw]) == opposed


def test_the_first_classes_by_hand():
    raw = [[5.0, 4.0, 3.0, 2.0, 1.0]] * 5
    shown = [
        [9, 8, 7, 6, 5],  # as it was
        [9, 8, 7, 5, 6],  # the last two exchanged
        [9, 7, 8, 6, 5],  # the second and third
        [8, 9, 7, 6, 5],  # the first two
        [9, 0, 0, 0, 0],  # the label alone
    ]
    assert [metrics.rank_kept(shown, raw, k) for k in (1, 2, 3, 4, 5, None)] == [0.8, 0.4, 0.4, 0.2, 0.2, 0.2]


def test_a_tie_for_the_top_is_no_order_in_either_place():
    assert metrics.rank_kept([[1.0, 1.0]], [[2.0, 1.0]], 1) == 0
    assert metrics.rank_kept([[1.0, 1.0]], [[1.0, 2.0]], 1) == 0
    assert metrics.rank_kept([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1.0, 1.0]] * 3, 1) == 1


def test_log_probabilities_of_minus_infinity_tie():
    raw = [[0.0, -1.0, -2.0, -math.inf]]
    shown = [[0.0, -1.0, -math.inf, -math.inf]]
    assert [metrics.rank_kept(shown, raw, k) for k in (1, 2, 3)] == [1, 1, 0]
    expected = kendalltau([3, 2, 1, 1], [3, 2, 1, 0])
    assert metrics.kendall(shown, raw) == pytest.approx(expected.statistic)


@pytest.mark.parametrize(("metric", "witness"), [(metrics.spearman, spearmanr), (metrics.kendall, kendalltau)])
def test_correlations_agree_with_scipy_with_ties(metric, witness):
    rng = np.random.default_rng(0)
    shown, raw = rng.integers(0, 5, (2, 60, 7)).astype(float)
    shown, raw = (np.hstack([v, np.tile([0.0, 9.0], (60, 1))]) for v in (shown, raw))  # none all tied
    expected = np.mean([witness(s, r).statistic for s, r in zip(shown, raw, strict=True)])
    assert metric(shown, raw) == pytest.approx(expected, abs=1e-12)
    assert metric(shown, -shown) == pytest.approx(-1)
    assert metric(shown, shown) == pytest.approx(1)


@pytest.mark.parametrize("metric", [metrics.spearman, metrics.kendall])
def test_all_tied_shows_nothing_and_what_was_all_tied_is_left_out(metric):
    assert metric([[1.0, 1.0], [2.0, 1.0]], [[2.0, 1.0], [2.0, 1.0]]) == 0.5
    assert metric([[1.0, 2.0], [2.0, 1.0]], [[1.0, 1.0], [2.0, 1.0]]) == 1
    assert math.isnan(metric([[1.0, 2.0]], [[1.0, 1.0]]))
    assert math.isnan(metric([[1.0]], [[1.0]]))


def test_the_kind_of_the_scores_does_not_matter():
    probs, _ = random_probs()
    shuffled = probs[::-1]
    for metric in (metrics.rank_kept, metrics.spearman, metrics.kendall):
        assert metric(np.log(shuffled), probs) == metric(shuffled, np.log(probs)) == metric(shuffled, probs)
    assert metrics.rank_kept(torch.tensor(probs), probs.tolist()) == 1


def test_exact_aaa_reverses_no_order_but_ties_some_and_adam_reverses_some():
    logits = 3 * torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    exact, adam = disguise(logits), disguise(logits, solver="adam")
    assert metrics.rank_reversed(exact, logits) == 0
    assert metrics.rank_kept(exact, logits, 1) == 1
    tied = (np.diff(np.sort(exact.numpy(), 1), axis=1) == 0).any(1)
    assert metrics.rank_kept(exact, logits) == pytest.approx(1 - tied.mean())
    assert 0.1 < tied.mean() < 0.9
    assert metrics.rank_reversed(adam, logits) > 0.1
    assert metrics.rank_kept(-logits, logits, 1) == 0
    assert metrics.rank_reversed(-logits, logits) == 1
    assert metrics.spearman(-logits, logits) == pytest.approx(-1)


@pytest.mark.parametrize("metric", [metrics.rank_kept, metrics.rank_reversed, metrics.spearman, metrics.kendall])
def test_scores_that_do_not_belong_together_are_refused(metric):
    with pytest.raises(ValueError, match=r"of the same images, but got \(1, 2\) and \(1, 3\)"):
        metric([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"\(N, K\) of the same images, but got \(2,\) and \(2,\)"):
        metric([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="but got NaN"):
        metric([[1.0, math.nan]], [[1.0, 2.0]])


@pytest.mark.parametrize("k", [0, 3])
def test_more_classes_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"expected k from 1 to 2, the number of classes, or None, but got {k}"):
        metrics.rank_kept([[1.0, 2.0]], [[1.0, 2.0]], k)
