import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import log_loss

from queryfoil import metrics

NEVER = 2**62
EXAMPLES = settings(deadline=None, max_examples=60)
records = st.lists(st.integers(1, 30) | st.just(NEVER), min_size=1, max_size=30)
budgets = st.integers(1, 32)


def random_probs(n=300, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, classes)) * 2
    probs = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return probs, rng.integers(0, classes, n)


def probs_with_top(confidences, classes=20):
    """Rows whose first entry is the confidence and whose others share the rest."""
    rest = (1 - np.asarray(confidences)[:, None]) / (classes - 1)
    return np.hstack([np.asarray(confidences)[:, None], np.repeat(rest, classes - 1, 1)])


def bins_by_loop(confidences, hits, bins):
    """For each right-closed bin (b/bins, (b+1)/bins] the confidences and hits in it; 0 joins the first."""
    content = []
    for b in range(bins):
        inside = [i for i, c in enumerate(confidences) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        content.append(([float(confidences[i]) for i in inside], [float(hits[i]) for i in inside]))
    return content


def ece_by_loop(confidences, hits, bins=15):
    total = 0.0
    for c, h in bins_by_loop(confidences, hits, bins):
        if c:
            total += len(c) / len(confidences) * abs(sum(h) / len(h) - sum(c) / len(c))
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_ece_and_reliability_match_the_formula(bins):
    probs, labels = random_probs()
    top, hits = probs.max(1), probs.argmax(1) == labels
    assert metrics.ece(probs, labels, bins) == pytest.approx(ece_by_loop(top, hits, bins), abs=1e-12)
    size, confidence, accuracy = metrics.reliability(probs, labels, bins)
    for b, (c, h) in enumerate(bins_by_loop(top, hits, bins)):
        assert size[b] == len(c)
        assert confidence[b] == pytest.approx(np.mean(c) if c else math.nan, nan_ok=True)
        assert accuracy[b] == pytest.approx(np.mean(h) if h else math.nan, nan_ok=True)


@pytest.mark.parametrize("bins", [2, 10, 15])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(bins):
    edges = np.arange(bins + 1) / bins
    assert metrics.bin_index(edges, bins).tolist() == [0, *range(bins)]
    assert metrics.bin_index(np.nextafter(edges[:-1], 2), bins).tolist() == list(range(bins))
    hits = np.arange(bins + 1) % 2 == 0
    assert metrics.binned_gap(edges, hits, bins) == pytest.approx(ece_by_loop(edges, hits, bins), abs=1e-12)
    probs = probs_with_top(edges[1:])
    size, confidence, _ = metrics.reliability(probs, np.zeros(bins, dtype=int), bins)
    assert size.tolist() == [1] * bins
    np.testing.assert_array_equal(confidence, edges[1:])


@EXAMPLES
@given(st.lists(st.tuples(st.integers(0, 15).map(lambda k: k / 15) | st.floats(0, 1), st.booleans()), min_size=1))
def test_binned_gap_matches_the_formula_for_any_confidences(pairs):
    confidences, hits = (np.array(column) for column in zip(*pairs, strict=True))
    assert metrics.binned_gap(confidences, hits) == pytest.approx(ece_by_loop(confidences, hits), abs=1e-9)


def test_binned_gap_takes_leading_dimensions():
    rng = np.random.default_rng(0)
    confidences, hits = rng.random((2, 3, 50)), rng.random((2, 3, 50)) < 0.5
    gaps, gaps_of_shared = metrics.binned_gap(confidences, hits), metrics.binned_gap(confidences, hits[0, 0])
    assert gaps.shape == gaps_of_shared.shape == (2, 3)
    for i in np.ndindex(2, 3):
        assert gaps[i] == pytest.approx(ece_by_loop(confidences[i], hits[i]))
        assert gaps_of_shared[i] == pytest.approx(ece_by_loop(confidences[i], hits[0, 0]))


@pytest.mark.parametrize("bins", [1, 3, 15])
def test_the_maximum_calibration_error_is_the_largest_gap_of_a_bin(bins):
    probs, labels = random_probs()
    content = bins_by_loop(probs.max(1), probs.argmax(1) == labels, bins)
    expected = max(abs(np.mean(c) - np.mean(h)) for c, h in content if c)
    assert metrics.mce(probs, labels, bins) == pytest.approx(expected)


@pytest.mark.parametrize("bins", [1, 4, 7, 15])
def test_adaptive_bins_hold_equally_many_images(bins):
    probs, labels = random_probs()
    right = np.argsort(np.argsort(probs.max(1))) // 10 % 2 == 0  # so that gaps have both signs, and edges matter
    labels = np.where(right, probs.argmax(1), probs.argmin(1))
    rows = sorted(
        (top, answer == label) for top, answer, label in zip(probs.max(1), probs.argmax(1), labels, strict=True)
    )
    n, total, start = len(rows), 0.0, 0
    for b in range(bins):
        size = n // bins + (b < n % bins)
        part = rows[start : start + size]
        total += size / n * abs(sum(hit for _, hit in part) / size - sum(top for top, _ in part) / size)
        start += size
    assert metrics.adaptive_ece(probs, labels, bins) == pytest.approx(total)


def test_images_of_equal_confidence_keep_their_order_in_adaptive_bins_with_a_warning():
    probs = [[0.75, 0.25]] * 4
    for labels, expected in (([0, 0, 1, 1], (0.25 + 0.75) / 2), ([0, 1, 0, 1], 0.25)):
        with pytest.warns(UserWarning, match="100 % of the images share their confidence with another"):
            assert metrics.adaptive_ece(probs, labels, bins=2) == pytest.approx(expected)


def test_adaptive_bins_that_split_no_tie_or_hardly_one_give_no_warning():
    pairs = probs_with_top([0.6, 0.6, 0.7, 0.7])
    assert metrics.adaptive_ece(pairs, [0, 1, 0, 1], bins=2) == pytest.approx((0.1 + 0.2) / 2)
    few = probs_with_top(
        np.append(np.linspace(0.5, 0.9, 201).round(3), 0.7)
    )  # 2 of 202 images, on both sides of the middle
    assert metrics.adaptive_ece(few, np.zeros(202, dtype=int), bins=2) == pytest.approx(1 - few[:, 0].mean())


@pytest.mark.parametrize("bins", [0, 5])
def test_adaptive_bins_must_not_be_empty(bins):
    with pytest.raises(ValueError, match=f"expected from 1 to 4 bins, the number of images, but got {bins}"):
        metrics.adaptive_ece([[0.75, 0.25]] * 4, [0, 0, 1, 1], bins)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_classwise_error_is_that_of_each_class_against_the_rest(threshold):
    probs, labels = random_probs()
    n, classes = probs.shape
    errors = []
    for k in range(classes):
        kept = [
            (p, label == k) for p, label in zip(probs[:, k], labels, strict=True) if p > threshold or threshold == 0
        ]
        content = bins_by_loop([p for p, _ in kept], [hit for _, hit in kept], 15)
        errors.append(sum(abs(sum(c) - sum(h)) for c, h in content) / n)
    assert metrics.classwise_ece(probs, labels, threshold=threshold) == pytest.approx(np.mean(errors))


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_a_threshold_that_keeps_all_or_nothing_is_refused(threshold):
    with pytest.raises(ValueError, match="expected a threshold from 0 to below 1"):
        metrics.classwise_ece([[0.75, 0.25]], [0], threshold=threshold)


@pytest.mark.parametrize("metric", [metrics.ece, metrics.mce, metrics.adaptive_ece, metrics.classwise_ece])
def test_confidences_of_zero_and_one_and_a_single_class_have_errors_by_hand(metric):
    bins = {"bins": 1} if metric is metrics.adaptive_ece else {}
    sure = np.array([[1.0, 0.0, 0.0]] * 4)
    assert metric(sure, [0, 0, 0, 0], **bins) == 0
    wrong = metric(sure, [0, 1, 1, 1], **bins)
    # class by class: 0 is said to be sure and is 1/4, 1 is never said and is 3/4, 2 is right
    assert wrong == pytest.approx((0.75 + 0.75) / 3 if metric is metrics.classwise_ece else 0.75)
    assert metric(np.ones((3, 1)), [0, 0, 0], **bins) == 0


def test_nll_matches_scikit_learn():
    probs, labels = random_probs()
    assert metrics.nll(probs, labels) == pytest.approx(log_loss(labels, probs, labels=range(7)), abs=1e-12)
    assert metrics.nll([[0.0, 1.0], [0.5, 0.5]], [0, 0]) == math.inf


def test_brier_matches_the_formula():
    probs, labels = random_probs()
    total = 0.0
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        total += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
    assert metrics.brier(probs, labels) == pytest.approx(total / len(labels), abs=1e-12)
    assert metrics.brier([[0.0, 1.0]], [0]) == 2


@pytest.mark.parametrize("classes", [2, 10, 15])
def test_uniform_probabilities_have_known_scores(classes):
    labels = np.array([0] * 30 + [1] * 70)
    probs = np.full((100, classes), 1 / classes)
    assert metrics.ece(probs, labels) == pytest.approx(abs(0.3 - 1 / classes))
    assert metrics.brier(probs, labels) == pytest.approx(1 - 1 / classes)
    assert metrics.nll(probs, labels) == pytest.approx(math.log(classes))


def test_tensors_and_lists_give_what_arrays_give():
    probs, labels = random_probs()
    for metric in (metrics.ece, metrics.nll, metrics.brier):
        assert metric(torch.tensor(probs), torch.tensor(labels)) == metric(probs, labels)
        assert metric(probs.tolist(), labels.tolist()) == metric(probs, labels)


@EXAMPLES
@given(records, budgets)
def test_accuracy_and_queries_match_plain_loops(fooled_at, q):
    correct = [f for f in fooled_at if f != 1]
    counted = [f if f < q else q for f in correct]
    fooled = [f for f in correct if f <= q]
    expected = sum(counted) / len(counted) if counted else math.nan
    of_successes = sum(fooled) / len(fooled) if fooled else math.nan
    assert metrics.accuracy_at(fooled_at, q) == sum(f > q for f in fooled_at) / len(fooled_at)
    assert metrics.average_queries(fooled_at, q) == pytest.approx(expected, nan_ok=True)
    assert metrics.average_queries_of_successes(fooled_at, q) == pytest.approx(of_successes, nan_ok=True)


@EXAMPLES
@given(records, budgets)
def test_the_success_curve_is_the_accuracy_at_every_query(fooled_at, q):
    expected = [sum(f > i for f in fooled_at) / len(fooled_at) for i in range(1, q + 1)]
    np.testing.assert_allclose(metrics.success_curve(fooled_at, q), expected, atol=1e-12)


def test_average_queries_agree_with_the_paper():
    fooled_at = np.array([1] * 516 + [2] * 1384 + [NEVER] * 8100)
    assert metrics.accuracy_at(fooled_at, 1) == pytest.approx(0.9484)
    assert metrics.accuracy_at(fooled_at, 2500) == pytest.approx(0.81)
    assert metrics.average_queries(fooled_at, 2500) == pytest.approx(2135, abs=1)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 200), (200, 200), (81, 100), (9484, 10000)])
