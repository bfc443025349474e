import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from queryfoil import metrics
from queryfoil.defenses import calibration
from queryfoil.defenses.aaa import AAA
from queryfoil.defenses.calibration import Fit, fit
from queryfoil.defenses.disguise import disguise


def held_out(n, classes=10, temperature=1.0, seed=0):
    """Logits N(0, 3^2) with labels drawn from softmax(logits / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator) * 3
    labels = (logits / temperature).softmax(1).multinomial(1, generator=generator).squeeze(1)
    return logits, labels


def ece(logits, labels):
    return metrics.ece(metrics.probabilities(logits, "logits"), labels)


@pytest.fixture(scope="module")
def overconfident():
    return held_out(500, temperature=2.0)


@pytest.fixture(scope="module")
def fitted(overconfident):
    return fit(*overconfident)


@pytest.fixture
def few_temperatures(monkeypatch):
    monkeypatch.setattr(calibration, "TEMPERATURES", np.array([0.5, 2.0, 4.0]))


def test_the_temperature_of_an_overconfident_model_is_recovered(fitted, overconfident):
    logits, labels = overconfident
    assert 1 < fitted.temperature < 3
    assert fitted.ece_undefended == pytest.approx(ece(logits, labels))
    assert fitted.ece == pytest.approx(ece(disguise(logits, **fitted.settings()), labels))
    assert fitted.ece < fitted.ece_undefended / 2
    assert (fitted.n, fitted.classes) == (500, 10)


def test_other_images_are_calibrated_too(fitted):
    logits, labels = held_out(2000, temperature=2.0, seed=1)
    assert ece(disguise(logits, **fitted.settings()), labels) < ece(logits, labels) / 2


def test_a_calibrated_model_stays_calibrated_with_a_small_tau():
    logits, labels = held_out(1000)
    found = fit(logits, labels, tau=0.05)
    assert found.tau == 0.05
    assert 0.8 < found.temperature < 1.25
    assert found.ece < found.ece_undefended + 0.01


def test_a_temperature_of_one_is_always_compared(monkeypatch):
    monkeypatch.setattr(calibration, "TEMPERATURES", np.array([0.1, 10.0]))
    assert fit(*held_out(300), tau=0.05).temperature == 1.0
    logits, labels = held_out(300, temperature=10.0)
    assert fit(logits, labels, tau=0.05).temperature == 10.0


def test_of_temperatures_within_a_standard_error_of_the_lowest_ece_the_nearest_to_one_is_taken(few_temperatures):
    correct = np.tile(np.arange(1000) < 600, (4, 1))
    for second_best, chosen in ((0.605, 2.0), (0.65, 4.0)):
        confidence = np.repeat([[0.9], [0.9], [second_best], [0.6]], 1000, 1)  # at T = 1, 0.5, 2, 4
        assert calibration._temperatures()[calibration._best(confidence, correct, "nearest")] == chosen
        assert calibration._temperatures()[calibration._best(confidence, correct, "lowest")] == 4.0


def test_tau_is_the_largest_whose_cross_fitted_ece_is_allowed(fitted, overconfident):
    logits, labels = overconfident[0], overconfident[1].numpy()
    top2 = logits.topk(2).values
    assert fitted.median_margin == pytest.approx(float((top2[:, 0] - top2[:, 1]).median()))

    def crossed(settings):
        return calibration._cross_fitted(*calibration._confidences(logits, labels, settings), "nearest")

    limit = min(fitted.ece_undefended, crossed(None)) + 0.005
    grid = calibration._tau_grid(fitted.median_margin)
    assert grid == sorted(grid, reverse=True)
    assert fitted.tau in grid[1:]
    settings = {name: value for name, value in fitted.settings().items() if name not in ("tau", "temperature")}
    for tau in grid[: grid.index(fitted.tau)]:
        assert crossed({**settings, "tau": tau}) > limit
    assert crossed({**settings, "tau": fitted.tau}) == fitted.ece_cross_fitted <= limit


@pytest.mark.parametrize(
    ("strict", "undefended", "tau"), [(0.020, 0.5, 2.0), (0.015, 0.5, 1.0), (0.009, 0.5, 4.0), (0.009, 0.015, 1.0)]
)
def test_where_no_tau_comes_near_the_rescaled_logits_the_undefended_ones_are_the_limit(strict, undefended, tau):
    errors = {4.0: 0.030, 2.0: 0.025, 1.0: 0.0199, 0.5: 0.0201}
    assert calibration._largest_tau(list(errors), errors.__getitem__, strict, undefended) == tau


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fitted_in_single_precision(dtype, few_temperatures):
    logits, labels = held_out(60)
    assert fit(logits.to(dtype), labels, tau=1.0) == fit(logits.to(dtype).float(), labels, tau=1.0)


def test_logits_that_require_gradients_are_fitted(few_temperatures):
    logits, labels = held_out(60)
    assert fit(logits.clone().requires_grad_(), labels, tau=1.0) == fit(logits, labels, tau=1.0)


def test_cross_fitting_never_uses_the_temperature_of_the_own_fold(few_temperatures):
    confidence, correct = calibration._confidences(*held_out(60, temperature=2.0), None)
    fold = np.random.default_rng(0).permutation(60) % 5
    gaps = []
    for i in range(60):
        others = fold != fold[i]
        best = calibration._best(confidence[:, others], correct[:, others], "nearest")
        gaps.append((confidence[best, i], correct[best, i]))
    chosen, hit = (np.array(column) for column in zip(*gaps, strict=True))
    assert calibration._cross_fitted(confidence, correct, "nearest") == pytest.approx(
        float(metrics.binned_gap(chosen, hit))
    )


@pytest.mark.parametrize(
    "chosen",
    [
        {"tau": 1.5},
        {"tau": 0.5, "curve": "sine", "alpha": 0.3, "beta": 2.0},
        {"tau": 2.0, "solver": "adam", "steps": 3, "lr": 0.05},
    ],
)
def test_given_settings_are_kept(chosen, few_temperatures):
    found = fit(*held_out(60), **chosen).settings()
    assert {name: found[name] for name in chosen} == chosen


def test_fit_is_deterministic_and_leaves_the_global_generator_alone(few_temperatures):
    logits, labels = held_out(200, temperature=2.0)
    torch.manual_seed(1)
    first, after = fit(logits, labels), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert fit(logits.clone(), labels.clone()) == first


def test_a_saved_fit_loads_as_it_was(fitted, tmp_path):
    fitted.save(tmp_path / "fit.json")
    assert Fit.load(tmp_path / "fit.json") == fitted
    assert [path.name for path in tmp_path.iterdir()] == ["fit.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-10],
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: text.replace('"tau"', '"period"'),
        lambda text: json.dumps({**json.loads(text), "extra": 1}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "beta"}),
        lambda text: json.dumps({**json.loads(text), "tau": -1.0}),
        lambda text: json.dumps({**json.loads(text), "temperature": "hot"}),
        lambda text: json.dumps({**json.loads(text), "solver": "newton"}),
        lambda text: json.dumps({**json.loads(text), "curve": "liner"}),
    ],
)
def test_a_damaged_file_is_refused(damage, fitted, tmp_path):
    path = tmp_path / "fit.json"
    fitted.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"fit\.json is no file written by Fit\.save"):
        Fit.load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "fit.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no file written by"):
        Fit.load(tmp_path / "fit.json")


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.randn(49, 3), torch.zeros(49, dtype=torch.long), "at least 50 .* but got 49"),
        (torch.randn(60, 3), torch.zeros(59, dtype=torch.long), r"logits \(N, K\) and integer labels \(N,\)"),
        (torch.randn(60, 3), torch.zeros(60, 3, dtype=torch.long), r"integer labels \(N,\)"),
        (torch.randn(60, 3), torch.zeros(60), r"integer labels \(N,\), but got .* torch.float32"),
        (torch.randn(60), torch.zeros(60, dtype=torch.long), r"logits \(N, K\)"),
        (torch.randn(2, 60, 3), torch.zeros(2, dtype=torch.long), r"logits \(N, K\)"),
        (torch.randn(60, 3), torch.full((60,), 3), r"labels in 0\.\.2, but got 3\.\.3"),
        (torch.randn(60, 3), torch.full((60,), -1), r"labels in 0\.\.2, but got -1\.\.-1"),
        (torch.full((60, 3), torch.nan), torch.zeros(60, dtype=torch.long), "180 of 180 are NaN"),
        (torch.eye(60)[:, :3], torch.arange(60) % 3, "median margin above 0"),
    ],
)
def test_held_out_data_that_make_no_sense_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit(logits, labels)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"tau": 0.0}, "tau > 0"),
        ({"curve": "sin"}, "did you mean 'sine'"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"steps": 10}, "no effect on 'exact'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        fit(*held_out(60), **chosen)


def test_without_an_admissible_tau_the_error_says_what_to_do(few_temperatures):
    logits, labels = held_out(500, classes=3)
    with pytest.raises(ValueError, match=r"no tau from .* pass tau yourself, or more held-out images"):
        fit(logits, labels, alpha=50.0, beta=0.0)
    assert fit(logits, labels, alpha=50.0, beta=0.0, tau=1.0).ece > 0.05


def test_two_classes_warn_that_margin_and_confidence_conflict(few_temperatures):
    with pytest.warns(UserWarning, match="two classes"):
        found = fit(*held_out(60, classes=2), tau=1.0)
    with pytest.warns(UserWarning, match="two classes"):
        protected = AAA.from_fit(nn.Identity(), found)
    with pytest.warns(UserWarning, match="two classes"):
        protected(torch.randn(3, 2))


def test_aaa_from_a_fit_shows_what_the_fit_promised(fitted, overconfident):
    logits, labels = overconfident
    with warnings.catch_warnings(action="error"):
        shown = AAA.from_fit(nn.Identity(), fitted)(logits)
    assert torch.equal(shown, disguise(logits, **fitted.settings()))
    assert ece(shown, labels) == pytest.approx(fitted.ece)


def test_aaa_from_a_fit_keeps_every_setting(few_temperatures):
    found = fit(*held_out(60), tau=0.5, curve="sine", alpha=0.3, beta=2.0, solver="adam", steps=3, lr=0.05)
    protected = AAA.from_fit(nn.Identity(), found)
    assert {name: getattr(protected, name) for name in found.settings()} == found.settings()


def test_the_rule_of_the_paper_takes_the_lowest_ece(overconfident):
    logits, labels = overconfident
    found = fit(logits, labels, tau=2.0, rule="lowest")
    assert found.rule == "lowest"
    eces = {t: ece(disguise(logits, tau=2.0, temperature=t), labels) for t in (1.0, *calibration.TEMPERATURES.tolist())}
    assert eces[found.temperature] == min(eces.values()) == pytest.approx(found.ece)
    assert found.ece <= fit(logits, labels, tau=2.0).ece
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        fit(logits, labels, rule="best")
