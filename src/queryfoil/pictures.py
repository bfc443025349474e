"""Images for `queryfoil attack`, and pictures written without loss."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from queryfoil import data, files
from queryfoil.data import DATASETS
from queryfoil.data.listed import CHANNELS as CHANNELS
from queryfoil.data.listed import LABELS as LABELS
from queryfoil.data.listed import Pictures as Pictures
from queryfoil.data.listed import read_listed
from queryfoil.data.listed import read_picture as read_picture


def read(source: str | Path) -> Pictures:
    """Read images to attack; ValueError that names the file and line for what is wrong.

    `source` is one of:

    - the name of a data set: its attack split; NAME=FOLDER for one that does not ship with the library;
    - a folder with `labels.csv`, whose columns `file` and `label` (and, if you like, `target`) list the
      pictures; the id of a picture is its row, from 0;
    - one picture of such a folder;
    - a NumPy file (.npz) with `images` (N, C, H, W), uint8 or float32 in [0, 1], `labels` (N,) and, if you like,
      `ids` and `targets` (N,).

    Pictures are 8-bit grey or RGB, all of one size, in any format that Pillow reads.

    >>> len(read("fashion-mnist").images)
    1000
    """
    name, _, folder = str(source).partition("=")
    if name in DATASETS:
        return Pictures(data.load(name, "attack", folder or None))
    path = Path(source)
    if path.is_dir() or path.suffix == ".npz":
        return read_listed(path)
    if path.is_file():
        return read_listed(path.parent, path.name)
    raise ValueError(
        f"expected images at {source}, but there are none; give the name of a data set ({', '.join(DATASETS)}), a "
        f"folder with {LABELS}, one picture of it, or a NumPy file (.npz)"
    )


def write_picture(path: Path, values: NDArray[np.uint8]) -> None:
    """Write bytes (C, H, W), C 1 or 3, as PNG, atomically; OSError unless the file reads back as the same bytes."""
    picture = Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))
    with files.replacing(path) as temporary:
        picture.save(temporary, format="PNG")
        if not np.array_equal(read_picture(temporary), values):
            raise OSError(f"{path} does not read back as it was written; is the disk failing?")