def test_wilson_matches_scipy(successes, n):
    reference = binomtest(successes, n).proportion_ci(method="wilson")
    assert metrics.wilson(successes, n) == pytest.approx((reference.low, reference.high), abs=1e-7)


def test_bootstrap_rows_are_the_same_for_the_same_seed():
    rows = metrics.bootstrap(40, draws=25)
    assert rows.shape == (25, 40)
    assert set(rows.ravel().tolist()) == set(range(40))
    np.testing.assert_array_equal(rows, metrics.bootstrap(40, draws=25))
    assert (rows != metrics.bootstrap(40, draws=25, seed=1)).any()
    assert len({tuple(row) for row in rows.tolist()}) == 25


def test_percentiles_hold_the_middle_95_percent_and_corrected_mirrors_them():
    values = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert metrics.percentiles(values) == pytest.approx((25, 975))
    assert metrics.corrected(400.0, values) == pytest.approx((-175, 775))
    assert metrics.corrected(400.0, values, low=0.0) == pytest.approx((0, 775))
    assert metrics.corrected(400.0, values, low=0.0, high=700.0) == pytest.approx((0, 700))
    assert np.isnan(metrics.percentiles(np.array([1.0, math.nan]))).all()


def test_the_ece_interval_covers_the_true_ece_of_an_overconfident_model():
    covered = 0
    for seed in range(40):
        hits = np.random.default_rng(seed).random(300) < 0.6
        low, high = metrics.ece_interval(np.full((300, 2), [0.2, 0.8]), hits.astype(int), draws=200)
        covered += low <= 0.2 <= high
    assert 34 <= covered <= 40


