"""CIFAR-10 (Krizhevsky, 2009), from the python or the binary batches."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from queryfoil.data.images import Images, from_bytes

NAMES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")


def parts(split: str, folder: Path | None) -> Iterator[Images]:
    """The batches of "train" or "test"; or of the test images every tenth ("calibration"), or the others ("attack").

    The id of an image is its position in the split.
    """
    if folder is None:
        raise ValueError(
            "expected a folder with the batches of cifar10, but got none; pass it as `folder` (or --data on the "
            "command line); they come from www.cs.toronto.edu/~kriz/cifar.html"
        )
    whole = "train" if split == "train" else "test"
    start = 0
    for name in NAMES[whole]:
        images, labels = _batch(folder, name)
        ids = np.arange(start, start + len(labels))
        start += len(labels)
        chosen = {"calibration": ids % 10 == 0, "attack": ids % 10 != 0}.get(split, np.ones(len(ids), dtype=bool))
        yield from_bytes(images[chosen], labels[chosen], ids[chosen])


def _batch(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    for inner in FOLDERS:
        if (path := folder / inner / f"{name}.bin").is_file():
            return _read_binary(path)
        if (path := folder / inner / name).is_file():
            return _read_python(path)
    raise FileNotFoundError(f"expected {name} or {name}.bin in {folder}, or in {' or '.join(FOLDERS[1:])} there")


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a label and 3 x 32 x 32 bytes."""
    values = np.fromfile(path, np.uint8)
    if not values.size or values.size % 3073:
        raise ValueError(f"expected rows of 3073 bytes in {path}, but it has {values.size} bytes; it is damaged")
    rows = values.reshape(-1, 3073)
    return _checked(rows[:, 1:], rows[:, 0], path)


def _read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dictionary with b"data" (N, 3072) and b"labels"."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        return _checked(np.asarray(content[b"data"]), np.asarray(content[b"labels"]), path)
    except ValueError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise ValueError(f"expected a batch of CIFAR-10 in {path}, but it cannot be read: {error!r}") from None


def _checked(images: np.ndarray, labels: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if images.shape != (len(labels), 3072) or images.dtype != np.uint8 or labels.ndim != 1 or labels.max() > 9:
        raise ValueError(
            f"expected bytes (N, 3072) and labels 0..9 (N,) in {path}, but got {images.dtype} {images.shape} and "
            f"{labels.shape}"
        )
    return images.reshape(-1, 3, 32, 32), labels


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays, and no class or function that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":
            return lambda text, encoding: text.encode(encoding)
        raise ValueError(f"expected a batch of CIFAR-10, with arrays alone, but it asks for {module}.{name}")
