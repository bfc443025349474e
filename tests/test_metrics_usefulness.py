import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from queryfoil import metrics
from test_metrics import random_probs
from test_metrics_calibration import calibrated
from test_metrics_selective import tied_probs, two_classes

PAGE = Path(__file__).parent.parent / "docs/metrics.md"
BY_NAME = {
    "accuracy": lambda p, y: np.mean(p.argmax(1) == y),
    "nll": metrics.nll,
    "brier": metrics.brier,
    "top_label_brier": metrics.top_label_brier,
    "ece": metrics.ece,
    "mce": metrics.mce,
    "rms_calibration_error": metrics.rms_calibration_error,
    "adaptive_ece": metrics.adaptive_ece,
    "classwise_ece": metrics.classwise_ece,
    "classwise_ece_above_chance": lambda p, y: metrics.classwise_ece(p, y, threshold=1 / p.shape[1]),
    "auroc": metrics.auroc,
    "fpr_at_95_tpr": metrics.fpr_at_95_tpr,
    "aupr_of_errors": metrics.aupr_of_errors,
    "aurc": metrics.aurc,
    "e_aurc": metrics.e_aurc,
    "risk_at_80_coverage": metrics.risk_at,
    "tied_share": lambda p, y: metrics.tied_share(p),
    "confidence_levels": lambda p, y: metrics.confidence_levels(p),
    "ece_by_chance": lambda p, y: metrics.ece_by_chance(p, draws=60).value,
}
OF_BOTH = {
    **{f"rank_kept_{k}": lambda p, r, k=k: metrics.rank_kept(p, r, k) for k in (1, 2, 3, 5)},
    "rank_kept_all": metrics.rank_kept,
    "rank_reversed": metrics.rank_reversed,
    "spearman": metrics.spearman,
    "kendall": metrics.kendall,
}
CORRECTED = ["ece", "rms_calibration_error", "classwise_ece", "classwise_ece_above_chance"]


def columns(n=500, classes=7):
    """Shown and undefended probabilities that differ in order and confidence, and labels; the second is calibrated."""
    logits, labels = calibrated(n, classes)
    noise = np.random.default_rng(1).normal(size=logits.shape) * np.linspace(0, 1, n)[:, None]
    return (*(metrics.probabilities(z, "logits") for z in (1.5 * logits + noise, logits)), labels)


def test_every_value_is_that_of_its_function():
    shown, raw, labels = columns()
    found = metrics.usefulness(shown, labels, raw, draws=60)
    for name, figure in BY_NAME.items():
        assert found[name].value == pytest.approx(figure(shown, labels), abs=1e-12), name
    for name, figure in OF_BOTH.items():
        assert found[name].value == pytest.approx(figure(shown, raw), abs=1e-12), name
    near = metrics.near_boundary_ece(shown, labels, metrics.lead(raw))
    assert found["near_boundary_ece"].value == pytest.approx(near, abs=1e-12)
    for name in ("ece", "auroc"):
        change = BY_NAME[name](shown, labels) - BY_NAME[name](raw, labels)
        assert found[f"{name}_change"].value == pytest.approx(change, abs=1e-12)
    others = {"near_boundary_ece", "ece_change", "auroc_change"}
    assert set(found) == set(BY_NAME) | set(OF_BOTH) | others
    assert all(isinstance(v, float) for estimate in found.values() for v in estimate)


@pytest.mark.filterwarnings("ignore:.*share their confidence")  # as resamples do
def test_every_interval_is_that_of_plain_resampling():
    shown, raw, labels = columns(n=700)
    raw[:100] = 1 / 7  # no order to keep
    found = metrics.usefulness(shown, labels, raw, draws=60)
    rows = metrics.bootstrap(700, 60)
    skipped = {"tied_share", "confidence_levels", "ece_by_chance", "adaptive_ece"}
    for name, figure in BY_NAME.items():
        if name not in skipped:
            values = np.array([figure(shown[r], labels[r]) for r in rows])
            value = found[name].value
            interval = metrics.corrected(value, values, 0.0, 1.0) if name in CORRECTED else metrics.percentiles(values)
            assert found[name][1:] == pytest.approx(interval, abs=1e-9), name
    for name, figure in OF_BOTH.items():
        values = np.array([figure(shown[r], raw[r]) for r in rows])
        assert found[name][1:] == pytest.approx(metrics.percentiles(values), abs=1e-9), name
    lead = metrics.lead(raw)
    values = np.array([metrics.near_boundary_ece(shown[r], labels[r], lead[r], at_least=1) for r in rows])
    near = metrics.near_boundary_ece(shown, labels, lead)
    assert found["near_boundary_ece"] == pytest.approx((near, *metrics.corrected(near, values, 0.0, 1.0)), abs=1e-9)
    place = np.argsort(np.argsort(shown.max(1)))  # adaptive bins split the copies of an image: those in its own order
    rows = [np.argsort(shown.max(1))[np.sort(place[r])] for r in rows]
    values = np.array([metrics.adaptive_ece(shown[r], labels[r]) for r in rows])
    value = found["adaptive_ece"].value
    assert found["adaptive_ece"][1:] == pytest.approx(metrics.corrected(value, values, 0.0, 1.0), abs=1e-9)


def test_intervals_of_the_ece_and_its_change_are_those_of_the_reports():
    shown, raw, labels = columns()
    found = metrics.usefulness(shown, labels, raw)
    assert found["ece"][1:] == pytest.approx(metrics.ece_interval(shown, labels), abs=1e-12)
    value, interval = metrics.ece_difference(shown, raw, labels)
    assert found["ece_change"] == pytest.approx((value, *interval), abs=1e-12)


