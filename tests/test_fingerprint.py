"""Hashes and signatures of images: who shares them, and that they are nothing without the key."""

import numpy as np
import pytest
from numpy.typing import NDArray

from queryfoil import data
from queryfoil.deploy.fingerprint import KEPT, Fingerprint, levels

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return levels(data.load("fashion-mnist", "attack").images[:200].numpy())


def shared(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The share of each signature (N, k) that is in the other's."""
    return np.array([np.isin(x, y).mean() for x, y in zip(a, b, strict=True)])


def test_variants_share_most_of_a_signature_and_other_images_do_not(images: NDArray[np.uint8]) -> None:
    clean, rng = Fingerprint(KEY).coarse(images), np.random.default_rng(0)
    assert clean.shape == (200, KEPT)
    noisy = np.clip(images + rng.integers(-8, 9, images.shape), 0, 255).astype(np.uint8)
    assert np.quantile(shared(Fingerprint(KEY).coarse(noisy), clean), 0.05) >= 0.5
    others = np.roll(clean, 1, axis=0)
    assert np.quantile(shared(clean, others), 0.95) < 0.5


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (3, 33, 50), (3, 224, 224)])
def test_every_shape_has_a_signature_of_its_own(shape: tuple[int, int, int]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    found = Fingerprint(KEY).coarse(x)
    assert found.shape[0] == 2
    assert 1 <= found.shape[1] <= KEPT
    assert np.array_equal(found[1], Fingerprint(KEY).coarse(x[1:])[0])  # whatever else is in the batch
    turned = Fingerprint(KEY).coarse(x.transpose(0, 1, 3, 2).copy())
    if shape[1] != shape[2]:
        assert not np.isin(turned, found).any()


def test_hashes_know_equal_images_of_equal_shape(images: NDArray[np.uint8]) -> None:
    found = Fingerprint(KEY).hashes(images)
    assert len(set(found)) == len(np.unique(images.reshape(200, -1), axis=0))
    changed = images[:1].copy()
    changed[0, 0, 5, 5] ^= 1
    assert Fingerprint(KEY).hashes(changed) != found[:1]
    assert Fingerprint(KEY).hashes(images[:1].reshape(1, 1, 14, 56)) != found[:1]


def test_nothing_is_the_same_under_another_key(images: NDArray[np.uint8]) -> None:
    one, other = Fingerprint(KEY), Fingerprint(KEY[::-1])
    assert not set(one.hashes(images)) & set(other.hashes(images))
    assert np.isin(one.coarse(images), other.coarse(images)).mean() < 1e-3
    assert one.id != other.id


def test_bytes_are_the_nearest_and_others_are_refused() -> None:
    x = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16) / 255
    assert levels(x).ravel().tolist() == list(range(256))
    assert levels(x[:, :, :1] + np.float32(1e-4)).ravel().tolist() == list(range(16))
    for bad in (x * 255, x - 1, np.full((1, 1, 2, 2), np.nan, np.float32)):
        with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
            levels(bad)
    with pytest.raises(ValueError, match=r"expected images \(N, C, H, W\)"):
        levels(x[0])
    with pytest.raises(ValueError, match="expected a key of 16 to 64 bytes"):
        Fingerprint(b"short")
