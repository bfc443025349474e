"""The line scan: the period of AAA from answers, counted, and nothing where there is none."""

import pytest
import torch
from torch import nn

from helpers import Linear, Watch, images, levels
from queryfoil import AAA, data, models
from queryfoil.attacks.line_scan import Line, Place, Scan, _linear, _sine, estimate_tau
from queryfoil.attacks.sine import peak
from queryfoil.defenses import DEFENSES
from queryfoil.defenses.disguise import target_margin


@pytest.mark.parametrize(
    ("solver", "tau"), [("exact", 2.0), ("exact", 6.0), pytest.param("adam", 6.0, marks=pytest.mark.slow)]
)
def test_the_period_around_a_trained_network_is_found(solver, tau):
    x = data.load("fashion-mnist", "attack").images[20:30]
    scan = estimate_tau(AAA(models.load("fashion-resnet"), tau=tau, solver=solver).eval(), x)
    assert scan.curve == "linear"
    assert scan.tau == pytest.approx(tau, rel=0.02)
    assert scan.alpha == pytest.approx(1.0, abs=0.03)
    assert 300 + 5 + 12 * scan.jumps <= scan.queries <= 300 + 5 + 12 * 4 * 5


@pytest.mark.parametrize("name", ["fashion-resnet", "fashion-wrn"])
def test_nothing_is_found_on_a_trained_network_without_a_defense(name):
    scan = estimate_tau(models.load(name), data.load("fashion-mnist", "attack").images[:10])
    assert scan == Scan(None, None, None, 5, 0, scan.queries)
    assert 605 <= scan.queries < 1500


@pytest.mark.parametrize(
    "name", ["label_only", "rounded", "dld", "rls", "input_noise", "boundary_noise", "temperature"]
)
def test_nothing_is_found_behind_other_defenses(name):
    hyper = {"temperature": {"temperature": 2.0}}.get(name, {})
    assert estimate_tau(DEFENSES[name](Linear(), **hyper).eval(), images(12)).tau is None


class Curve(nn.Module):
    """A model of two classes that shows, of a raw margin, what a curve says, without calibration; label 1 below 0."""

    def __init__(self, curve, tau, alpha):
        super().__init__()
        self.curve, self.tau, self.alpha = curve, tau, alpha
        self.weight = nn.Parameter(torch.linspace(-0.007, 0.008, 64))
        self.eval()

    def forward(self, x):
        raw = ((x * 255).round().flatten(1) - 100) @ self.weight + 1
        lead = target_margin(raw.abs(), self.curve, self.tau, self.alpha) * raw.sign()
        return torch.stack([lead, torch.zeros_like(lead)], 1)


def ramps():
    """Images between which the raw margin of `Curve` goes steadily from about -15 to 15."""
    slope = torch.linspace(-1, 1, 64).view(1, 8, 8)
    ends = torch.tensor([-1.0, 1.0, -0.9, 0.8, -0.7, 1.0, -1.0, 0.7])
    return ((100 + 90 * ends[:, None, None, None] * slope) / 255 * 255).round() / 255


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("tau", [2.0, 4.5])
def test_jumps_give_period_and_alpha(tau, alpha):
    scan = estimate_tau(Curve("linear", tau, alpha), ramps())
    assert (scan.curve, scan.lines) == ("linear", 4)
    assert scan.tau == pytest.approx(tau, rel=0.03)
    assert scan.alpha == pytest.approx(alpha, abs=0.05)


@pytest.mark.parametrize(("tau", "alpha"), [(2.0, 0.7), (6.0, 0.7), (3.0, 0.5)])
def test_turning_points_give_period_and_alpha(tau, alpha):
    scan = estimate_tau(Curve("sine", tau, alpha), ramps())
    assert scan.curve == "sine"
    assert scan.tau == pytest.approx(tau, rel=0.03)
    assert scan.alpha == pytest.approx(alpha, abs=0.03)


def test_every_query_is_counted_and_sent_in_8_bits():
    for curve in ("linear", "sine"):
        watched = Watch(Curve(curve, 3.0, 0.7))
        scan = estimate_tau(watched, ramps(), micro_batch=7)
        assert scan.queries == sum(map(len, watched.batches))
        assert max(map(len, watched.batches)) <= 7
        for batch in watched.batches:
            levels(batch)


def test_the_limits_of_a_jump_are_closer_to_it_than_the_step_in_which_it_lies():
    x = ramps()
    line = Line(Curve("linear", 6.0, 1.0), 0, x[0], x[1], 40, 128)
    jumps = line.jumps(14)
    assert len(jumps) >= 2
    for jump in jumps[:2]:
        assert jump.low == pytest.approx(0.0, abs=0.1)
        assert jump.high == pytest.approx(12.0, abs=0.1)
    assert line.queries == 40 + 14 * len(jumps)  # of four that are tried at most


def test_one_border_is_taken_for_the_first_with_the_alpha_of_the_paper():
    # as behind the paper's AAA with tau 6: calibration has raised the lower limit from 0
    seen = [Place(line, 0.95, 12.0 + 0.05 * line) for line in range(3)]
    assert _linear(seen) == ("linear", pytest.approx(6.0, rel=0.01), 1.0)
    assert _linear([*seen, Place(0, 6.0, 18.0), Place(1, 6.0, 18.0)]) == (
        "linear",
        pytest.approx(6.0),
        pytest.approx(1.0),
    )
    assert _linear(seen[:1]) is None  # no other line agrees
    assert _linear([]) is None
    assert _linear([*seen[:2], *(Place(line, 1.0, 2 + 1.1**line) for line in range(2, 8))]) is None


def test_one_interval_is_taken_for_the_first_and_must_be_confirmed():
    top = 6 * (0.5 + peak(1.0, 0.7))
    peaks = [Place(line, top, top) for line in range(3)]
    low = [Place(line, 15 - top, 15 - top) for line in range(3)]
    assert _sine(peaks, low) is None  # where no valley can be
    low = [Place(line, 12 - top, 12 - top) for line in range(3)]
    assert _sine(peaks, low) == ("sine", pytest.approx(6.0), 0.7)
    assert _sine(peaks, []) is None
    assert _sine([], low) is None


def test_bad_input_is_refused_before_a_query():
    watched = Watch(Linear())
    with pytest.raises(ValueError, match="expected at least 4 images"):
        estimate_tau(watched, images(3))
    with pytest.raises(ValueError, match="points"):
        estimate_tau(watched, images(4), points=3)
    with pytest.raises(ValueError, match="halvings"):
        estimate_tau(watched, images(4), halvings=0)
    with pytest.raises(ValueError, match="evaluation mode"):
        estimate_tau(watched.train(), images(4))
    assert watched.batches == []
