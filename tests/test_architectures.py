"""The architectures of the paper: sizes, multiply-adds, and what their parts compute."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from queryfoil.models import zoo
from queryfoil.models.bottleneck import BottleneckResNet, Denoise, non_local_means
from queryfoil.models.checkpoints import PUBLISHED
from queryfoil.models.layers import FASHION, PSSiLU, SameConv2d, pad_same
from queryfoil.models.preact_resnet import PreActResNet
from queryfoil.models.resnet import Pad, ResNet
from queryfoil.models.thermometer import Thermometer, encode
from queryfoil.models.wide_resnet import Block, WideResNet

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


def on_meta(name):
    with torch.device("meta"):
        return PUBLISHED[name].build()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model, shape):
    """Of convolutions and linear layers, for one image."""
    total = 0

    def count(layer, _, out):
        nonlocal total
        total += out.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model.eval()(torch.zeros(1, *shape, device="meta"))
    return total


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [("Standard", CIFAR, 5.24e9), ("wide_resnet50_2", IMAGENET, 11.43e9), ("resnext101_32x8d", IMAGENET, 16.48e9)],
)
def test_multiply_adds_are_those_of_the_papers_table_9(name, shape, expected):
    assert multiply_adds(on_meta(name), shape) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Standard", 36_479_194),
        ("Dai2021Parameterizing", 36_479_194 + 2),
        ("Rade2021Helper_extra", 46_160_474),
        ("wide_resnet50_2", 68_883_240),
        ("Salman2020Do_50_2", 68_883_240),
        ("resnext101_32x8d", 88_791_336),
        ("PNI-W", 269_722 + 3 * (16 * 2) + 3 * (32 * 2) + 3 * (64 * 2) + 16 + 10),  # noise: one for each channel
    ],
)
def test_numbers_of_parameters_are_the_published_ones(name, expected):
    assert parameters(on_meta(name)) == expected


def test_a_block_of_a_wide_network_shares_the_activated_input_with_its_shortcut():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block(4, 6, 2, nn.ReLU(), same=False).eval()
        x = torch.randn(2, 4, 8, 8)
    activated = x.div(torch.tensor(1 + 1e-5).sqrt()).relu()
    inner = F.conv2d(activated, block.conv1.weight, stride=2, padding=1).div(torch.tensor(1 + 1e-5).sqrt()).relu()
    expected = F.conv2d(inner, block.conv2.weight, padding=1) + F.conv2d(activated, block.convShortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected)
    same = Block(4, 4, 1, nn.ReLU(), same=False).eval()
    same.conv2.weight.data.zero_()
    assert torch.equal(same(x), x)  # without a new width, the input itself goes on


def test_the_activation_of_a_network_is_one_module():
    model = WideResNet(10, 1, activation="pssilu")
    assert sum(isinstance(module, PSSiLU) for module in model.modules()) == 1
    assert sum(".activation.alpha" in key for key in model.state_dict()) == 3
    model.activation.alpha.data.fill_(2.0)
    x = torch.linspace(-2, 2, 5)
    torch.testing.assert_close(model.block1.layer[0].activation(x), x * torch.sigmoid(2 * x), atol=1e-6, rtol=0)


def test_pssilu_is_zero_at_zero_and_grows_like_x():
    activation = PSSiLU()
    activation.beta.data.fill_(-0.2)
    x = torch.tensor([0.0, 100.0, -100.0])
    torch.testing.assert_close(activation(x), torch.tensor([0.0, 100.0, 25.0]))  # (0 - 0.2) / 0.8 of -100


PADDED = [(7, 2, 224, (2, 3)), (3, 2, 112, (0, 1)), (3, 2, 7, (1, 1)), (3, 1, 5, (1, 1)), (1, 2, 4, (0, 0))]


@pytest.mark.parametrize(("kernel", "stride", "size", "sides"), PADDED)
def test_tensorflows_padding_puts_the_odd_rest_behind(kernel, stride, size, sides):
    x = torch.ones(1, 1, size, 4)
    padded = pad_same(x, kernel, stride)
    assert padded.shape[2] == size + sum(sides)
    assert padded[0, 0, : sides[0]].sum() == 0
    assert padded[0, 0, sides[0] :, 4 // 2].sum() == size
    out = SameConv2d(1, 1, kernel, stride)(x)
    assert out.shape[2] == -(-size // stride)


def test_the_mean_over_similar_pixels_is_that_of_a_loop():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros_like(x)
    pixels = x.flatten(2)
    for i in range(20):
        for j in range(20):
            alike = (pixels[:, :, i] * pixels[:, :, j]).sum(1, keepdim=True)
            expected.flatten(2)[:, :, i] += alike * pixels[:, :, j] / 20
    torch.testing.assert_close(non_local_means(x), expected)
    wide = torch.randn(2, 30, 2, 3, generator=torch.Generator().manual_seed(0))  # more channels than pixels
    flat = wide.flatten(2).double()
    torch.testing.assert_close(
        non_local_means(wide).flatten(2).double(), flat @ (flat.transpose(1, 2) @ flat) / 6, atol=1e-4, rtol=1e-4
    )


def test_denoising_adds_to_its_input():
    layer = Denoise(3).eval()
    layer.bn.weight.data.zero_()
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(layer(x), x)


def test_the_denoising_network_sees_blue_first_and_from_minus_one_to_one():
    model = PUBLISHED["X101-DenoiseAll"]
    small = BottleneckResNet((1,), base=4, group_width=4, bgr=True, normalize=([0.5], [0.5]), classes=5).eval()
    assert on_meta("X101-DenoiseAll").bgr
    assert model.build.__name__ == "_denoising"
    seen = []
    small.conv1.register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    x = torch.rand(1, 3, 32, 32)
    small(x)
    torch.testing.assert_close(seen[0], 2 * x[:, [2, 1, 0]] - 1)


def test_a_shortcut_without_parameters_takes_every_second_pixel_and_adds_zeros():
    x = torch.rand(1, 2, 4, 4)
    out = Pad(5)(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[:, :2], F.avg_pool2d(x, 1, 2))
    assert out[:, 2:].abs().sum() == 0


def test_thermometer_codes_count_the_thresholds_below_a_value():
    x = torch.tensor([0.0, 0.2, 0.25, 0.6, 1.0]).view(5, 1, 1, 1)
    assert encode(x, 4).sum((1, 2, 3)).tolist() == [0, 1, 1, 3, 4]
    colour = torch.rand(2, 3, 4, 4)
    assert torch.equal(encode(colour, 8)[:, 8:16], encode(colour[:, 1:2], 8))


def test_the_gradient_of_a_code_is_that_of_its_ramp():
    x = torch.tensor([[[[0.3]]]], requires_grad=True)
    bits = encode(x, 4).flatten()
    gradients = [torch.autograd.grad(bit, x, retain_graph=True)[0].item() for bit in bits]
    assert gradients == [0, 4, 0, 0]  # 0.3 lies on the ramp of the second bit


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_shipped_architecture_is_small_and_trains(name):
    model = zoo.MODELS[name]()
    assert 50_000 < parameters(model) < 370_000
    x = torch.rand(4, 1, 28, 28, requires_grad=True)
    scores = model.train()(x)
    assert scores.shape == (4, 10)
    F.cross_entropy(scores, torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WideResNet(12, 1), "expected a depth of 10, 16"),
        (lambda: WideResNet(10, 1, activation="gelu"), "unknown activation 'gelu'"),
        (lambda: ResNet(shortcut="none"), "unknown shortcut 'none'"),
        (lambda: Thermometer(nn.Flatten, levels=1), "expected at least 2 levels"),
    ],
)
def test_unknown_settings_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_pre_activation_network_has_3x3_shortcuts_from_the_raw_input():
    model = PreActResNet((4, 8), blocks=1, normalize=FASHION, channels=1)
    block = model.layer_1[0]
    assert block.shortcut.kernel_size == (3, 3)
    block.conv_2d_2.weight.data.zero_()
    x = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(block.eval()(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), block.shortcut.weight, stride=2))
