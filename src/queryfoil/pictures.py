"""Images of yours: a folder of pictures with labels.csv, or a NumPy file; and pictures written without loss."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from queryfoil import data, files
from queryfoil.data import DATASETS, Images

LABELS = "labels.csv"
CHANNELS = {"L": 1, "RGB": 3}


@dataclass(frozen=True)
class Pictures:
    """Images; the targets (N,) and file names that came with them, or None."""

    images: Images
    targets: Tensor | None = None
    names: tuple[str, ...] | None = None


def read(source: str | Path) -> Pictures:
    """Read images to attack; ValueError that names the file and line for what is wrong.

    `source` is one of:

    - the name of a shipped data set: its attack split;
    - a folder with `labels.csv`, whose columns `file` and `label` (and, if you like, `target`) list the
      pictures; the id of a picture is its row, from 0;
    - one picture of such a folder;
    - a NumPy file (.npz) with `images` (N, C, H, W), uint8 or float32 in [0, 1], `labels` (N,) and, if you like,
      `ids` and `targets` (N,).

    Pictures are 8-bit grey or RGB, all of one size, in any format that Pillow reads.

    >>> len(read("fashion-mnist").images)
    1000
    """
    if str(source) in DATASETS:
        return Pictures(data.load(str(source), "attack"))
    path = Path(source)
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.is_dir():
        return _read_pictures(path, None)
    if path.is_file():
        return _read_pictures(path.parent, path.name)
    raise ValueError(
        f"expected images at {source}, but there are none; give the name of a data set ({', '.join(DATASETS)}), a "
        f"folder with {LABELS}, one picture of it, or a NumPy file (.npz)"
    )


def _read_npz(path: Path) -> Pictures:
    arrays = data.read_npz(path, "images", "labels", optional=("ids", "targets"))
    images = arrays["images"]
    if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
        raise ValueError(
            f"expected images (N, C, H, W) in {path}, uint8 or float32 in [0, 1], but got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    ids = arrays.get("ids", torch.arange(len(images)))
    return Pictures(Images(images, arrays["labels"], ids), arrays.get("targets"))


def _read_pictures(folder: Path, only: str | None) -> Pictures:
    rows = _read_labels(folder / LABELS)
    if only is not None:
        if only not in rows:
            raise ValueError(f"expected a line for {only} in {folder / LABELS}, but there is none")
        rows = {only: rows[only]}
    loaded = {name: read_picture(folder / name) for name in rows}
    first, shape = next((name, picture.shape) for name, picture in loaded.items())
    for name, picture in loaded.items():
        if picture.shape != shape:
            raise ValueError(
                f"expected pictures of one size and kind, but {folder / name} has (C, H, W) = {picture.shape} and "
                f"{first} has {shape}"
            )
    ids, labels, targets = zip(*rows.values(), strict=True)
    return Pictures(
        data.from_bytes(np.stack(list(loaded.values())), np.array(labels), np.array(ids)),
        None if targets[0] is None else torch.tensor(targets),
        tuple(rows),
    )


Row = tuple[int, int, int | None]
"""Id, label and target of a picture."""


def _read_labels(path: Path) -> dict[str, Row]:
    if not path.is_file():
        raise ValueError(f"expected {path} with columns file and label, but there is none")
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        columns = reader.fieldnames or []
        if not {"file", "label"} <= set(columns):
            raise ValueError(f"expected columns file and label in {path}, but got {', '.join(columns) or 'none'}")
        rows: dict[str, Row] = {}
        for row in reader:
            where = f"line {reader.line_num} of {path}"
            if row["file"] in rows:
                raise ValueError(f"expected each file once, but {row['file']} is repeated in {where}")
            target = _integer(row, "target", where) if "target" in columns else None
            rows[row["file"]] = len(rows), _integer(row, "label", where), target
    if not rows:
        raise ValueError(f"expected at least one picture in {path}, but it lists none")
    return rows


def _integer(row: dict[str, str | None], column: str, where: str) -> int:
    text = row[column] or ""
    if not text.strip().isdecimal():
        raise ValueError(f"expected the number of a class as {column} in {where}, but got {text!r}")
    return int(text)


def read_picture(path: Path) -> NDArray[np.uint8]:
    """The bytes (C, H, W) of an 8-bit picture, grey or RGB; ValueError that names the file for any other."""
    if not path.is_file():
        raise ValueError(f"expected a picture at {path}, as {LABELS} lists it, but there is none")
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected a picture, but {path} is none that Pillow can read, or is damaged: {error}"
        ) from None
    if picture.mode not in CHANNELS:
        raise ValueError(f"expected an 8-bit grey or RGB picture (L or RGB), but {path} is {picture.mode}; convert it")
    values = np.array(picture)  # a copy, as torch wants to be able to write
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def write_picture(path: Path, values: NDArray[np.uint8]) -> None:
    """Write bytes (C, H, W), C 1 or 3, as PNG, atomically; OSError unless the file reads back as the same bytes."""
    picture = Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))
    with files.replacing(path) as temporary:
        picture.save(temporary, format="PNG")
        if not np.array_equal(read_picture(temporary), values):
            raise OSError(f"{path} does not read back as it was written; is the disk failing?")
