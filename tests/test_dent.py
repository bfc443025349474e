"""DENT against a network that is really changed, image by image."""

import copy

import pytest
import torch
from torch import nn

from helpers import Linear, images
from queryfoil.defenses.aaa import AAA
from queryfoil.defenses.dent import DENT, AdaMod, shot, tent
from queryfoil.models.resnet import ResNet


@pytest.fixture(scope="module")
def small():
    """A network whose batch norms have statistics and values of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet(widths=(4, 8))
        with torch.no_grad():
            for _ in range(5):
                model(torch.rand(16, 1, 28, 28))
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.weight.uniform_(0.5, 1.5)
                    layer.bias.uniform_(-0.5, 0.5)
            model.linear.weight.mul_(5)
    return model.eval()


def adapted_alone(model, x, steps):
    """Scores of one image from a copy whose batch norms torch's own Adam trains on its entropy."""
    model = copy.deepcopy(model).requires_grad_(False)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    parameters = [p.requires_grad_() for layer in layers for p in (layer.weight, layer.bias)]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(steps):
        p = model(x).softmax(1)
        optimizer.zero_grad()
        (-(p * p.log()).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return model(x)


def test_each_image_is_adapted_as_if_it_were_alone(small):
    x = images(5, (1, 28, 28))
    with torch.no_grad():
        together, raw = DENT(small)(x), small(x)
    alone = torch.cat([adapted_alone(small, one[None], 6) for one in x])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=0)
    assert float((alone - raw).abs().max()) > 5e-3


def test_without_a_step_the_answer_is_the_networks(small):
    x = images(3, (1, 28, 28))
    torch.testing.assert_close(DENT(small, steps=0)(x), small(x), atol=1e-5, rtol=0)


def test_adaptation_lowers_the_entropy(small):
    x = images(20, (1, 28, 28))
    with torch.no_grad():
        assert tent(DENT(small)(x)) < tent(small(x)) - 1e-3
        assert tent(DENT(small, steps=12)(x)) < tent(DENT(small)(x))


def test_the_original_loss_ties_images_together(small):
    model = DENT(small, loss="shot")
    assert DENT(small).rowwise is True
    assert model.rowwise is False
    x = images(6, (1, 28, 28))
    with torch.no_grad():
        assert not torch.allclose(model(x)[:2], model(x[:2]), atol=1e-4)


def test_entropy_and_diversity_of_two_rows_by_hand():
    z = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    half = torch.tensor(0.5).log()
    torch.testing.assert_close(tent(z), -half / 128)  # as if the batch were the release's
    quarter, rest = torch.tensor(0.75), torch.tensor(0.25)
    expected = -half / 2 + quarter * quarter.log() + rest * rest.log()
    torch.testing.assert_close(shot(z), expected, atol=1e-4, rtol=0)


def test_adamods_first_steps_by_hand():
    start = torch.tensor([[1.0, -2.0]])
    optimizer = AdaMod(start)
    gradient = torch.tensor([[0.5, -4.0]])
    first = optimizer(start, gradient)
    # the rate 0.006 / 0.01 / |g| is bounded by 0.4 of itself, and the first moment is 0.01 g
    torch.testing.assert_close(first, start - 0.4 * 0.006 * gradient.sign())
    second = optimizer(first, gradient)
    # rate 0.006 / 0.0199 / |g|, against 0.6 of the old mean and 0.4 of itself
    mean = 0.6 * 0.4 * 0.006 / 0.01 + 0.4 * 0.006 / 0.0199
    torch.testing.assert_close(second, first - min(mean, 0.006 / 0.0199) * 0.0199 * gradient.sign())


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="expected a network with BatchNorm2d"):
        DENT(Linear())


def test_nothing_is_left_behind(small):
    before = copy.deepcopy(small.state_dict())
    DENT(small)(images(2, (1, 28, 28)))
    assert all("forward" not in vars(layer) for layer in small.modules())
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert all(parameter.grad is None for parameter in small.parameters())


def test_an_error_of_the_network_leaves_no_hook_behind(small):
    with pytest.raises(RuntimeError):
        DENT(small)(torch.zeros(2, 3, 28, 28))
    assert all("forward" not in vars(layer) for layer in small.modules())


def test_a_network_in_training_mode_keeps_its_statistics(small):
    network = copy.deepcopy(small).train()
    before = copy.deepcopy(network.state_dict())
    DENT(network)(images(3, (1, 28, 28)))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", ["tent", "shot"])
def test_networks_of_any_precision_are_adapted(small, kind, loss):
    x = images(4, (1, 28, 28))
    network = copy.deepcopy(small).to(kind)
    scores = DENT(network, loss=loss)(x.to(kind))
    assert scores.dtype == kind
    assert bool(scores.isfinite().all())
    exact = DENT(small, loss=loss)(x)
    assert float((scores.float() - exact).abs().max()) < (0.01 if kind == torch.float64 else 1.0)


def test_a_defense_of_scores_or_another_dent_inside_is_refused_at_once(small):
    for inside in (AAA(small, tau=2.0), AAA(small, solver="adam", tau=2.0), DENT(small)):
        with pytest.raises(ValueError, match=rf"but {type(inside).__name__} stands between"):
            DENT(inside)


def test_a_network_that_turns_gradients_off_is_refused(small):
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small
            self.eval()

        @torch.no_grad()
        def forward(self, x):
            return self.network(x)

    with pytest.raises(ValueError, match="whose scores have gradients, but its forward turns them off"):
        DENT(Still())(images(2, (1, 28, 28)))


def test_adamod_is_its_releases_on_small_gradients():
    """Its release divides by (sqrt(v) + eps), and corrects the bias afterwards."""
    start, gradient = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 1e-6, dtype=torch.float64)
    optimizer, values, first, second, mean = AdaMod(start), start, 0.0, 0.0, 0.0
    for step in (1, 2, 3):
        values = optimizer(values, gradient)
        first, second = 0.99 * first + 0.01 * 1e-6, 0.999 * second + 0.001 * 1e-12
        rate = 6e-3 * (1 - 0.999**step) ** 0.5 / (1 - 0.99**step) / (second**0.5 + 1e-8)
        mean = 0.6 * mean + 0.4 * rate
        start = start - min(rate, mean) * first
        torch.testing.assert_close(values, start, rtol=1e-9, atol=0)
