import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from queryfoil import metrics
from queryfoil.metrics.calibration import classwise_gap
from test_metrics import bins_by_loop, ece_by_loop, random_probs
from test_metrics_selective import two_classes


def calibrated(n, classes=4, seed=0):
    """Logits and labels drawn from their softmax."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, classes))
    probs = metrics.probabilities(logits, "logits")
    return logits, (rng.random((n, 1)) > probs.cumsum(1)).sum(1)


@pytest.mark.parametrize("bins", [1, 3, 15])
def test_the_root_mean_square_error_matches_the_formula(bins):
    probs, labels = random_probs()
    content = bins_by_loop(probs.max(1), probs.argmax(1) == labels, bins)
    expected = math.sqrt(sum(len(c) / len(labels) * (np.mean(c) - np.mean(h)) ** 2 for c, h in content if c))
    assert metrics.rms_calibration_error(probs, labels, bins) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0.5, 1), st.booleans()), min_size=1))
def test_mean_root_mean_square_and_maximum_are_in_order(pairs):
    data = two_classes(*zip(*pairs, strict=True))
    mean, rms, largest = (f(*data) for f in (metrics.ece, metrics.rms_calibration_error, metrics.mce))
    assert mean <= rms + 1e-12
    assert rms <= largest + 1e-12


def test_the_top_label_brier_score_is_not_that_of_all_classes():
    probs, labels = random_probs()
    right = probs.argmax(1) == labels
    assert metrics.top_label_brier(probs, labels) == pytest.approx(np.mean((probs.max(1) - right) ** 2), abs=1e-12)
    uniform = np.full((4, 4), 0.25)
    assert metrics.top_label_brier(uniform, [0, 1, 2, 3]) == pytest.approx((0.75**2 + 3 * 0.25**2) / 4)
    assert metrics.brier(uniform, [0, 1, 2, 3]) == pytest.approx(0.75)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_weights_of_the_classwise_error_repeat_images(threshold):
    probs, labels = random_probs(n=40)
    rows = metrics.bootstrap(40, draws=5)
    counts = np.stack([np.bincount(row, minlength=40) for row in rows]).astype(float)
    expected = [metrics.classwise_ece(probs[row], labels[row], threshold=threshold) for row in rows]
    np.testing.assert_allclose(classwise_gap(probs, labels, counts, 15, threshold), expected, atol=1e-12)


def test_the_lead_is_the_margin_of_the_logits():
    logits, _ = calibrated(50)
    first_two = np.sort(logits, 1)[:, :-3:-1]
    lead = metrics.lead(metrics.probabilities(logits, "logits"))
    np.testing.assert_allclose(lead, first_two[:, 0] - first_two[:, 1], atol=1e-9)
    assert metrics.lead([[0.5, 0.5], [0.0, 1.0]]).tolist() == [0, math.inf]
    with pytest.raises(ValueError, match="at least 2 classes"):
        metrics.lead([[1.0]])


def test_near_the_boundary_counts_what_is_strictly_below_the_bound():
    probs, labels = random_probs()
    margin = np.arange(300) / 100
    expected = ece_by_loop(probs.max(1)[:200], (probs.argmax(1) == labels)[:200])
    assert metrics.near_boundary_ece(probs, labels, margin) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(metrics.near_boundary_ece(probs, labels, margin, below=1.99))
    few = metrics.near_boundary_ece(probs, labels, margin, below=0.5, bins=4, at_least=50)
    assert few == pytest.approx(metrics.ece(probs[:50], labels[:50], bins=4))
    assert math.isnan(metrics.near_boundary_ece(probs, labels, margin + 3, at_least=0))


def test_a_calibrated_model_is_calibrated_near_the_boundary_and_a_sharpened_one_is_not():
    logits, labels = calibrated(20000)
    probs, sharp = (metrics.probabilities(t * logits, "logits") for t in (1, 2))
    lead = metrics.lead(probs)
    assert 0.2 < np.mean(lead < 2) < 0.8
    assert metrics.near_boundary_ece(probs, labels, lead) < 0.015
    assert metrics.near_boundary_ece(sharp, labels, lead) > 0.08


def test_a_margin_that_knows_the_label_is_refused():
    logits, labels = calibrated(300)
    probs = metrics.probabilities(logits, "logits")
    own = logits[np.arange(300), labels]
    others = np.where(np.eye(4)[labels] == 1, -np.inf, logits).max(1)
    with pytest.raises(ValueError, match=r"lead of the top class over the second, 0 or more, but got .* minimum -"):
        metrics.near_boundary_ece(probs, labels, own - others)


@pytest.mark.parametrize(
    ("margin", "below", "message"),
    [
        (np.ones(3), 2.0, r"expected raw_margin \(4,\), .* but got shape \(3,\)"),
        (np.full(4, math.nan), 2.0, r"expected raw_margin \(4,\)"),
        (np.zeros(0), 2.0, r"but got shape \(0,\)"),
        (np.ones(4), 0.0, "expected a bound above 0"),
        (np.ones(4), math.nan, "expected a bound above 0"),
    ],
)
def test_margins_that_make_no_sense_are_refused(margin, below, message):
    with pytest.raises(ValueError, match=message):
        metrics.near_boundary_ece([[0.6, 0.4]] * 4, [0, 0, 0, 1], margin, below)


def test_the_ece_by_chance_of_one_confidence_is_a_binomial_deviation():
    n, confidence = 100, 0.8
    hits = np.arange(n + 1)
    deviation, chance = np.abs(hits / n - confidence), binom.pmf(hits, n, confidence)
    value, low, high = metrics.ece_by_chance([[confidence, 1 - confidence]] * n, draws=4000)
    assert value == pytest.approx((deviation * chance).sum(), abs=0.001)
    assert low == pytest.approx(0)
    assert chance[deviation > high + 1e-9].sum() < 0.025 <= chance[deviation > high - 1e-9].sum()


def test_the_ece_by_chance_is_what_calibrated_models_show_and_an_overconfident_one_does_not():
    eces, below = [], 0
    for seed in range(40):
        logits, labels = calibrated(500, seed=seed)
        probs = metrics.probabilities(logits, "logits")
        eces.append(metrics.ece(probs, labels))
        found = metrics.ece_by_chance(probs, draws=200)
        below += found.low <= eces[-1] <= found.high
        sharp = metrics.probabilities(2 * logits, "logits")
        assert metrics.ece(sharp, labels) > metrics.ece_by_chance(sharp, draws=50).high
    assert 34 <= below <= 40
    assert found.value == pytest.approx(np.mean(eces), rel=0.15)
    assert metrics.ece_by_chance(probs, draws=50) == metrics.ece_by_chance(probs, draws=50)
    assert metrics.ece_by_chance(probs, draws=50) != metrics.ece_by_chance(probs, draws=50, seed=1)
