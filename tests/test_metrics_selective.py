import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from queryfoil import metrics
from test_metrics import random_probs

EXAMPLES = settings(deadline=None, max_examples=60)
FIGURES = [
    metrics.auroc,
    metrics.fpr_at_95_tpr,
    metrics.aupr_of_errors,
    metrics.aurc,
    metrics.e_aurc,
    metrics.risk_at,
]
answers = st.lists(st.tuples(st.integers(0, 4).map(lambda k: 0.6 + k / 10), st.booleans()), min_size=1, max_size=12)


def two_classes(confidences, hits):
    """Probabilities of two classes whose first is the top, and labels: 0 where that is right."""
    confidences = np.asarray(confidences, dtype=float)
    return np.stack([confidences, 1 - confidences], 1), 1 - np.asarray(hits, dtype=int)


def tied_probs(seed=0, digits=2):
    """Probabilities with many equal top confidences; right more often where these are high."""
    rng = np.random.default_rng(seed)
    confidences = rng.uniform(0.55, 1, 400).round(digits)
    return two_classes(confidences, rng.random(400) < confidences)


def aurc_over_all_orders(confidences, hits):
    """Mean over all orders of tied images, by trying every order of all images that is sorted."""
    totals = []
    for order in itertools.permutations(range(len(hits))):
        if all(confidences[a] >= confidences[b] for a, b in itertools.pairwise(order)):
            wrong = np.cumsum([not hits[i] for i in order])
            totals.append(np.mean(wrong / np.arange(1, len(hits) + 1)))
    return np.mean(totals)


@pytest.mark.parametrize("data", [random_probs(), tied_probs(), tied_probs(digits=1)], ids=["none", "some", "many"])
def test_telling_right_from_wrong_agrees_with_scikit_learn_with_and_without_ties(data):
    probs, labels = data
    top, right = probs.max(1), probs.argmax(1) == labels
    assert metrics.auroc(probs, labels) == pytest.approx(roc_auc_score(right, top), abs=1e-12)
    assert metrics.aupr_of_errors(probs, labels) == pytest.approx(average_precision_score(~right, -top), abs=1e-12)
    fpr, tpr, _ = roc_curve(right, top, drop_intermediate=False)
    assert metrics.fpr_at_95_tpr(probs, labels) == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12)


@EXAMPLES
@given(answers)
def test_auroc_is_the_share_of_pairs_in_order_with_ties_half(pairs):
    right, wrong = ([c for c, hit in pairs if hit == wanted] for wanted in (True, False))
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
    expected = sum(won) / len(won) if won else math.nan
    assert metrics.auroc(*two_classes(*zip(*pairs, strict=True))) == pytest.approx(expected, nan_ok=True)


@settings(deadline=None, max_examples=25)
@given(answers.map(lambda pairs: pairs[:6]))
def test_aurc_is_the_mean_over_all_orders_of_tied_images(pairs):
    confidences, hits = zip(*pairs, strict=True)
    assert metrics.aurc(*two_classes(confidences, hits)) == pytest.approx(aurc_over_all_orders(confidences, hits))


