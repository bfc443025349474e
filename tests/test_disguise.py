import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from queryfoil.defenses.disguise import disguise, target_margin

ALPHA = {"linear": 1.0, "sine": 0.7}
SOLVERS = ("exact", "adam")
T = 2.08333  # of the paper's CIFAR-10 model, and of the golden vectors

GOLDEN = [
    ("linear", 8.5, (-0.509, -0.201, -1.028, -1.072, -0.156, -0.142, -0.759, 10.671, -0.311, 0.638), 10.03, 0.9998),
    ("linear", 4.5, (-0.363, 0.637, 1.530, 0.953, -1.363, -2.363, 1.220, 3.525, 0.137, 1.137), 1.996, 0.656),
    ("sine", 4.5, (-4.577, -3.577, -2.577, -1.577, -5.577, -6.577, 2.739, 3.308, -4.077, -3.077), 0.569, 0.633),
]


def normal(*shape, scale=3.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def margins(z):
    top2 = z.topk(2).values
    return top2[..., 0] - top2[..., 1]


def targets(margin, curve, tau):
    attractor = (torch.floor(margin / tau) + 0.5) * tau
    if curve == "linear":
        return 2 * attractor - margin
    return margin - 0.7 * tau * torch.sin(2 * math.pi * (margin - attractor) / tau)


def confidences(z):
    return z.double().softmax(-1).max(-1).values


def objective(z, shown, curve, tau, temperature, beta=5.0):
    """Eq. 6 in float64, with sigma = max softmax."""
    missed = margins(shown.double()) - targets(margins(z).double(), curve, tau)
    return missed.abs() + beta * (confidences(shown) - confidences(z.double() / temperature)).abs()


def assert_label_and_ranking_kept(z, shown):
    z, shown = z.double().numpy(), shown.double().numpy()
    assert np.isfinite(shown).all()
    assert (shown.argmax(-1) == z.argmax(-1)).all()
    ranked = np.take_along_axis(shown, np.argsort(-z, axis=-1, kind="stable"), -1)
    assert (np.diff(ranked) <= 0).all()
    assert (ranked[..., 0] == 0).all()
    assert (ranked[..., 1] < 0).all()


@pytest.mark.parametrize(
    ("curve", "margin", "shown"),
    [
        ("linear", 0, 6),
        ("linear", 1, 5),
        ("linear", 4, 2),
        ("linear", 5.9, 0.1),
        ("linear", 6, 12),
        ("linear", 6.1, 11.9),
        ("linear", 11.9, 6.1),
        ("sine", 3, 3),
        ("sine", 4, 0.3627),
        ("sine", 1, 4.6373),
        ("sine", 6, 6),
        ("sine", 8, 11.6373),
    ],
)
def test_target_margins_are_those_of_the_paper(curve, margin, shown):
    target = target_margin(torch.tensor([margin], dtype=torch.float64), curve, 6.0, ALPHA[curve])
    assert target.item() == pytest.approx(shown, abs=1e-4)


@pytest.mark.parametrize(("curve", "top", "shown", "margin", "confidence"), GOLDEN)
def test_adam_gives_the_golden_vectors(curve, top, shown, margin, confidence):
    z = torch.tensor([-3, -2, -1, 0, -4, -5, 0.5, top, -2.5, -1.5])
    out = disguise(z, curve=curve, temperature=T, beta=5.0, solver="adam", steps=100, lr=0.1)
    torch.testing.assert_close(out, torch.tensor(shown), atol=0.02, rtol=0)
    assert margins(out).item() == pytest.approx(margin, abs=0.02)
    assert confidences(out).item() == pytest.approx(confidence, abs=0.002)


@pytest.mark.parametrize("curve", ALPHA)
def test_adam_keeps_clear_labels_and_meets_targets_beyond_the_first_interval(curve):
    z = normal(2333, 10)
    out = disguise(z, curve=curve, temperature=T, solver="adam")
    margin = margins(z)
    assert torch.equal(out.argmax(1)[margin >= 1], z.argmax(1)[margin >= 1])
    missed = (margins(out) - targets(margin, curve, 6.0)).abs()[margin >= 6]
    assert len(missed) > 20
    assert missed.max() < 0.1


def test_no_adam_steps_change_nothing():
    z = normal(20, 10)
    assert torch.equal(disguise(z, solver="adam", steps=0), z)


@st.composite
def cases(draw, classes):
    finite = st.floats(-1e4, 1e4, width=32)
    z = torch.from_numpy(draw(hnp.arrays(np.float32, (4, classes), elements=finite)))
    z = z + normal(4, classes, scale=draw(st.sampled_from([0.0, 1.0, 1000.0])), seed=draw(st.integers(0, 99)))
    settings = {
        "curve": draw(st.sampled_from(["linear", "sine"])),
        "tau": draw(st.floats(0.01, 100)),
        "alpha": draw(st.none() | st.floats(0, 3)),
        "beta": draw(st.floats(0, 100) | st.just(1e17)),
        "temperature": draw(st.floats(0.05, 20)),
    }
    return z.clamp(-1e4, 1e4), settings


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_exact_keeps_the_label_and_the_ranking_for_any_logits_and_settings(classes):
    @settings(deadline=None, max_examples=40)
    @given(cases(classes))
    def check(case):
        z, chosen = case
        assert_label_and_ranking_kept(z, disguise(z, **chosen))

    check()


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_exact_breaks_ties_by_the_lower_index(classes, size):
    everything = torch.full((1, classes), size)
    few_levels = normal(30, classes, scale=1.0).round().clamp(-1, 1) * size
    assert_label_and_ranking_kept(everything, disguise(everything))
    assert_label_and_ranking_kept(few_levels, disguise(few_levels))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("rows", "classes"), [(333, 100), (777, 100), (3000, 10), (40, 1000), (64, 17), (7, 3), (5, 2)]
)
def test_rows_are_independent_of_their_batch_to_the_last_bit(rows, classes, solver):
    z = normal(rows, classes)
    chosen = {"solver": solver, "temperature": 1.37} | ({"steps": 20} if solver == "adam" else {})
    out = disguise(z, **chosen)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    assert torch.equal(disguise(z[order], **chosen), out[order])
    assert torch.equal(disguise(z[1:], **chosen), out[1:])
    assert torch.equal(disguise(z[::3], **chosen), out[::3])
    assert torch.equal(disguise(z.T.contiguous().T, **chosen), out)
    for i in range(0, rows, rows // 5):
        assert torch.equal(disguise(z[i], **chosen), out[i])
        assert torch.equal(disguise(z[i : i + 1], **chosen)[0], out[i])


def test_vector_and_scalar_arithmetic_agree_to_the_last_bit():
    z = normal(900, 10)
    in_parts_too_small_for_vectors = torch.cat([disguise(part, temperature=1.37) for part in z.split(3)])
    assert torch.equal(in_parts_too_small_for_vectors, disguise(z, temperature=1.37))


@pytest.mark.parametrize("curve", ALPHA)
@pytest.mark.parametrize(("classes", "rows"), [(2, 200), (3, 200), (10, 100), (100, 40), (1000, 10)])
def test_exact_is_never_worse_than_adam(classes, rows, curve):
    for seed, tau in enumerate((1.5, 6.0)):
        for temperature in (0.5, 1.0, 2.08):
            z, chosen = normal(rows, classes, seed=seed), {"curve": curve, "tau": tau, "temperature": temperature}
            exact = objective(z, disguise(z, **chosen), **chosen)
            adam = objective(z, disguise(z, **chosen, solver="adam"), **chosen)
            assert (exact - adam).max() <= 1e-4
            assert exact.mean() < adam.mean() - 1e-3


@pytest.mark.parametrize("curve", ALPHA)
@pytest.mark.parametrize("beta", [0.0, 3.0, 5.0, 20.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_exact_reaches_the_minimum_over_a_fine_grid_of_margins(classes, beta, curve):
    step = 2e-4
    m = torch.arange(0, 40, step, dtype=torch.float64)
    highest, lowest = 1 / (1 + torch.exp(-m)), 1 / (1 + (classes - 1) * torch.exp(-m))
    for tau, temperature in ((1.5, 0.5), (1.5, 2.08), (6.0, 1.0), (6.0, 8.0), (20.0, 8.0)):
        z = normal(5, classes)
        shown = disguise(z, curve=curve, tau=tau, temperature=temperature, beta=beta)
        scores = objective(z, shown, curve, tau, temperature, beta)
        p, target = confidences(z.double() / temperature), targets(margins(z).double(), curve, tau)
        for i in range(len(z)):
            distance = (p[i] - highest).clamp_min(0) + (lowest - p[i]).clamp_min(0)
            least = ((m - target[i]).abs() + beta * distance).min()
            slack = (1 + beta / 4) * 2e-5 + 1e-5  # the smallest margin shown, and float32
            assert -(1 + beta / 4) * step <= scores[i] - least <= slack


@pytest.mark.parametrize("beta", [0.0, 5.0, 50.0])
@pytest.mark.parametrize("size", [0.1, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_exact_shows_the_calibrated_confidence_as_far_as_the_margin_allows(classes, size, beta):
    for power, temperature in ((1, 2.08), (1, size), (3, size), (9, size)):
        z = size * normal(30, classes, scale=1.0) ** power  # higher powers: gaps of very different sizes
        shown = disguise(z, beta=beta, temperature=temperature)
        m, p = margins(shown.double()), confidences(z.double() / temperature)
        lowest, highest = 1 / (1 + (classes - 1) * torch.exp(-m)), 1 / (1 + torch.exp(-m))
        torch.testing.assert_close(confidences(shown), p.clamp(lowest, highest), atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_output_is_the_same_with_and_without_gradients(solver):
    z = normal(8, 10)
    out = disguise(z, solver=solver)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(disguise(z, solver=solver), out)
            assert torch.equal(disguise(z.clone(), solver=solver), out)
    from_trained = disguise(z.clone().requires_grad_(), solver=solver)
    assert torch.equal(from_trained, out)
    assert not from_trained.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_input_is_left_as_it_was(dtype, solver):
    z = normal(8, 10).to(dtype)
    before = z.clone()
    disguise(z, solver=solver).add_(1)
    assert torch.equal(z, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 0.3, 3.0, 1e3, 1e5])
def test_every_float_type_is_kept_with_its_label(dtype, size):
    largest = 65504.0 if dtype == torch.float16 else 1e6
    for classes in (2, 10, 100):
        z = normal(60, classes, scale=size).clamp(-largest, largest).to(dtype)
        for chosen in ({}, {"alpha": 3.0, "beta": 0.0}, {"curve": "sine", "tau": 0.1}):
            out = disguise(z, **chosen)
            assert out.dtype == dtype
            assert_label_and_ranking_kept(z, out)
        by_adam = disguise(z, solver="adam", steps=5)
        assert by_adam.dtype == dtype
        assert by_adam.isfinite().all()


def test_half_precision_is_computed_in_single_precision():
    z = normal(50, 10).half()
    assert torch.equal(disguise(z), disguise(z.float()).half())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5), (2, 0, 5), (1, 2)])
def test_leading_shapes_are_kept(shape, solver):
    z = normal(*shape)
    out = disguise(z, solver=solver)
    assert out.shape == z.shape
    assert torch.equal(out.reshape(-1, shape[-1]), disguise(z.reshape(-1, shape[-1]), solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.tensor([[1, 2]]), "floating-point"),
        (torch.tensor([[True, False]]), "floating-point"),
        (torch.tensor([[1.0, math.nan]]), "1 of 2 are NaN or infinite"),
        (torch.tensor([[1.0, -math.inf], [math.inf, 0.0]]), "2 of 4 are NaN or infinite"),
        (torch.zeros(3, 1), "K >= 2"),
        (torch.zeros(3, 0), "K >= 2"),
        (torch.tensor(1.0), "K >= 2"),
    ],
)
def test_logits_that_make_no_sense_are_refused(logits, message, solver):
    with pytest.raises(ValueError, match=message):
        disguise(logits, solver=solver)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"tau": 0.0}, "tau > 0"),
        ({"tau": -1.0}, "tau > 0"),
        ({"tau": math.inf}, "tau > 0 and finite"),
        ({"alpha": -0.1}, "alpha >= 0"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"beta": math.nan}, "beta >= 0 and finite"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"curve": "liner"}, "did you mean 'linear'"),
        ({"curve": "liner", "alpha": 1.0}, "did you mean 'linear'"),
        ({"solver": "adams"}, "did you mean 'adam'"),
        ({"steps": 50}, "no effect on 'exact'"),
        ({"lr": 0.01}, "no effect on 'exact'"),
        ({"solver": "adam", "steps": -1}, "steps >= 0"),
        ({"solver": "adam", "lr": 0.0}, "lr > 0"),
        ({"tau": "6"}, "tau as a number, but got '6'"),
        ({"beta": True}, "beta as a number, but got True"),
        ({"tau": 1e-9}, "tau of at least 1e-06"),
        ({"solver": "adam", "steps": 2.5}, "steps as a whole number, but got 2.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        disguise(torch.tensor([[1.0, 0.0, 0.0]]), **chosen)


def test_targets_below_zero_become_a_flat_edge():
    z = torch.zeros(60, 3)
    z[:, 0], z[:, 2] = torch.linspace(0.1, 5.9, 60), -3
    shown = margins(disguise(z, tau=6.0, alpha=2.0, beta=0.0))
    expected = 9 - 2 * z[:, 0]
    torch.testing.assert_close(shown, expected.clamp_min(2e-5), atol=1e-5, rtol=0)
    assert (shown > 0).all()
    assert (expected < 0).sum() > 10
