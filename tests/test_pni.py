"""PNI and ensembles."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import images
from queryfoil import rng
from queryfoil.defenses.ensemble import Ensemble
from queryfoil.defenses.pni import PNI
from queryfoil.models.resnet import ResNet
from queryfoil.oracle import answers


@pytest.fixture
def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet((16, 32, 64), shortcut="pad").eval()


def layer(alpha, channelwise=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PNI(nn.Sequential(nn.Flatten(), nn.Linear(4000, 3)).eval(), alpha=alpha, channelwise=channelwise)


def test_the_noise_has_the_strength_of_alpha_times_the_spread_of_the_weights():
    model = layer(0.5)
    weights = model.model[1].parametrizations.weight
    raw = weights.original
    weights[0].alpha.data.copy_(torch.tensor([0.5, 1.0, 0.0]))
    with rng.rows(0, torch.arange(1), torch.ones(1, dtype=torch.int64)):
        noise = (model.model[1].weight - raw).detach() / raw.std().detach()
    assert float(noise[0].std()) == pytest.approx(0.5, rel=0.05)
    assert float(noise[1].std()) == pytest.approx(1.0, rel=0.05)
    assert abs(float(noise[:2].mean())) < 0.04
    assert not bool(noise[2].any())
    assert abs(float((noise[0] * noise[1]).mean())) < 0.03


@pytest.mark.parametrize(("channelwise", "numbers"), [(True, 3), (False, 1)])
def test_one_number_a_channel_or_a_layer(channelwise, numbers):
    assert layer(0.5, channelwise).model[1].parametrizations.weight[0].alpha.shape == (numbers,)


def test_alpha_is_trained():
    model = layer(0.5)
    model.train()(torch.rand(2, 1, 40, 100)).square().sum().backward()
    assert bool((model.model[1].parametrizations.weight[0].alpha.grad != 0).all())


def test_the_model_is_copied(small):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    PNI(small)
    assert list(before) == list(small.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_without_noise_it_is_the_model(small):
    x = images(3, (1, 28, 28))
    torch.testing.assert_close(PNI(small, alpha=0.0)(x), small(x))


def test_an_answer_depends_on_seed_and_query_and_not_on_the_batch(small):
    model, x, ids = PNI(small), images(6, (1, 28, 28)), torch.arange(6)
    queries = torch.tensor([1, 2, 1, 3, 2, 1])
    mixed = answers(model, x, ids, queries)
    for query in (1, 2, 3):
        rows = queries == query
        assert torch.equal(answers(model, x[rows], ids[rows], queries[rows]), mixed[rows])
    again = answers(model, x, ids, queries)
    assert torch.equal(again, mixed)
    assert not torch.equal(answers(model, x, ids, queries + 3), mixed)
    assert not torch.equal(answers(model, x, ids, queries, seed=1), mixed)


def test_all_images_at_a_query_see_the_same_weights():
    model, x = layer(1.0), images(1, (1, 40, 100)).expand(4, -1, -1, -1)
    one = answers(model, x, torch.arange(4), torch.ones(4, dtype=torch.int64))
    assert bool((one == one[0]).all())


def test_in_a_service_every_call_draws_anew(small):
    model, x = PNI(small), images(2, (1, 28, 28))
    assert not torch.equal(model(x), model(x))


def test_two_calls_at_one_query_draw_different_noise(small):
    model, x = PNI(small), images(2, (1, 28, 28))
    with rng.rows(0, torch.arange(2), torch.ones(2, dtype=torch.int64)):
        assert not torch.equal(model(x), model(x))


def test_shared_noise_for_mixed_queries_raises():
    with rng.rows(0, torch.arange(2), torch.tensor([1, 2])), pytest.raises(ValueError, match="one query number"):
        rng.shared_noise_like(torch.zeros(3))


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="expected a model with convolutions"):
        PNI(nn.Flatten())


# ensembles


def test_an_ensemble_gives_the_logarithm_of_the_mean_probability(small):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        other = ResNet((16, 32, 64), stride=1).eval()
    x = images(4, (1, 28, 28))
    expected = (F.softmax(small(x), 1) + F.softmax(other(x), 1)) / 2
    torch.testing.assert_close(Ensemble([small, other])(x).exp(), expected)


def test_probabilities_of_zero_stay_finite_and_carry_gradients():
    class Sure(nn.Module):
        def forward(self, x):
            return torch.cat([x, -x], 1)

    x = torch.full((1, 1), 300.0, requires_grad=True)
    scores = Ensemble([Sure(), Sure()])(x)
    assert bool(scores.isfinite().all())
    scores.sum().backward()
    assert bool(x.grad.isfinite().all())


def test_one_member_or_other_scores_are_refused(small):
    with pytest.raises(ValueError, match="expected at least 2 members, but got 1"):
        Ensemble([small])
    with pytest.raises(ValueError, match="expected members that give logits"):
        Ensemble([small, Ensemble([small, small])])


def test_a_random_member_makes_the_ensemble_random(small):
    assert Ensemble([small, small]).deterministic is True
    assert Ensemble([small, PNI(small)]).deterministic is False
