"""RLS: the factor's law, and what a loss without a scale sees."""

import pytest
import torch
from torch import nn

from helpers import Declared
from queryfoil import rng
from queryfoil.defenses.noise import OutputNoise
from queryfoil.defenses.rls import RLS, normal


def logits(n, classes=10):
    return 5 * torch.randn(n, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shown(model, z, queries=None, ids=None):
    ids = torch.arange(len(z)) if ids is None else ids
    with rng.rows(0, ids, torch.ones(len(z)).long() if queries is None else queries):
        return model(z)


def factors(model, z, queries=None, ids=None):
    ratio = shown(model, z, queries, ids) / z
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=0)
    return ratio[:, 0]


def test_the_factor_is_uniform_from_a_half_to_ten():
    found = factors(RLS(nn.Identity()), logits(4000)).sort().values
    assert float(found[0]) > 0.5
    assert float(found[-1]) < 10
    expected = 0.5 + 9.5 * (torch.arange(4000) + 0.5) / 4000
    assert float((found - expected).abs().max()) < 9.5 * 1.95 / 4000**0.5  # Kolmogorov and Smirnov, 0.1 %
    assert float(found.std()) == pytest.approx(2.74, abs=0.08)


def test_the_normal_law_is_folded_and_cut_at_a_fifth():
    found = factors(RLS(nn.Identity(), law="normal"), logits(4000))
    assert float(found.min()) >= 0.2
    assert float(found.median()) == pytest.approx(67.5, abs=5)  # of |N(1, 100^2)|
    assert float(found.square().mean().sqrt()) == pytest.approx(100, rel=0.05)
    torch.testing.assert_close(normal(torch.tensor([0.0, -0.0101, -1.0])), torch.tensor([1.0, 0.2, 99.0]).double())


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_a_loss_without_a_scale_sees_the_raw_logits(law):
    def ratio(scores):
        first, second, third = scores.sort(descending=True).values[:, :3].T
        return (first - second) / (first - third)

    z = logits(500)
    torch.testing.assert_close(ratio(shown(RLS(nn.Identity(), law=law), z)), ratio(z), atol=1e-12, rtol=0)


def test_each_image_and_query_has_its_own_factor():
    z, model = logits(6), RLS(nn.Identity())
    first, second = (factors(model, z, torch.full((6,), query)) for query in (1, 2))
    assert len({*first.tolist(), *second.tolist()}) == 12
    assert not torch.equal(model(z), model(z))


def test_a_shared_factor_is_the_same_for_all_images_at_a_query():
    z, model = logits(6), RLS(nn.Identity(), shared=True)
    assert model.rowwise is False
    assert OutputNoise(model).rowwise is False
    assert RLS(nn.Identity()).rowwise is True
    queries = torch.tensor([3, 1, 3, 2, 1, 3])
    found = factors(model, z, queries)
    assert len({round(value, 9) for value in found.tolist()}) == 3
    torch.testing.assert_close(found[queries == 3], found[:1].expand(3))
    alone = factors(model, z[3:4], queries[3:4], torch.tensor([3]))
    torch.testing.assert_close(alone, found[3:4])
    service = model(z) / z
    torch.testing.assert_close(service, service[:1, :1].expand_as(service))
    assert not torch.equal(model(z), model(z))


@pytest.mark.parametrize("output", ["log_probs", "probs"])
def test_probabilities_are_raised_to_the_power_of_the_factor(output):
    z = logits(50) / 5
    scaled = shown(RLS(nn.Identity()), z)
    model = RLS(Declared(nn.Identity(), output))
    given = shown(model, z)
    torch.testing.assert_close(given.exp() if output == "log_probs" else given, scaled.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_no_rounding_changes_the_label(law, dtype):
    for scale in (1e-6, 1.0, torch.finfo(dtype).max / 50):
        z = (logits(400, 6) * scale / 5).to(dtype)
        top = z.argmax(1, keepdim=True)
        near = torch.nextafter(z.gather(1, top), torch.full_like(z[:, :1], -torch.inf))
        z = z.scatter(1, (top + 1) % 6, near)  # one step below the top
        for output in ("logits", "probs"):
            model = RLS(Declared(nn.Identity(), "logits"), law=law)
            model.output = output
            given = z if output == "logits" else z.double().softmax(1).float()
            scores = shown(model, given)
            assert bool(scores.isfinite().all())
            assert torch.equal(scores.argmax(1), given.argmax(1))
            top2 = scores.topk(2).values
            assert bool((top2[:, 0] > top2[:, 1]).all())
