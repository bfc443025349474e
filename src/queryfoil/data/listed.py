"""Images of yours: a folder of pictures with labels.csv, or a NumPy file."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from queryfoil.data.images import Images, from_bytes, read_npz

LABELS = "labels.csv"
CHANNELS = {"L": 1, "RGB": 3}


@dataclass(frozen=True)
class Pictures:
    """Images; the targets (N,), file names and marks for calibration (N,) that came with them, or None."""

    images: Images
    targets: Tensor | None = None
    names: tuple[str, ...] | None = None
    calibration: Tensor | None = None


def read_own(source: Path, split: str) -> Images:
    """Read "attack" or "calibration" of a folder with labels.csv or a NumPy file, as `read_listed` takes them.

    A column (or array) `calibration` says with 1 which images are held out for it, and with 0 which are attacked;
    without one, images with an even id calibrate. ValueError if either would be none.
    """
    found = read_listed(source)
    marks = found.images.ids % 2 == 0 if found.calibration is None else found.calibration == 1
    if not bool(marks.any()) or bool(marks.all()):
        raise ValueError(
            f"expected images to attack and others to calibrate on in {source}, but all are of one kind; mark them by "
            "a column (or array) calibration, 1 or 0"
        )
    return found.images[marks == (split == "calibration")]


def read_listed(path: Path, only: str | None = None) -> Pictures:
    """Read a folder with labels.csv, one picture of it alone, or a NumPy file (.npz); ValueError for what is wrong."""
    return _read_npz(path) if path.suffix == ".npz" else _read_pictures(path, only)


def _read_npz(path: Path) -> Pictures:
    arrays = read_npz(path, "images", "labels", optional=("ids", "targets", "calibration"))
    images = arrays["images"]
    if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4:
        raise ValueError(
            f"expected images (N, C, H, W) in {path}, uint8 or float32 in [0, 1], but got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    ids = arrays.get("ids", torch.arange(len(images)))
    for name, values in {"labels": arrays["labels"], "ids": ids, "targets": arrays.get("targets", ids)}.items():
        if values.shape != images.shape[:1] or values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(
                f"expected {name} in {path} as an integer for each of the {len(images)} images, but got {values.dtype} "
                f"{tuple(values.shape)}"
            )
    if len(set(ids.tolist())) < len(ids):
        raise ValueError(f"expected each id once in {path}, but some repeat")
    marks = arrays.get("calibration")
    if marks is not None and (marks.shape != ids.shape or not bool(((marks == 0) | (marks == 1)).all())):
        raise ValueError(f"expected 1 or 0 for each image as calibration in {path}")
    return Pictures(Images(images, arrays["labels"], ids), arrays.get("targets"), calibration=marks)


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
    ids, labels, targets, marks = zip(*rows.values(), strict=True)
    return Pictures(
        from_bytes(np.stack(list(loaded.values())), np.array(labels), np.array(ids)),
        None if targets[0] is None else torch.tensor(targets),
        tuple(rows),
        None if marks[0] is None else torch.tensor(marks),
    )


Row = tuple[int, int, int | None, int | None]
"""Id, label, target and mark for calibration of a picture."""


def _read_labels(path: Path) -> dict[str, Row]:
    if not path.is_file():
        raise ValueError(f"expected {path} with columns file and label, but there is none")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} as UTF-8, but {error}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or []
    if not {"file", "label"} <= set(columns):
        raise ValueError(f"expected columns file and label in {path}, but got {', '.join(columns) or 'none'}")
    rows: dict[str, Row] = {}
    for row in reader:
        where = f"line {reader.line_num} of {path}"
        if row["file"] in rows:
            raise ValueError(f"expected each file once, but {row['file']} is repeated in {where}")
        target = _integer(row, "target", where) if "target" in columns else None
        mark = _integer(row, "calibration", where, "1 or 0") if "calibration" in columns else None
        if mark not in (None, 0, 1):
            raise ValueError(f"expected 1 or 0 as calibration in {where}, but got {mark}")
        rows[row["file"]] = len(rows), _integer(row, "label", where), target, mark
    if not rows:
        raise ValueError(f"expected at least one picture in {path}, but it lists none")
    return rows


def _integer(row: dict[str, str | None], column: str, where: str, kind: str = "the number of a class") -> int:
    text = row[column] or ""
    if not text.strip().isdecimal():
        raise ValueError(f"expected {kind} as {column} in {where}, but got {text!r}")
    if int(text) >= 2**31:
        raise ValueError(f"expected {kind} as {column} in {where}, but {text} is too large")
    return int(text)


def open_picture(path: Path) -> Image.Image:
    """A decoded picture of any mode; ValueError that names the file where there is none, or a damaged one."""
    if not path.is_file():
        raise ValueError(f"expected a picture at {path}, as {LABELS} lists it, but there is none")
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"expected a picture, but {path} is none that Pillow can read, or is damaged: {error}"
        ) from None
    return picture


def read_picture(path: Path) -> NDArray[np.uint8]:
    """The bytes (C, H, W) of an 8-bit picture, grey or RGB; ValueError that names the file for any other."""
    picture = open_picture(path)
    if picture.mode not in CHANNELS:
        raise ValueError(f"expected an 8-bit grey or RGB picture (L or RGB), but {path} is {picture.mode}; convert it")
    values = np.array(picture)  # a copy, as torch wants to be able to write
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
