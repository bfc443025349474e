"""MNIST-style IDX files (https://yann.lecun.com/exdb/mnist): the format of Fashion-MNIST."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from queryfoil.data.images import Images, from_bytes


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
