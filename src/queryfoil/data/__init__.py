"""Images, labels and stable ids, by the name of a data set."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from queryfoil.checks import lookup
from queryfoil.data import cifar10, fashion_mnist, imagenet
from queryfoil.data.images import Images as Images
from queryfoil.data.images import from_bytes as from_bytes
from queryfoil.data.images import read_npz as read_npz

SPLITS = ("attack", "calibration", "train", "test")


class DataSet(NamedTuple):
    """What a data set is, in a line; how its splits are read; whether some of its images ship."""

    about: str
    parts: Callable[[str, Path | None], Iterator[Images]]
    ships: bool


DATASETS: dict[str, DataSet] = {
    "fashion-mnist": DataSet(
        "28 x 28 grey photographs of clothes, 10 classes; 1,000 attack and 1,000 calibration images of the test split "
        "are shipped, the rest comes from a folder of IDX files",
        fashion_mnist.parts,
        ships=True,
    ),
    "cifar10": DataSet(
        "32 x 32 colour photographs, 10 classes, from a folder of batches; 1,000 test images calibrate, 9,000 are "
        "attacked",
        cifar10.parts,
        ships=False,
    ),
    "imagenet": DataSet(
        "224 x 224 colour photographs, 1,000 classes, from a folder with the validation images; 5,000 calibrate, "
        "1,000 are attacked",
        imagenet.parts,
        ships=False,
    ),
}
"""Name to data set; `load` reads it."""


def load(name: str, split: str, folder: str | Path | None = None) -> Images:
    """Read one split of a data set.

    `split` is "attack" or "calibration", which share no image, or "train" or "test", the full splits. `folder`
    holds the data set where it does not ship. ValueError for an unknown name or split, FileNotFoundError
    that says what is missing in a folder.

    >>> images = load("fashion-mnist", "attack")
    >>> tuple(images.images.shape), images.images.dtype, len(set(images.ids.tolist()))
    ((1000, 1, 28, 28), torch.float32, 1000)
    """
    found = list(parts(name, split, folder))
    columns = zip(*((part.images, part.labels, part.ids) for part in found), strict=True)
    return found[0] if len(found) == 1 else Images(*(torch.cat(column) for column in columns))


def parts(name: str, split: str, folder: str | Path | None = None) -> Iterator[Images]:
    """The same, piece by piece, for a split that would not fit into memory."""
    lookup(DATASETS, name, "data set")
    lookup(dict.fromkeys(SPLITS), split, "split")
    return DATASETS[name].parts(split, None if folder is None else Path(folder).expanduser())
