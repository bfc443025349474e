"""Write the slice of Fashion-MNIST that ships with the library, from a folder with the full IDX files.

python tools/make_slice.py /usr/share/datasets/fashion-mnist
"""

import sys
from pathlib import Path

import numpy as np

from queryfoil import data

IDS = {"calibration": np.arange(0, 10_000, 10), "attack": np.arange(5, 10_000, 10)}


def main(folder: Path) -> None:
    """Every tenth test image for calibration, those halfway between to be attacked: no seed to choose."""
    test = data.read_idx(folder, "test")
    arrays = {}
    for split, ids in IDS.items():
        arrays[f"{split}_images"] = (test.images[ids].numpy() * 255).round().astype(np.uint8)
        arrays[f"{split}_labels"] = test.labels[ids].numpy().astype(np.uint8)
        arrays[f"{split}_ids"] = ids.astype(np.int32)
    data.SHIPPED.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(data.SHIPPED / "fashion-mnist.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