def test_the_ece_interval_takes_out_the_upward_bias_of_few_images():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 300)
    labels = (rng.random(300) < confidence).astype(int)
    probs = np.stack([1 - confidence, confidence], 1)
    low, high = metrics.ece_interval(probs, labels)
    assert metrics.ece_interval(probs, labels) == (low, high)
    assert 0 <= low < metrics.ece(probs, labels)
    resampled = [metrics.ece(probs[r], labels[r]) for r in metrics.bootstrap(300, 100)]
    assert high < np.quantile(resampled, 0.975)


def test_the_ece_of_a_column_does_not_differ_from_itself():
    probs, labels = random_probs()
    assert metrics.ece_difference(probs, probs, labels, draws=50) == (0.0, (0.0, 0.0))


def test_the_ece_difference_pairs_its_resamples():
    probs, labels = random_probs(n=80)
    flatter = np.sqrt(probs) / np.sqrt(probs).sum(1, keepdims=True)
    value, interval = metrics.ece_difference(probs, flatter, labels, draws=60)
    assert value == pytest.approx(metrics.ece(probs, labels) - metrics.ece(flatter, labels))
    rows = metrics.bootstrap(80, 60)
    draws = [metrics.ece(probs[r], labels[r]) - metrics.ece(flatter[r], labels[r]) for r in rows]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert interval == pytest.approx((2 * value - high, 2 * value - low))


