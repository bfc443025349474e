"""The validation images of ImageNet (Russakovsky et al., 2015), prepared as in the paper."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from queryfoil.data.images import Images, from_bytes

SIZE = 224
CALIBRATION = 5  # images of each class
AT_ONCE = 250  # images that are decoded together


def parts(split: str, folder: Path | None) -> Iterator[Images]:
    """One image of each class ("attack"), five others of each ("calibration"), or all ("test"), some at a time.

    `folder` holds folders of images, one for each class, whose names in order are the classes (0 first); or
    images and `val.txt`, whose lines are a file name and a class. Either may lie in a folder `val` there. Images are
    chosen by a hash of their names, so that no other file changes the choice. The id of an image is its position
    among all names in order. RGB, resized to 224 x 224 (bicubic) without regard to the ratio, and not cropped: the
    paper's way.
    """
    if split == "train":
        raise ValueError("expected the split attack, calibration or test for imagenet, but got train")
    if folder is None:
        raise ValueError(
            "expected a folder with the validation images of imagenet, but got none; pass it as `folder` (or --data "
            "on the command line); they come from www.image-net.org"
        )
    files = _list(folder)
    chosen = range(len(files)) if split == "test" else _chosen(files, split)
    for start in range(0, len(chosen), AT_ONCE):
        some = chosen[start : start + AT_ONCE]
        labels = np.array([files[i][1] for i in some])
        yield from_bytes(np.stack([_decode(files[i][0]) for i in some]), labels, np.array(some))


def _list(folder: Path) -> list[tuple[Path, int]]:
    """All images with their classes, in the order of their names."""
    root = folder / "val" if (folder / "val").is_dir() else folder
    table = next((path for path in (root / "val.txt", folder / "val.txt") if path.is_file()), None)
    if table is not None:
        return sorted(_listed(table, root), key=lambda entry: entry[0].name)
    classes = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    found = [(path, label) for label, inner in enumerate(classes) for path in inner.iterdir() if path.is_file()]
    if not found:
        raise FileNotFoundError(f"expected a folder for each class in {root}, or images with {root / 'val.txt'}")
    return sorted(found, key=lambda entry: entry[0].name)


def _listed(table: Path, root: Path) -> list[tuple[Path, int]]:
    entries = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(f"expected a file name and a class in line {number} of {table}, but got {line!r}")
        entries.append((root / name, int(label)))
    if not entries:
        raise ValueError(f"expected lines of a file name and a class in {table}, but it is empty")
    return entries


def _chosen(files: list[tuple[Path, int]], split: str) -> list[int]:
    by_class: dict[int, list[int]] = {}
    for i, (_, label) in enumerate(files):
        by_class.setdefault(label, []).append(i)
    chosen = []
    for members in by_class.values():
        ranked = sorted(members, key=lambda i: hashlib.sha256(files[i][0].name.encode()).digest())
        chosen += ranked[:1] if split == "attack" else ranked[1 : 1 + CALIBRATION]
    return sorted(chosen)


def _decode(path: Path) -> np.ndarray:
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"expected an image at {path}, as it is listed, but there is none")
    try:
        with Image.open(path) as picture:
            resized = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"expected an image, but {path} is none that Pillow can read: {error}") from None
    return np.asarray(resized).transpose(2, 0, 1)
