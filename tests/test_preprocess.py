"""Input preprocessing against the plainest way to compute the same."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import images, levels
from queryfoil import rng
from queryfoil.defenses.preprocess import JPEG, BitDepth, Median, TotalVariation, _variation_slope


class Seen(nn.Module):
    """Answers with what it sees."""

    def forward(self, x):
        return x


def seen(kind, x, **settings):
    with rng.rows(0, torch.arange(len(x)), torch.ones(len(x), dtype=torch.int64)):
        return kind(Seen(), **settings)(x)


def test_bit_depth_rounds_to_the_nearest_level():
    x = torch.arange(256).view(1, 1, 16, 16) / 255
    assert seen(BitDepth, x, bits=3).unique().tolist() == [pytest.approx(i / 7) for i in range(8)]
    assert float((seen(BitDepth, x, bits=3) - x).abs().max()) <= 0.5 / 7 + 1e-6
    assert torch.equal((seen(BitDepth, x, bits=8) * 255).round(), x * 255)
    assert seen(BitDepth, torch.tensor([[[[0.49, 0.51]]]]), bits=1).flatten().tolist() == [0, 1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [20, 75])
def test_jpeg_is_pillows(channels, quality):
    x = images(3, (channels, 20, 17))
    shown = seen(JPEG, x, quality=quality)
    for one, got in zip(levels(x), levels(shown), strict=True):
        array = one.byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(array.squeeze()).save(file, format="jpeg", quality=quality, subsampling=2)
        expected = np.asarray(Image.open(file)).reshape(array.shape)
        assert np.array_equal(got.permute(1, 2, 0).numpy(), expected)
    assert not torch.equal(shown, x)


def test_jpeg_of_other_channels_raises():
    with pytest.raises(ValueError, match=r"expected grey or RGB images .* got 2 channels"):
        seen(JPEG, images(1, (2, 8, 8)))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_median_is_that_of_a_loop(size):
    x = images(2, (3, 7, 6))
    before, after = (size - 1) // 2, size // 2
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (before, after), (before, after)), mode="reflect")
    expected = np.empty_like(x.numpy())
    for i in range(7):
        for j in range(6):
            window = padded[:, :, i : i + size, j : j + size].reshape(2, 3, -1)
            expected[:, :, i, j] = np.sort(window, axis=-1)[:, :, (size * size - 1) // 2]
    assert np.array_equal(seen(Median, x, size=size).numpy(), expected)


def variation(z, smooth):
    total = 0.0
    for plane in z.flatten(0, 1).double():
        h, w = plane.shape
        for i in range(h):
            for j in range(w):
                dx = plane[i, j + 1] - plane[i, j] if j + 1 < w else 0.0
                dy = plane[i + 1, j] - plane[i, j] if i + 1 < h else 0.0
                total = total + (dx**2 + dy**2 + smooth**2) ** 0.5
    return total


def test_the_slope_of_the_total_variation_is_its_gradient():
    z = images(2, (2, 4, 5)).double().requires_grad_()
    (expected,) = torch.autograd.grad(variation(z, 0.1), z)
    torch.testing.assert_close(_variation_slope(z.detach(), 0.1), expected)


def test_total_variation_ends_near_the_minimum_and_smooths():
    x = images(2, (1, 12, 12))
    shown, more = (seen(TotalVariation, x, keep=1.0, weight=0.1, steps=steps) for steps in (50, 3000))

    def objective(z):
        return float((z - x).double().square().sum() / 2 + 0.1 * variation(z, 0.01))

    assert objective(more) <= objective(shown) < 1.01 * objective(more)
    assert objective(shown) < 0.9 * objective(x)
    assert variation(shown, 0.01) < 0.35 * variation(x, 0.01)


def test_total_variation_keeps_what_is_flat_and_forgets_a_dropped_pixel():
    flat = torch.full((1, 1, 8, 8), 0.5)
    torch.testing.assert_close(seen(TotalVariation, flat), flat)
    x = torch.zeros(400, 1, 9, 9)
    x[:, :, 4, 4] = 1.0
    peaks = seen(TotalVariation, x, keep=0.5, weight=0.02, steps=300)[:, 0, 4, 4]
    dropped = float((peaks < 0.1).double().mean())
    assert abs(dropped - 0.5) < 4 * math.sqrt(0.25 / 400)
    assert float(peaks.max()) > 0.8


def test_every_pixel_kept_and_hardly_a_weight_changes_hardly_anything():
    x = images(2, (1, 8, 8))
    torch.testing.assert_close(seen(TotalVariation, x, keep=1.0, weight=1e-6), x, atol=1e-4, rtol=0)
