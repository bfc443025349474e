"""Images, labels and stable ids, by the name of a data set, or from NumPy and IDX files."""

import gzip
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from queryfoil.checks import lookup

SHIPPED = Path(__file__).parent / "shipped" / "data"


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) float32 in [0, 1], labels (N,) int64, ids (N,) int64.

    An id is the image's position in the full test (or training) split, so that the same image
    has the same id in every slice, chunk and run.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> "Images":
        return Images(self.images[rows], self.labels[rows], self.ids[rows])

    def to(self, device: str | torch.device) -> "Images":
        """The same images on a device."""
        return Images(*(t.to(device) for t in (self.images, self.labels, self.ids)))


DATASETS: dict[str, str] = {
    "fashion-mnist": "28 x 28 grey photographs of clothes, 10 classes; 1,000 attack and 1,000 calibration images "
    "of the test split are shipped, the rest comes from a folder of IDX files",
}
"""Name to a line about the data set; `load` reads it."""


def load(name: str, split: str, folder: str | Path | None = None) -> Images:
    """Read one split of a data set.

    `split` is "attack" or "calibration" (1,000 images each, disjoint, shipped), or "train" or
    "test" (the full splits, which need `folder` with the IDX files). ValueError for an unknown
    name or split, FileNotFoundError that says what is missing for a folder.

    >>> images = load("fashion-mnist", "attack")
    >>> tuple(images.images.shape), images.images.dtype, len(set(images.ids.tolist()))
    ((1000, 1, 28, 28), torch.float32, 1000)
    """
    lookup(DATASETS, name, "data set")
    lookup(dict.fromkeys(("attack", "calibration", "train", "test")), split, "split")
    if split in ("train", "test"):
        if folder is None:
            raise ValueError(
                f"expected a folder with the IDX files of {name} for its full {split} split, but got none; "
                "pass it as `folder` (or --data on the command line); Debian's package "
                "dataset-fashion-mnist installs one in /usr/share/datasets/fashion-mnist"
            )
        return read_idx(Path(folder), split)
    with np.load(SHIPPED / f"{name}.npz", allow_pickle=False) as arrays:
        images, labels, ids = (arrays[f"{split}_{part}"] for part in ("images", "labels", "ids"))
    return from_bytes(images, labels, ids)


def from_bytes(images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> Images:
    """Bytes (N, C, H, W) to float32 in [0, 1]; labels and ids to int64."""
    return Images(
        torch.from_numpy(images.astype(np.float32) / np.float32(255)),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(ids.astype(np.int64)),
    )


def read_npz(path: Path, *names: str, optional: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Arrays of a NumPy file (.npz) as tensors, by name; ValueError that says what is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"expected a NumPy file (.npz) at {path}, but there is none")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected a NumPy file (.npz) written by numpy.savez, but {path} is none, or is damaged")
    with np.load(path, allow_pickle=False) as arrays:
        for name in names:
            lookup(dict.fromkeys(arrays.files), name, f"array in {path}")
        try:
            return {name: torch.from_numpy(arrays[name]) for name in (*names, *optional) if name in arrays.files}
        except (TypeError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"expected numbers in the arrays of {path}, but got others: {error}") from None


def read_idx(folder: Path, split: str) -> Images:
    """Read MNIST-style IDX files, plain or gzipped; the id of an image is its position."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx_file(folder, f"{prefix}-images-idx3-ubyte")
    labels = _read_idx_file(folder, f"{prefix}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"expected images (N, H, W) and labels (N,) in {folder}, but got {images.shape} and {labels.shape}"
        )
    return from_bytes(images[:, None], labels, np.arange(len(labels)))


def _read_idx_file(folder: Path, name: str) -> np.ndarray:
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"expected {name} or {name}.gz in {folder}, but found neither")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"expected a gzipped IDX file, but {path} is damaged: {error}") from None
    zero, kind, ndim = struct.unpack(">HBB", data[:4].ljust(4, b"\xff"))
    if zero != 0 or kind != 8 or ndim == 0 or len(data) < 4 + 4 * ndim:
        raise ValueError(f"expected an IDX file of unsigned bytes, but {path} starts with {data[:4].hex()}")
    shape = struct.unpack(f">{ndim}I", data[4 : 4 + 4 * ndim])
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * ndim)
    if body.size != np.prod(shape):
        raise ValueError(f"expected {shape} bytes in {path}, but got {body.size}; the file is damaged")
    return body.reshape(shape)