def test_the_risks_of_three_tied_images_by_hand():
    probs, labels = two_classes([0.9, 0.8, 0.8, 0.8, 0.7], [0, 1, 0, 1, 1])
    coverage, risk = metrics.risk_coverage(probs, labels)
    np.testing.assert_allclose(coverage, [0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(risk, [1, (1 + 1 / 3) / 2, (1 + 2 / 3) / 3, 2 / 4, 2 / 5])


@EXAMPLES
@given(answers)
def test_the_excess_is_at_least_nothing_and_the_order_of_the_images_does_not_matter(pairs):
    probs, labels = two_classes(*zip(*pairs, strict=True))
    assert metrics.e_aurc(probs, labels) >= -1e-15
    for figure in FIGURES:
        assert figure(probs[::-1], labels[::-1]) == pytest.approx(figure(probs, labels), nan_ok=True)


def test_a_perfect_order_has_no_excess_whatever_the_error_rate():
    for n, errors in itertools.product((7, 100), (0, 1, 3, 7)):
        hits = np.arange(n) < n - errors
        probs, labels = two_classes(np.linspace(0.99, 0.51, n), hits)
        assert metrics.e_aurc(probs, labels) == 0
        if 0 < errors < n:
            assert metrics.auroc(probs, labels) == 1
            assert metrics.fpr_at_95_tpr(probs, labels) == 0
            assert metrics.aupr_of_errors(probs, labels) == 1
            assert metrics.auroc(probs, 1 - labels) == 0


def test_the_least_area_tends_to_its_closed_form():
    n, error = 20000, 0.2
    probs, labels = two_classes(np.linspace(0.99, 0.51, n), np.arange(n) < (1 - error) * n)
    assert metrics.aurc(probs, labels) == pytest.approx(error + (1 - error) * math.log(1 - error), abs=1e-4)


def test_a_constant_confidence_tells_nothing():
    probs, labels = two_classes([0.8] * 50, np.arange(50) < 40)
    assert metrics.auroc(probs, labels) == 0.5
    assert metrics.aurc(probs, labels) == pytest.approx(0.2)
    assert metrics.aupr_of_errors(probs, labels) == pytest.approx(0.2)
    assert metrics.risk_at(probs, labels) == pytest.approx(0.2)
    assert metrics.fpr_at_95_tpr(probs, labels) == 1


def test_only_the_order_counts():
    probs, labels = tied_probs()
    squeezed = two_classes(0.9 + probs[:, 0] / 20, 1 - labels)
    for figure in FIGURES:
        assert figure(*squeezed) == pytest.approx(figure(probs, labels))
    assert metrics.ece(*squeezed) > metrics.ece(probs, labels) + 0.1


def test_all_right_and_all_wrong_have_nothing_to_tell_apart():
    probs, right = two_classes([0.9, 0.8, 0.7], [1, 1, 1])
    for figure in (metrics.auroc, metrics.fpr_at_95_tpr):
        assert math.isnan(figure(probs, right))
        assert math.isnan(figure(probs, 1 - right))
    assert math.isnan(metrics.aupr_of_errors(probs, right))
    assert metrics.aupr_of_errors(probs, 1 - right) == 1
    assert (metrics.aurc(probs, right), metrics.aurc(probs, 1 - right)) == (0, 1)
    assert (metrics.e_aurc(probs, right), metrics.e_aurc(probs, 1 - right)) == (0, 0)


def test_nineteen_of_twenty_right_answers_are_95_percent():
    hits = [1] * 19 + [0] + [1] + [0]
    probs, labels = two_classes(np.linspace(0.99, 0.51, 22), hits)
    assert metrics.fpr_at_95_tpr(probs, labels) == 0
    assert metrics.fpr_at_95_tpr(*two_classes([*np.linspace(0.99, 0.6, 18), 0.55, 0.55, 0.52, 0.51], hits)) == 0.5


def test_a_coverage_is_the_fewest_images_that_reach_it():
    probs, labels = two_classes(np.linspace(0.99, 0.51, 100), np.arange(100) < 55)
    assert metrics.risk_at(probs, labels, 0.55) == 0  # 0.55 * 100 > 55 in binary
    assert metrics.risk_at(probs, labels, 0.551) == pytest.approx(1 / 56)
    assert metrics.risk_at(probs, labels, 1.0) == pytest.approx(0.45)
    assert metrics.risk_at(probs, labels) == pytest.approx(25 / 80)
    for coverage in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="expected a coverage above 0 and up to 1"):
            metrics.risk_at(probs, labels, coverage)


def test_levels_are_as_wide_as_the_tolerance_and_do_not_chain():
    tops = np.array([0.5, 0.5 + 0.75e-6, 0.5 + 1.5e-6, 0.5 + 2.25e-6, 0.9, 0.9])
    probs, _ = two_classes(tops, np.ones(6))
    assert metrics.confidence_levels(probs) == 3
    assert metrics.confidence_levels(probs, tolerance=0) == 5
    assert metrics.confidence_levels(probs, tolerance=1) == 1
    with pytest.raises(ValueError, match="tolerance of 0 or more, but got -1"):
        metrics.confidence_levels(probs, tolerance=-1)


def test_rounded_scores_have_few_levels_and_many_ties():
    fine, _ = tied_probs(digits=12)
    coarse, _ = tied_probs(digits=2)
    assert metrics.confidence_levels(fine) == 400
    assert metrics.tied_share(fine) == 0
    assert metrics.confidence_levels(coarse) == len({round(float(c), 9) for c in coarse.max(1)}) <= 46
    expected = np.mean([np.sum(coarse[:, 0] == c) > 1 for c in coarse[:, 0]])
    assert metrics.tied_share(coarse) == pytest.approx(expected)
    assert expected > 0.9
    assert metrics.tied_share(two_classes([0.9, 0.8, 0.9, 0.7], np.ones(4))[0]) == 0.5


@pytest.mark.parametrize("figure", [*FIGURES, metrics.risk_coverage])
def test_what_is_not_probabilities_and_labels_is_refused(figure):
    with pytest.raises(ValueError, match="turn logits into probabilities"):
        figure([[4.0, -1.0]], [0])
    with pytest.raises(ValueError, match=r"labels in 0\.\.1, but got 2\.\.2"):
        figure([[0.5, 0.5]], [2])


@pytest.mark.parametrize("figure", [metrics.confidence_levels, metrics.tied_share, metrics.ece_by_chance, metrics.lead])
def test_what_is_not_probabilities_is_refused(figure):
    with pytest.raises(ValueError, match="turn logits into probabilities"):
        figure([[4.0, -1.0]])
    with pytest.raises(ValueError, match=r"expected probs \(N, K\)"):
        figure([0.5, 0.5])
    with pytest.raises(ValueError, match=r"but got \(0, 2\)"):
        figure(np.zeros((0, 2)))