def test_scores_become_probabilities_by_their_declared_kind():
    scores = torch.tensor([[1000.0, 1000.0 - math.log(3)], [-5.0, -5.0]], dtype=torch.float64)
    expected = [[0.75, 0.25], [0.5, 0.5]]
    np.testing.assert_allclose(metrics.probabilities(scores, "logits"), expected)
    np.testing.assert_allclose(metrics.probabilities(np.log(expected), "log_probs"), expected)
    assert metrics.probabilities(expected, "probs").tolist() == expected
    with pytest.raises(ValueError, match="logits, log_probs or probs, but got 'scores'"):
        metrics.probabilities(scores, "scores")


METRICS = [metrics.ece, metrics.mce, metrics.adaptive_ece, metrics.classwise_ece, metrics.nll, metrics.brier]


@pytest.mark.parametrize("metric", [*METRICS, metrics.reliability, metrics.ece_interval])
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (np.zeros((0, 3)), [], "N >= 1"),
        ([0.5, 0.5], [0, 1], r"probs \(N, K\)"),
        ([[0.5, 0.5]], [0, 1], r"labels \(N,\)"),
        ([[4.0, -1.0]], [0], "turn logits into probabilities"),
        ([[0.3, 0.3]], [0], "sum to 1"),
        ([[math.nan, 1.0]], [0], "rows of probabilities"),
        ([[0.5, 0.5]], [2], r"labels in 0\.\.1, but got 2\.\.2"),
        ([[0.5, 0.5]], [-1], r"labels in 0\.\.1, but got -1\.\.-1"),
    ],
)
def test_probabilities_and_labels_that_make_no_sense_are_refused(metric, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(probs, labels)


@pytest.mark.parametrize(
    "metric",
    [metrics.accuracy_at, metrics.average_queries, metrics.average_queries_of_successes, metrics.success_curve],
)
@pytest.mark.parametrize(
    ("fooled_at", "q", "message"),
    [
        ([], 10, r"N >= 1 and entries >= 1, but got shape \(0,\)"),
        ([[1, 2]], 10, r"fooled_at \(N,\)"),
        ([1, 0], 10, "with minimum 0"),
        ([1, 2], 0, "queries >= 1, but got 0"),
    ],
)
def test_records_that_make_no_sense_are_refused(metric, fooled_at, q, message):
    with pytest.raises(ValueError, match=message):
        metric(fooled_at, q)


@pytest.mark.parametrize(("successes", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_shares_that_make_no_sense_are_refused(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        metrics.wilson(successes, n)
