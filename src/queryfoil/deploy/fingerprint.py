"""What the query log keeps of an image: a keyed hash, and a coarse signature that near-duplicates share.

The signature is in the spirit of Blacklight (Li et al., "Blacklight: Scalable Defense for Neural Networks against
Query-Based Black-Box Attacks", USENIX Security 2022): hashes of windows of the quantized image, of which the few that a
keyed order puts first are kept. Two images with most windows in common then have most of these in common. Other than
there, the image is made small and smooth first, so that noise in each pixel does not hide a near-duplicate; windows
in which nothing happens count last, as all pictures of things before the same background have them; and the secret
offsets of the levels make a window's hash depend on where it is.

All is derived from one secret key. Without it, a hash is a random number that is the same for the same image, and the
signature a set of random numbers. With it, guesses can be tested: of an image, or of the content of a window.
"""

import hashlib
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CELLS = 32  # an image has at most so many in height and width, each the mean over some pixels and all channels
WINDOW = 12  # cells one after the other, row by row
STEP = 85  # bytes between two levels
KEPT = 24  # windows
EDGE = 20  # bytes between neighbouring cells: a window with less of a change is flat
LEVELS = 255 // STEP + 2
EDGES, COUNTED = np.uint64(255), np.uint64(8)  # bits of a sum that count the edges in its window
FLAT = np.uint64(1 << 63)
SHAPES = 64  # image shapes whose tables are remembered

Levels = NDArray[np.uint8]


class _Tables(NamedTuple):
    """Secrets for images of one shape."""

    block: int  # pixels that a cell is high and wide
    padded: NDArray[np.int64]  # (height + 2, width + 2), the cells with their borders continued
    weight: int  # pixel values summed in a smoothed cell
    offsets: NDArray[np.int32]  # (cells,), below STEP * weight
    codes: NDArray[np.uint64]  # (cells * LEVELS,), a random number for each level of each cell
    places: NDArray[np.int64]  # (cells,), where the codes of each cell begin


def levels(images: NDArray[np.float32]) -> Levels:
    """Images (N, C, H, W) in [0, 1] as the nearest bytes; ValueError for other shapes and values.

    >>> levels(np.full((1, 1, 1, 2), 0.5, np.float32)).tolist()
    [[[[128, 128]]]]
    """
    x = np.asarray(images)
    if x.ndim != 4 or 0 in x.shape[1:] or x.dtype.kind != "f":
        raise ValueError(f"expected images (N, C, H, W) as floats in [0, 1], but got {x.dtype} {x.shape}")
    scaled = x * np.float32(255) + np.float32(0.5)
    if len(x) and not (scaled.min() > -0.5 and scaled.max() < 256.5):  # NaN is neither
        raise ValueError(
            f"expected images in [0, 1], but got values from {x.min():.4g} to {x.max():.4g}; divide bytes by 255"
        )
    found: Levels = np.minimum(scaled, np.float32(255.5), out=scaled).astype(np.uint8)
    return found


class Fingerprint:
    """Hashes and signatures of images under a secret key (16 to 64 bytes).

    >>> fingerprint = Fingerprint(bytes(32))
    >>> image = np.arange(784, dtype=np.uint8).reshape(1, 1, 28, 28)
    >>> fingerprint.hashes(image) == fingerprint.hashes(image.copy())
    True
    >>> near = image.copy()
    >>> near[0, 0, 3, 3] += 16
    >>> shared = set(fingerprint.coarse(near)[0].tolist()) & set(fingerprint.coarse(image)[0].tolist())
    >>> len(shared) >= KEPT // 2
    True
    """

    def __init__(self, key: bytes) -> None:
        if not 16 <= len(key) <= 64:
            raise ValueError(f"expected a key of 16 to 64 bytes, but got {len(key)}")
        hashed = partial(hashlib.blake2b, key=key)
        self._key = key
        self._image = hashed(digest_size=8, person=b"image")
        self._window = hashed(digest_size=4, person=b"window")
        self._tables: dict[tuple[int, ...], _Tables] = {}
        self.id = hashed(digest_size=4, person=b"id").hexdigest()  # tells whether two logs have the same key

    def hashes(self, images: Levels) -> list[int]:
        """A hash of each image (N, C, H, W), 64 bits; the same for the same bytes and shape."""
        start = self._image.copy()
        start.update(repr(images.shape[1:]).encode())
        found = []
        for image in images:
            one = start.copy()
            one.update(image.tobytes())
            found.append(int.from_bytes(one.digest(), "little"))
        return found

    def coarse(self, images: Levels) -> NDArray[np.uint32]:
        """The signature of each image (N, C, H, W): (N, at most KEPT) numbers."""
        tables = self._of_shape(images.shape[1:])
        cells = _smooth(images, tables)
        levels = (cells + tables.offsets) // (STEP * tables.weight)
        codes = tables.codes.take(tables.places + levels)
        codes[:, 1:] += np.abs(cells[:, 1:] - cells[:, :-1]) >= EDGE * tables.weight
        sums = np.zeros((len(codes), codes.shape[1] + 1), np.uint64)
        np.cumsum(codes, axis=1, out=sums[:, 1:])
        window = min(WINDOW, codes.shape[1])
        windows = sums[:, window:] - sums[:, :-window]
        flat = (windows & EDGES) == 0
        windows >>= COUNTED
        windows[flat] |= FLAT
        kept = min(KEPT, windows.shape[1])
        first = np.partition(windows, kept - 1, axis=1)[:, :kept] & ~FLAT
        content, copy, digests = first.astype("<u8").tobytes(), self._window.copy, []
        for i in range(0, len(content), 8):
            one = copy()
            one.update(content[i : i + 8])
            digests.append(one.digest())
        return np.frombuffer(b"".join(digests), "<u4").reshape(first.shape)

    def _of_shape(self, shape: tuple[int, ...]) -> _Tables:
        tables = self._tables.get(shape)
        if tables is None:
            channels, height, width = shape
            block = -(-max(height, width) // CELLS)
            high, wide = -(-height // block), -(-width // block)
            cells = high * wide
            padded = np.pad(np.arange(cells).reshape(high, wide), 1, mode="edge")
            secret = hashlib.shake_256(self._key + repr(shape).encode()).digest(cells * (4 + 8 * LEVELS))
            weight = channels * block * block * 9
            offsets = np.frombuffer(secret, "<u4", cells).astype(np.int64) % (STEP * weight)
            codes = np.frombuffer(secret, "<u8", cells * LEVELS, 4 * cells).astype(np.uint64) & ~EDGES
            tables = _Tables(block, padded, weight, offsets.astype(np.int32), codes, np.arange(cells) * LEVELS)
            if len(self._tables) < SHAPES:
                self._tables[shape] = tables
        return tables


def _smooth(images: Levels, tables: _Tables) -> NDArray[np.int32]:
    """Sums over channels, blocks, and the 3 x 3 blocks around each: (N, cells); borders are continued."""
    cells = images.sum(1, dtype=np.int32)
    block = tables.block
    if block > 1:
        height, width = cells.shape[1:]
        if height % block or width % block:
            cells = np.pad(cells, ((0, 0), (0, -height % block), (0, -width % block)), mode="edge")
        for axis in (1, 2):
            cells = np.add.reduceat(cells, np.arange(0, cells.shape[axis], block), axis=axis)
    padded = cells.reshape(len(images), -1).take(tables.padded, axis=1)
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    smooth: NDArray[np.int32] = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    return smooth.reshape(len(images), -1)
