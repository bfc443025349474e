"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): a slice that ships, and MNIST-style IDX files."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from queryfoil.data.images import Images, from_bytes

SHIPPED = Path(__file__).parent.parent / "shipped" / "data"


def parts(split: str, folder: Path | None) -> Iterator[Images]:
    """The shipped images of "attack" (every tenth from 5) and "calibration" (from 0); the full splits of a folder."""
    if split in ("train", "test"):
        if folder is None:
            raise ValueError(
                f"expected a folder with the IDX files of fashion-mnist for its full {split} split, but got none; "
                "pass it as `folder` (or --data on the command line); Debian's package "
                "dataset-fashion-mnist installs one in /usr/share/datasets/fashion-mnist"
            )
        yield read_idx(folder, split)
    else:
        with np.load(SHIPPED / "fashion-mnist.npz", allow_pickle=False) as arrays:
            images, labels, ids = (arrays[f"{split}_{part}"] for part in ("images", "labels", "ids"))
        yield from_bytes(images, labels, ids)


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
