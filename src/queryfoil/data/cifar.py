"""CIFAR-10 (Krizhevsky, 2009) from its Python or binary batches (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryfoil.data.images import Images, from_bytes

PIXELS = 3 * 32 * 32
BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}


def read_cifar(folder: Path, split: str) -> Images:
    """Read one split; the id of an image is its position in the test (or training) split.

    `folder` holds the batches, or the folder cifar-10-batches-py or cifar-10-batches-bin with them. "calibration" are
    every tenth test image (ids 0, 10, ...: 1,000), "attack" all others (9,000). FileNotFoundError for a missing
    batch, ValueError for one that is damaged.
    """
    batches = [_read_batch(_find(folder, name)) for name in BATCHES.get(split, BATCHES["test"])]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    ids = np.arange(len(labels))
    if split in ("attack", "calibration"):
        ids = ids[(ids % 10 == 0) == (split == "calibration")]
    return from_bytes(images[ids].reshape(-1, 3, 32, 32), labels[ids], ids)


Batch = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Pixels (n, 3072), red before green before blue, each row by row; and labels (n,)."""


def _find(folder: Path, name: str) -> Path:
    for inside, suffix in (("cifar-10-batches-py", ""), ("cifar-10-batches-bin", ".bin")):
        for place in (folder, folder / inside):
            if (place / f"{name}{suffix}").is_file():
                return place / f"{name}{suffix}"
    raise FileNotFoundError(
        f"expected {name} or {name}.bin of CIFAR-10 in {folder}, or in its folder cifar-10-batches-py or "
        "cifar-10-batches-bin, but found neither"
    )


def _read_batch(path: Path) -> Batch:
    images, labels = _read_binary(path) if path.suffix == ".bin" else _read_pickle(path)
    if not len(labels) or int(labels.max()) > 9:
        raise ValueError(f"expected images of classes 0 to 9 in {path}, but got {labels.max(initial=0)} as a class")
    return images, labels


def _read_binary(path: Path) -> Batch:
    content = np.fromfile(path, np.uint8)
    if content.size % (1 + PIXELS):
        raise ValueError(f"expected records of {1 + PIXELS} bytes in {path}, but got {content.size} bytes in all")
    records = content.reshape(-1, 1 + PIXELS)
    return records[:, 1:], records[:, 0]


def _read_pickle(path: Path) -> Batch:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        images, labels = content[b"data"], content[b"labels"]
        numbers = np.array(labels)
    except RefusedError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"expected a batch of CIFAR-10, but {path} is none, or is damaged: {error!r}") from None
    shaped = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape == (len(numbers), PIXELS)
    if not shaped or not np.issubdtype(numbers.dtype, np.integer) or numbers.ndim != 1 or numbers.min(initial=0) < 0:
        raise ValueError(f"expected bytes (n, {PIXELS}) as data and a list of n classes as labels in {path}")
    return images, numbers.clip(max=255).astype(np.uint8)


class RefusedError(ValueError):
    """A pickle asks for what no batch of CIFAR-10 needs."""


def _dtype(name: bytes, *flags: int) -> np.dtype[Any]:
    """The type of an array, as Python 2 wrote it."""
    return np.dtype(name.decode())


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, bytes and NumPy arrays; a pickle can call nothing else."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise RefusedError(
                f"refused to load {module}.{name}: a batch of CIFAR-10 is a pickle of NumPy arrays and lists alone; "
                "take the files from https://www.cs.toronto.edu/~kriz/cifar.html"
            )
        return self.allowed[module, name]
