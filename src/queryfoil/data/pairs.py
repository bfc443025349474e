"""Pairs of images: a task of a hundred classes from one of ten."""

import numpy as np
import torch

from queryfoil.data.images import Images

SEED = 0


def pairs(images: Images, classes: int) -> Images:
    """Each image with another beside it (N, C, H, 2 W), of label `classes` x left + right; ids are those of the left.

    Which ones are beside each other is drawn once and for all: another order of the same images gives other pairs.

    >>> from queryfoil.data import load
    >>> both = pairs(load("fashion-mnist", "attack")[:10], 10)
    >>> tuple(both.images.shape), int(both.labels.max()) < 100
    ((10, 1, 28, 56), True)
    """
    right = torch.from_numpy(np.random.default_rng(SEED).permutation(len(images)))
    beside = images[right]
    return Images(torch.cat([images.images, beside.images], 3), classes * images.labels + beside.labels, images.ids)
