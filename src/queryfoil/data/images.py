"""What every data set gives: images, labels and ids; and NumPy files of arrays."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from queryfoil.checks import lookup


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


def from_bytes(images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> Images:
    """Bytes (N, C, H, W) to float32 in [0, 1]; labels and ids to int64."""
    scaled = images.astype(np.float32)
    scaled /= np.float32(255)  # in place: 1,000 ImageNet images are 600 MB
    return Images(
        torch.from_numpy(scaled),
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
        except (TypeError, zipfile.BadZipFile, zlib.error, ValueError) as error:
            raise ValueError(f"expected numbers in the arrays of {path}, but got others: {error}") from None
