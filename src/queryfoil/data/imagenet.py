"""ImageNet's validation images, chosen and resized as in the paper: one of each class, 224 x 224."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from queryfoil.data.images import Images, from_bytes
from queryfoil.data.listed import open_picture

SIZE = 224
SEED = 0
CALIBRATION = 5  # images of each class
CLASSES = 1000
SYNSET = re.compile(r"n\d{8}")
BATCH = 512  # a multiple of the oracle's micro-batch, so that scores do not depend on it


class Photo(NamedTuple):
    """An image by its id, the rank of its file name among all."""

    id: int
    path: Path
    label: int


def read_imagenet(folder: Path, split: str) -> Images:
    """Read "attack", an image of each class (600 MB), or "calibration", 5 others of each class (3 GB).

    `folder` holds the images, or the folder `val` with them: as SYNSET/NAME.JPEG, where a class is the rank of its
    synset's name, or as NAME.JPEG, with lines "NAME.JPEG CLASS" in val.txt there or one folder up. The id of an image
    is the rank of its file name. Which images of a class are chosen depends on nothing but their names. They are
    converted to RGB and resized to 224 x 224 without cropping (bicubic). ValueError for what is missing or damaged.
    """
    return decode(_choose(folder, split))


def batches(folder: Path, split: str) -> Iterator[Images]:
    """The same images, 512 at a time, for who does not need them all at once: 300 MB a part."""
    chosen = _choose(folder, split)
    for start in range(0, len(chosen), BATCH):
        yield decode(chosen[start : start + BATCH])


def _choose(folder: Path, split: str) -> list[Photo]:
    """The photos of a split, by id: of each class the first of a shuffle by hash, or the five after it."""
    classes: dict[int, list[Photo]] = defaultdict(list)
    for photo in _photos(folder):
        classes[photo.label].append(photo)
    if wrong := [label for label in classes if label >= CLASSES]:
        raise ValueError(f"expected classes from 0 to {CLASSES - 1} in {folder}, but got {max(wrong)}")
    if len(classes) < CLASSES:
        raise ValueError(f"expected images of all {CLASSES} classes in {folder}, but got those of {len(classes)}")
    for label, photos in classes.items():
        if len(photos) < 1 + CALIBRATION:
            raise ValueError(
                f"expected at least {1 + CALIBRATION} images of each class in {folder}, but class {label} has "
                f"{len(photos)}"
            )
    part = slice(0, 1) if split == "attack" else slice(1, 1 + CALIBRATION)
    return sorted(photo for photos in classes.values() for photo in sorted(photos, key=_shuffled)[part])


def _shuffled(photo: Photo) -> bytes:
    return hashlib.sha256(f"{SEED}/{photo.path.name}".encode()).digest()


def _photos(folder: Path) -> list[Photo]:
    """All validation images, in the order of their file names."""
    root = folder / "val" if (folder / "val").is_dir() else folder
    found = [path for pattern in ("*", "*/*") for path in sorted(root.glob(pattern)) if _is_photo(path)]
    paths = {path.name: path for path in found}
    if not paths:
        raise FileNotFoundError(
            f"expected ImageNet's validation images as SYNSET/NAME.JPEG or NAME.JPEG in {root}, but found none"
        )
    flat = [name for name, path in paths.items() if path.parent == root]
    if flat and len(flat) < len(paths):
        raise ValueError(f"expected images in {root} or in its folders, but there are some in both, such as {flat[0]}")
    if repeated := [path for path in found if paths[path.name] != path]:
        raise ValueError(f"expected each file name once in {root}, but {repeated[0].name} is in several folders")
    labels = _read_list(root, paths) if flat else _synsets(paths)
    return [Photo(rank, paths[name], labels[name]) for rank, name in enumerate(sorted(paths))]


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in (".jpeg", ".jpg") and not path.name.startswith(".") and path.is_file()


def _synsets(paths: dict[str, Path]) -> dict[str, int]:
    folders = {path.parent.name: path.parent for path in paths.values()}
    if wrong := sorted(name for name in folders if not SYNSET.fullmatch(name)):
        raise ValueError(
            f"expected folders named by synsets, such as n01440764, but got {folders[wrong[0]]}; a class is the rank "
            "of its synset, so that another folder would shift them"
        )
    rank = {synset: rank for rank, synset in enumerate(sorted(folders))}
    return {name: rank[path.parent.name] for name, path in paths.items()}


def _read_list(root: Path, paths: dict[str, Path]) -> dict[str, int]:
    path = next((place / "val.txt" for place in (root, root.parent) if (place / "val.txt").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"expected val.txt with lines NAME.JPEG CLASS in {root} or {root.parent}")
    labels = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} as UTF-8, but {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not label.isdecimal() or not name:
            raise ValueError(f"expected NAME.JPEG CLASS in line {number} of {path}, but got {line!r}")
        labels[name.strip()] = int(label)
    if missing := sorted(paths.keys() - labels):
        raise ValueError(f"expected a line for each image in {path}, but {missing[0]} has none")
    return labels


def decode(photos: Sequence[Photo]) -> Images:
    pixels = np.empty((len(photos), 3, SIZE, SIZE), np.uint8)
    for row, photo in enumerate(photos):
        resized = open_picture(photo.path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels[row] = np.asarray(resized).transpose(2, 0, 1)
    labels, ids = ([getattr(photo, name) for photo in photos] for name in ("label", "id"))
    return from_bytes(pixels, np.array(labels), np.array(ids))
