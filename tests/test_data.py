"""Images by name and from folders."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import levels
from queryfoil import data

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("split", ["attack", "calibration"])
def test_a_shipped_slice_has_1000_images_in_0_to_1_of_all_classes(split):
    some = data.load("fashion-mnist", split)
    assert len(some) == 1000
    assert some.images.shape == (1000, 1, 28, 28)
    assert (some.images.dtype, some.labels.dtype, some.ids.dtype) == (torch.float32, torch.int64, torch.int64)
    assert levels(some.images).unique().tolist() == list(range(256))
    counts = some.labels.bincount()
    assert len(counts) == 10
    assert 70 <= int(counts.min()) <= int(counts.max()) <= 130
    assert len(some.ids.unique()) == 1000
    assert 0 <= int(some.ids.min()) <= int(some.ids.max()) < 10_000


def test_the_calibration_images_are_never_attacked():
    attack, calibration = (data.load("fashion-mnist", split) for split in ("attack", "calibration"))
    assert not set(attack.ids.tolist()) & set(calibration.ids.tolist())
    together = torch.cat([attack.images, calibration.images]).flatten(1)
    assert len(together.unique(dim=0)) == 2000


def test_a_slice_of_images_keeps_labels_and_ids():
    some = data.load("fashion-mnist", "attack")
    assert torch.equal(some[10:12].images, some.images[10:12])
    by_index = some[torch.tensor([11, 10])]
    assert torch.equal(by_index.labels, some.labels[[11, 10]])
    assert torch.equal(by_index.ids, some.ids[[11, 10]])


def test_unknown_names_raise_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown data set 'fashion-mnst': .*did you mean 'fashion-mnist'"):
        data.load("fashion-mnst", "attack")
    with pytest.raises(ValueError, match=r"unknown split 'atack': expected one of attack, .*did you mean 'attack'"):
        data.load("fashion-mnist", "atack")


def test_a_full_split_without_a_folder_raises_and_says_where_one_comes_from():
    with pytest.raises(ValueError, match=r"expected a folder with the IDX files.*dataset-fashion-mnist"):
        data.load("fashion-mnist", "test")


BYTES = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
LABELS = np.array([7, 0, 2], dtype=np.uint8)


def idx(values, kind=8, shape=None):
    shape = values.shape if shape is None else shape
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + values.tobytes()


def folder_with(path, images=None, labels=None, prefix="t10k", zipped=False):
    files = {
        f"{prefix}-images-idx3-ubyte": idx(BYTES) if images is None else images,
        f"{prefix}-labels-idx1-ubyte": idx(LABELS) if labels is None else labels,
    }
    for name, content in files.items():
        if zipped:
            (path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_a_folder_of_idx_files_is_read_plain_or_zipped(tmp_path, split, prefix, zipped):
    some = data.load("fashion-mnist", split, folder_with(tmp_path, prefix=prefix, zipped=zipped))
    assert some.images.shape == (3, 1, 4, 5)
    assert levels(some.images)[:, 0].tolist() == BYTES.tolist()
    assert some.labels.tolist() == [7, 0, 2]
    assert some.ids.tolist() == [0, 1, 2]


def test_a_missing_file_is_named(tmp_path):
    folder_with(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected train-images-idx3-ubyte or .*\.gz in .*found neither"):
        data.load("fashion-mnist", "train", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte"):
        data.load("fashion-mnist", "test", str(tmp_path))


DAMAGED = {
    "truncated": ({"images": idx(BYTES)[:-1]}, r"expected \(3, 4, 5\) bytes in .*got 59; the file is damaged"),
    "too long": ({"images": idx(BYTES) + b"0"}, r"expected \(3, 4, 5\) bytes in .*got 61"),
    "no sizes": ({"images": idx(BYTES)[:9]}, "expected an IDX file"),
    "floats": ({"images": idx(BYTES, kind=13)}, "expected an IDX file of unsigned bytes.*starts with 00000d03"),
    "wrong magic": ({"images": b"PK\x03\x04" + bytes(80)}, "expected an IDX file.*starts with 504b0304"),
    "labels as images": ({"images": idx(LABELS)}, r"expected images \(N, H, W\) and labels \(N,\).*got \(3,\)"),
    "too few labels": ({"labels": idx(LABELS[:2])}, r"expected images .*got \(3, 4, 5\) and \(2,\)"),
}


@pytest.mark.parametrize(("files", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_raises(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        data.load("fashion-mnist", "test", folder_with(tmp_path, **files))


UNREADABLE = {
    "empty": ("t10k-images-idx3-ubyte", b""),
    "truncated archive": ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(BYTES))[:-12]),
    "no archive": ("t10k-images-idx3-ubyte.gz", b"hello"),
}


@pytest.mark.parametrize(("name", "content"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_read_raises_and_is_named(tmp_path, name, content):
    (folder_with(tmp_path) / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        data.load("fashion-mnist", "test", tmp_path)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"the full data set is not in {DEBIAN}")
@pytest.mark.parametrize("split", ["attack", "calibration"])
def test_a_shipped_slice_equals_the_full_test_images_of_its_ids(split):
    some, full = data.load("fashion-mnist", split), data.load("fashion-mnist", "test", DEBIAN)
    assert len(full) == 10_000
    assert torch.equal(full.images[some.ids], some.images)
    assert torch.equal(full.labels[some.ids], some.labels)
