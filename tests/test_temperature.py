"""Temperature scaling: fitted against a fine grid."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import Declared, Linear, images
from queryfoil import metrics
from queryfoil.defenses.temperature import TemperatureScaling, temperature_by_ece, temperature_by_nll
from test_metrics import ece_by_loop


@pytest.fixture(scope="module")
def overconfident():
    """Logits that are right as often as those divided by 2.5 say."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(2000, 10, generator=generator)
    return logits, (logits / 2.5).softmax(1).multinomial(1, generator=generator).squeeze(1)


def test_the_lowest_nll_is_that_of_a_fine_grid(overconfident):
    logits, labels = overconfident
    grid = torch.linspace(1, 5, 4001, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(logits.double() / t, labels) for t in grid])
    assert temperature_by_nll(logits, labels) == pytest.approx(float(grid[losses.argmin()]), abs=1e-3)
    assert temperature_by_nll(logits, labels) == pytest.approx(2.5, rel=0.1)


def test_the_lowest_ece_is_that_of_the_grid_of_the_release(overconfident):
    logits, labels = (values[:150] for values in overconfident)
    hits = (logits.argmax(1) == labels).tolist()
    grid = [1.0]
    for i in range(1, 1000):
        grid += [i / 1000, 1000 / i]
    errors = [ece_by_loop((logits.double() / t).softmax(1).amax(1).tolist(), hits) for t in grid]
    best = min(errors)
    first = next(t for t, error in zip(grid, errors, strict=True) if error < best + 1e-12)
    assert temperature_by_ece(logits, labels) == pytest.approx(first)
    assert temperature_by_ece(*overconfident) == pytest.approx(2.5, rel=0.25)


def test_a_network_that_is_always_right_or_knows_nothing_gets_the_bounds():
    labels = torch.arange(100) % 5
    right = F.one_hot(labels, 5).float()
    assert temperature_by_nll(right, labels) == pytest.approx(0.001, rel=1e-4)
    assert temperature_by_nll(right, (labels + 1) % 5) == pytest.approx(1000, rel=1e-4)


def test_nothing_known_wins_over_one_where_all_are_equal():
    labels = torch.arange(100) % 5
    assert temperature_by_ece(torch.zeros(100, 5), labels) == 1.0


@pytest.mark.parametrize("by", ["nll", "ece"])
def test_a_fitted_model_is_calibrated_better_and_answers_the_same(overconfident, by):
    logits, labels = overconfident
    found = TemperatureScaling.fit(logits, labels, by=by)
    model = TemperatureScaling.from_fit(torch.nn.Identity(), found)
    shown = model(logits)
    assert vars(found) == {"temperature": model.temperature, "by": by, "n": 2000}
    assert metrics.ece(shown.softmax(1), labels) < 0.5 * metrics.ece(logits.softmax(1), labels)
    assert torch.equal(shown.argmax(1), logits.argmax(1))


def test_probabilities_are_raised_to_the_inverse_of_the_temperature():
    x, linear = images(5), Linear()
    declared = torch.nn.Sequential(linear, torch.nn.Softmax(1)).eval()
    declared.output = "probs"
    shown = TemperatureScaling(declared, temperature=2.0)(x)
    expected = linear(x).double().softmax(1).sqrt()
    torch.testing.assert_close(shown.double(), expected / expected.sum(1, keepdim=True), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fit", [temperature_by_nll, temperature_by_ece])
def test_too_few_or_wrong_labels_raise(fit):
    with pytest.raises(ValueError, match="expected at least 50 held-out images"):
        fit(torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.2, but got 0\.\.3"):
        fit(torch.zeros(60, 3), torch.arange(60) % 4)


def test_an_unknown_criterion_is_answered_with_the_known():
    with pytest.raises(ValueError, match="unknown criterion 'brier': expected one of ece, nll"):
        TemperatureScaling.fit(torch.zeros(60, 3), torch.arange(60) % 3, by="brier")
    assert np.isfinite(temperature_by_nll(torch.randn(60, 3), torch.arange(60) % 3))


def test_logits_that_say_nothing_are_left_as_they_are():
    assert temperature_by_nll(torch.zeros(60, 4), torch.arange(60) % 4) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1e-3, 3.0, 1e3])
def test_rounding_never_changes_the_label(dtype, temperature):
    z = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)).mul(8).to(dtype)
    top = z.argmax(1, keepdim=True)
    near = torch.nextafter(z.gather(1, top), torch.full_like(z.gather(1, top), -torch.inf))
    z = z.scatter(1, (top + 1) % 10, near)  # one step below the top
    for output in ("logits", "probs"):
        given = z if output == "logits" else z.float().softmax(1)
        model = TemperatureScaling(Declared(nn.Identity(), "logits"), temperature=temperature)
        model.output = output
        shown = model(given)
        assert bool(shown.isfinite().all())
        assert torch.equal(shown.argmax(1), given.argmax(1))
