"""Images, labels and stable ids, by the name of a data set; one format a file."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from queryfoil.checks import lookup
from queryfoil.data.cifar import read_cifar
from queryfoil.data.idx import read_idx as read_idx
from queryfoil.data.images import Images as Images
from queryfoil.data.images import from_bytes as from_bytes
from queryfoil.data.images import read_npz as read_npz
from queryfoil.data.pairs import pairs

SHIPPED = Path(__file__).parent.parent / "shipped" / "data"
PAIRS = "fashion-pairs"


class Dataset(NamedTuple):
    """A data set: a line about it, what its folder holds, its splits there, and what reads one of them."""

    about: str
    holds: str
    splits: tuple[str, ...]
    read: Callable[[Path, str], Images]


def _read_imagenet(folder: Path, split: str) -> Images:
    from queryfoil.data.imagenet import read_imagenet  # needs Pillow, which the library's core does without

    return read_imagenet(folder, split)


def _read_own(folder: Path, split: str) -> Images:
    from queryfoil.data.listed import read_own

    return read_own(folder, split)


DATASETS: dict[str, Dataset] = {
    "fashion-mnist": Dataset(
        "28 x 28 grey photographs of clothes, 10 classes; 1,000 attack and 1,000 calibration images of the test "
        "split are shipped, the rest comes from a folder of IDX files",
        "a folder with the IDX files, such as /usr/share/datasets/fashion-mnist of Debian's dataset-fashion-mnist",
        ("train", "test"),
        read_idx,
    ),
    PAIRS: Dataset(
        "two images of fashion-mnist side by side, 28 x 56, 100 classes; shipped",
        "nothing, as it is made from the shipped images of fashion-mnist",
        (),
        read_idx,
    ),
    "cifar10": Dataset(
        "32 x 32 colour photographs, 10 classes; from a folder of Python or binary batches",
        "a folder with the Python or binary batches, from https://www.cs.toronto.edu/~kriz/cifar.html",
        ("attack", "calibration", "train", "test"),
        read_cifar,
    ),
    "imagenet": Dataset(
        "224 x 224 colour photographs, 1,000 classes; from a folder of ImageNet's validation images",
        "a folder with the validation images as val/SYNSET/NAME.JPEG, or as val/NAME.JPEG with val.txt",
        ("attack", "calibration"),
        _read_imagenet,
    ),
    "own-images": Dataset(
        "images of yours; from a folder of pictures with labels.csv, or a NumPy file (.npz)",
        "a folder with pictures and labels.csv, or a NumPy file (.npz)",
        ("attack", "calibration"),
        _read_own,
    ),
}
"""Name to what is known about the data set; `load` reads it."""

SLICES = {"fashion-mnist": ("attack", "calibration"), PAIRS: ("attack", "calibration")}
"""Splits that ship with the library."""


def load(name: str, split: str, folder: str | Path | None = None) -> Images:
    """Read one split of a data set.

    `split` is "attack" or "calibration", which are disjoint; or, for some data sets, "train" or "test", the full
    ones. What the library does not ship is read from `folder`; docs/data-sets.md says what lies there. ValueError for
    an unknown name or split, FileNotFoundError that says what is missing in a folder.

    >>> images = load("fashion-mnist", "attack")
    >>> tuple(images.images.shape), images.images.dtype, len(set(images.ids.tolist()))
    ((1000, 1, 28, 28), torch.float32, 1000)
    """
    dataset = lookup(DATASETS, name, "data set")
    shipped = SLICES.get(name, ())
    lookup(dict.fromkeys((*shipped, *dataset.splits)), split, "split")
    if name == PAIRS:
        return pairs(load("fashion-mnist", split), 10)
    if split in shipped:
        with np.load(SHIPPED / f"{name}.npz", allow_pickle=False) as arrays:
            images, labels, ids = (arrays[f"{split}_{part}"] for part in ("images", "labels", "ids"))
        return from_bytes(images, labels, ids)
    if folder is None:
        raise ValueError(
            f"expected {dataset.holds}, for the {split} split of {name}, but got none; pass it as `folder` (or as "
            f"--data {name}=FOLDER on the command line)"
        )
    return dataset.read(Path(folder), split)


def batches(name: str, split: str, folder: str | Path | None = None) -> Iterator[Images]:
    """The same images as of `load`, in several parts where they are too many to be held at once.

    >>> [len(part) for part in batches("fashion-mnist", "calibration")]
    [1000]
    """
    if name == "imagenet" and folder is not None:
        from queryfoil.data import imagenet

        lookup(dict.fromkeys(DATASETS[name].splits), split, "split")
        yield from imagenet.batches(Path(folder), split)
    else:
        yield load(name, split, folder)
