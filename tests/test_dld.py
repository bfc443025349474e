"""DLD against its map written out, and the inverse of it."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from helpers import Declared
from queryfoil import losses
from queryfoil.defenses.dld import DLD, dashed, dashed_margin
from queryfoil.oracle import answers

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def margins(scores):
    top2 = scores.topk(2, dim=-1).values
    return top2[..., 0] - top2[..., 1]


def by_loop(m, tau, h, s, rho):
    """In exact fractions, dash by dash: high in the open intervals ((k - rho) s, k s) for k = 1, 2, ..."""
    m, tau, h, s, rho = map(Fraction, (m, tau, h, s, rho))
    low = m // tau * tau
    r = m - low
    k, high = 1, False
    while (k - rho) * s < 1:
        high |= (k - rho) * s < r / tau < k * s
        k += 1
    return float(low + h * tau + (1 - h) * r if high else low + h * tau - h * r)


def test_the_map_at_known_margins():
    raw = torch.tensor([0, 0.1, 0.2, 5.98, 5.87, 6.1], dtype=torch.float64)
    shown = torch.tensor([1.8, 1.77, 1.94, 5.986, 0.039, 7.77], dtype=torch.float64)
    torch.testing.assert_close(dashed_margin(raw), shown, atol=1e-12, rtol=0)
    z = torch.stack([raw + 1, torch.ones_like(raw), raw - raw - 2], 1)
    torch.testing.assert_close(margins(dashed(z)), shown, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("tau", "h", "s", "rho"), [(6.0, 0.3, 0.04, 0.5), (2.0, 0.7, 0.3, 0.25), (1.5, 0.5, 1.0, 1.0)])
def test_the_map_is_that_of_a_loop_over_dashes(tau, h, s, rho):
    raw = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    shown = dashed_margin(raw, tau=tau, low_slope=h, step=s, high_ratio=rho)
    expected = torch.tensor([by_loop(m, tau, h, s, rho) for m in raw.tolist()], dtype=torch.float64)
    torch.testing.assert_close(shown, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("tau", [6.0, 1.5, 0.7, 3.3])
@pytest.mark.parametrize("dashes", [25, 10, 7, 49])
def test_the_ends_of_all_dashes_are_low(tau, dashes):
    k, s = torch.arange(1, dashes + 1, dtype=torch.float64), 1 / dashes
    ends = torch.cat([(k - 0.5) * s * tau, k[:-1] * s * tau, torch.zeros(1, dtype=torch.float64)])
    shown = dashed_margin(ends, tau=tau, step=s)
    torch.testing.assert_close(shown, 0.3 * tau - 0.3 * ends, atol=1e-9, rtol=0)
    inside = torch.cat([(k - 0.5) * s * tau + 1e-6, k * s * tau - 1e-6])
    shown = dashed_margin(inside, tau=tau, step=s)
    torch.testing.assert_close(shown, 0.3 * tau + 0.7 * inside, atol=1e-9, rtol=0)


def test_half_of_each_dash_is_high_and_the_ratio_is_0_and_1_at_its_limits():
    raw = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 60
    start = (raw / 6).floor() * 6 + 1.8
    for ratio, share in ((0.0, 0.0), (0.2, 0.2), (0.5, 0.5), (1.0, 1.0)):
        high = dashed_margin(raw, high_ratio=ratio) > start
        assert float(high.double().mean()) == pytest.approx(share, abs=0.015 if 0 < share < 1 else 1e-9)


def test_who_knows_tau_and_h_reads_the_raw_margin():
    tau, h = 6.0, 0.3
    raw = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 40
    shown = dashed_margin(raw)
    start = (shown / tau).floor() * tau
    q = shown - start
    rest = torch.where(q > h * tau, (q - h * tau) / (1 - h), tau - q / h)
    torch.testing.assert_close(start + rest, raw, atol=1e-12, rtol=0)


def test_the_release_rewrites_only_the_top_logit():
    z = 5 * torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    before = z.clone()
    shown = DLD(nn.Identity(), canonical=False)(z)
    changed = shown != z
    assert torch.equal(z, before)
    assert int(changed.sum(1).max()) == 1
    assert bool(changed.gather(1, z.argmax(1, keepdim=True)).all())
    torch.testing.assert_close(margins(shown), dashed_margin(margins(z)), atol=1e-5, rtol=0)


def test_a_tie_becomes_a_clear_answer_for_the_lower_index():
    shown = dashed(torch.tensor([[1.0, 2.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0]]), canonical=False)
    torch.testing.assert_close(shown, torch.tensor([[1.0, 3.8, 0.0, 2.0], [4.8, 3.0, 3.0, 3.0]]))


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1e-6, 6.0, 1e4])
def test_no_rounding_changes_the_label(dtype, tau, canonical):
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1.0, 1e4, torch.finfo(dtype).max / 10):
        z = (torch.randn(500, 6, generator=generator, dtype=torch.float64) * scale).to(dtype)
        z = z.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        top = z.argmax(1, keepdim=True)
        best = z.gather(1, top)
        near = torch.nextafter(best, torch.full_like(best, -torch.inf))
        for rival in (near, best):  # of a tie, the lower index answers
            tight = z.scatter(1, (top + 1) % 6, rival)
            shown = dashed(tight, tau=tau, canonical=canonical)
            assert shown.dtype == dtype
            assert bool(shown.isfinite().all())
            assert torch.equal(shown.argmax(1), tight.argmax(1))
            assert bool((margins(shown) > 0).all())


def test_the_top_of_the_range_of_a_type_still_answers():
    largest = torch.finfo(torch.float32).max
    z = torch.tensor([[0.5 * largest, largest, largest], [-largest, -largest, 0.0], [largest, -largest, largest]])
    shown = dashed(z)
    assert bool(shown.isfinite().all())
    assert shown.argmax(1).tolist() == [1, 2, 0]
    assert bool((margins(shown) > 0).all())


@pytest.mark.parametrize("output", ["logits", "log_probs", "probs"])
def test_the_smallest_margins_are_a_clear_answer_to_an_oracle(output):
    raw = torch.tensor([6 - 1e-6, 12 - 1e-6, 5.9999, 0.0, 1e-6])[:, None]  # the first falls to 3e-7
    z = torch.cat([torch.zeros(5, 7), raw], 1).double()
    x = z.view(5, 1, 1, 8)
    model = DLD(Declared(nn.Flatten(), output), high_ratio=0.0)
    scores = answers(model, x, torch.arange(5), torch.ones(5).long())
    labels = z.argmax(1)
    assert bool((losses.margin(scores.float(), labels) > 1e-5).all())


def test_canonical_rows_show_the_same_margins_and_no_offset():
    z = 5 * torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    plain, canonical = DLD(nn.Identity(), canonical=False)(z), DLD(nn.Identity())(z)
    torch.testing.assert_close(plain - plain.amax(1, keepdim=True), canonical, atol=1e-5, rtol=0)
    assert not bool(canonical.amax(1).any())
    falling = torch.tensor([[5.0, 5.0 + 6 - 1e-6, 0.0]], dtype=torch.float64)  # to a margin of 3e-7, shown as 2e-5
    torch.testing.assert_close(
        dashed(falling, high_ratio=0.0),
        torch.tensor([[-2e-5, 0, -5 - 2e-5]], dtype=torch.float64),
        atol=1e-9,
        rtol=0,
    )
    moved = z.double() + torch.arange(300).double()[:, None]
    torch.testing.assert_close(dashed(moved), dashed(z.double()), atol=1e-9, rtol=0)


def test_the_sum_of_the_logits_tells_the_raw_margin_unless_canonical(network, clothes):
    with torch.no_grad():
        z = network(clothes.images[:500])
        plain, canonical = DLD(network, canonical=False)(clothes.images[:500]), DLD(network)(clothes.images[:500])

    def guess(shown):
        """The raw margin but for a constant, if the sum of the raw logits is always the same."""
        ordered = shown.sort(1, descending=True).values
        return -ordered[:, 1:].sum(1) - ordered[:, 1]

    told = [float(np.corrcoef(margins(z), guess(shown))[0, 1]) for shown in (plain, canonical)]
    assert told[0] > 0.99
    assert told[1] < 0.8


@pytest.mark.parametrize("output", ["log_probs", "probs"])
def test_canonical_makes_no_difference_to_probabilities(output):
    z = 5 * torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    scores = z.log_softmax(1) if output == "log_probs" else z.softmax(1)
    plain, canonical = (DLD(Declared(nn.Identity(), output), canonical=way)(scores) for way in (False, True))
    torch.testing.assert_close(plain, canonical, atol=1e-6, rtol=1e-5)
    assert not torch.equal(plain, scores)


def test_wrong_logits_raise():
    for wrong, reason in (
        (torch.zeros(2, 1), "K >= 2"),
        (torch.zeros(2, 3).long(), "floating-point"),
        (torch.tensor([[0.0, math.nan]]), "finite"),
    ):
        with pytest.raises(ValueError, match=reason):
            dashed(wrong)
    with pytest.raises(ValueError, match="expected low_slope > 0 and < 1, but got 0"):
        dashed_margin(torch.ones(1), low_slope=0)