def test_the_changes_are_paired():
    shown, raw, labels = columns()
    found = metrics.usefulness(shown, labels, raw, draws=200)
    rows = metrics.bootstrap(len(labels), 200)
    changes = np.array([metrics.auroc(shown[r], labels[r]) - metrics.auroc(raw[r], labels[r]) for r in rows])
    assert found["auroc_change"][1:] == pytest.approx(metrics.percentiles(changes), abs=1e-9)
    alone = [metrics.usefulness(p, labels, p, draws=200)["auroc"] for p in (shown, raw)]
    paired = found["auroc_change"].high - found["auroc_change"].low
    assert paired < 0.8 * math.hypot(*(high - low for _, low, high in alone))


def test_undefended_scores_do_not_differ_from_themselves():
    _, raw, labels = columns()
    found = metrics.usefulness(raw, labels, raw, draws=30)
    assert found["ece_change"] == found["auroc_change"] == (0, 0, 0)
    for name in OF_BOTH:
        assert found[name] == pytest.approx((0, 0, 0) if name == "rank_reversed" else (1, 1, 1)), name


def test_the_auroc_interval_covers_the_true_one():
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        hits = rng.random(200) < 0.7
        confidences = np.where(hits, rng.uniform(0.6, 1, 200), rng.uniform(0.5, 0.9, 200))
        probs, labels = two_classes(confidences, hits)
        _, low, high = metrics.usefulness(probs, labels, probs, draws=50)["auroc"]
        covered += low <= 1 - (0.3**2 / 2) / 0.4**2 <= high  # a wrong answer is above in half of the shared corner
    assert 51 <= covered <= 60


def test_ties_show_in_their_columns():
    probs, labels = tied_probs(digits=1)
    found = metrics.usefulness(probs, labels, probs, draws=20)
    assert found["tied_share"].value == 1
    assert found["confidence_levels"].value <= 6
    assert math.isnan(found["confidence_levels"].low)
    expected = metrics.auroc(probs, labels)
    assert found["auroc"].value == pytest.approx(expected, abs=1e-12)


def test_what_is_undefined_is_nan_and_the_rest_is_not():
    raw, labels = two_classes([0.9, 0.8, 0.7, 0.6], [1, 1, 1, 1])
    found = metrics.usefulness(raw, labels, raw, bins=2, draws=20)
    undefined = {name for name, estimate in found.items() if math.isnan(estimate.value)}
    assert undefined == {
        *("near_boundary_ece", "auroc", "auroc_change", "fpr_at_95_tpr", "aupr_of_errors", "rank_kept_3", "rank_kept_5")
    }
    assert all(math.isnan(found[name].low) and math.isnan(found[name].high) for name in undefined)
    assert found["accuracy"] == (1, 1, 1)


def test_resamples_without_a_wrong_answer_are_left_out():
    probs, labels = two_classes([0.9, 0.8, 0.7, 0.6, 0.55], [1, 1, 1, 1, 0])
    _, low, high = metrics.usefulness(probs, labels, probs, bins=2, draws=200)["auroc"]
    assert (low, high) == (1, 1)


def test_an_infinite_loss_has_no_interval():
    probs, labels = two_classes([1.0, 0.8, 0.7], [0, 1, 1])
    found = metrics.usefulness(probs, labels, probs, bins=2, draws=20)
    assert found["nll"][0] == math.inf
    assert np.isnan(found["nll"][1:]).all()
    assert math.isfinite(found["brier"].high)


def test_tensors_give_what_arrays_give_and_no_global_state_moves(same_random_states):
    shown, raw, labels = columns(n=60)
    found = metrics.usefulness(shown, labels, raw, draws=10)
    other = metrics.usefulness(torch.tensor(shown), torch.tensor(labels), torch.tensor(raw), draws=10)
    assert repr(found) == repr(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw_probs": np.full((300, 3), 1 / 3)}, r"of the same shape \(N, K\), but got \(300, 7\) and \(300, 3\)"),
        ({"raw_probs": np.ones((300, 7))}, "turn logits into probabilities"),
        ({"probs": np.ones((300, 7))}, "turn logits into probabilities"),
        ({"labels": np.zeros(299, dtype=int)}, r"labels \(N,\)"),
        ({"bins": 301}, "expected from 1 to 300 bins, the number of images, but got 301"),
        ({"bins": 0}, "expected at least 1 bin, but got 0"),
        ({"draws": 0}, "expected at least 1 draw, but got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    probs, labels = random_probs()
    with pytest.raises(ValueError, match=message):
        metrics.usefulness(**{"probs": probs, "labels": labels, "raw_probs": probs, **change})


def test_every_figure_is_explained_in_its_page():
    text = PAGE.read_text(encoding="utf-8").split("## The figures")[1]
    first_cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    probs, labels = random_probs()
    assert sorted(named) == sorted(metrics.usefulness(probs, labels, probs, draws=1))


@pytest.mark.slow
def test_the_table_of_the_page_is_what_its_code_prints(capsys):
    text = PAGE.read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    exec(compile(block, str(PAGE), "exec"), {"__name__": "page"})
    table = text.split("<!-- table: begin -->\n")[1].split("<!-- table: end -->")[0]
    printed = capsys.readouterr().out
    assert re.sub(r"[-\d.e]+", "#", printed) == re.sub(r"[-\d.e]+", "#", table)
    numbers = [[float(v) for v in re.findall(r"(?<=[ (])-?\d[-\d.e]*|nan", t)] for t in (printed, table)]
    np.testing.assert_allclose(*numbers, rtol=0.05, atol=0.003)
