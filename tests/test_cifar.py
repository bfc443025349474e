"""CIFAR-10: both kinds of batches, splits, and pickles that want more than they may."""

import os
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import levels
from queryfoil import data


def pixels(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def text(value: bytes) -> bytes:
    """A string as Python 2 pickled it: BINSTRING."""
    return b"T" + struct.pack("<i", len(value)) + value


def array(values: np.ndarray) -> bytes:
    """An array of bytes as Python 2 and NumPy 1 pickled it, in protocol 2: the opcodes of the original files."""
    shape = b"".join(b"J" + struct.pack("<i", size) for size in values.shape)
    kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    kind += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    return empty + b"(K\x01(" + shape + b"t" + kind + b"\x89" + text(values.tobytes()) + b"tb"


def python_batch(values: np.ndarray, labels: list[int]) -> bytes:
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}("
        + text(b"data")
        + array(values)
        + text(b"labels")
        + listed
        + text(b"batch_label")
        + text(b"testing batch 1 of 1")
        + b"u."
    )


def write(folder: Path, kind: str, n: int = 20) -> Path:
    """Fake batches with n images each; image i of a batch has class i % 10. Gives the folder above them."""
    inside = folder / f"cifar-10-batches-{kind}"
    inside.mkdir(parents=True)
    labels = [i % 10 for i in range(n)]
    for seed, name in enumerate(["test_batch", *(f"data_batch_{k}" for k in range(1, 6))]):
        if kind == "py":
            (inside / name).write_bytes(python_batch(pixels(n, seed), labels))
        else:
            records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels(n, seed)], axis=1)
            (inside / f"{name}.bin").write_bytes(records.tobytes())
    return folder


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["py", "bin"])
def test_batches_are_read_bit_for_bit(tmp_path: Path, kind: str, inside: bool) -> None:
    folder = write(tmp_path, kind)
    test = data.load("cifar10", "test", folder / f"cifar-10-batches-{kind}" if inside else folder)
    assert test.images.shape == (20, 3, 32, 32)
    assert np.array_equal(levels(test.images).numpy().reshape(20, 3072), pixels(20, 0))
    assert levels(test.images)[3, 1, 2, 5] == pixels(20, 0)[3, 1024 + 2 * 32 + 5]  # green, row 2, column 5
    assert test.labels.tolist() == [i % 10 for i in range(20)]
    assert test.ids.tolist() == list(range(20))


@pytest.mark.parametrize("kind", ["py", "bin"])
def test_the_training_split_is_the_five_batches_in_order(tmp_path: Path, kind: str) -> None:
    train = data.load("cifar10", "train", write(tmp_path, kind, n=3))
    assert np.array_equal(
        levels(train.images).numpy().reshape(15, 3072), np.concatenate([pixels(3, seed) for seed in range(1, 6)])
    )
    assert train.ids.tolist() == list(range(15))


def test_every_tenth_test_image_calibrates_and_the_others_are_attacked(tmp_path: Path) -> None:
    folder = write(tmp_path, "bin", n=25)
    attack, calibration, test = (data.load("cifar10", split, folder) for split in ("attack", "calibration", "test"))
    assert calibration.ids.tolist() == [0, 10, 20]
    assert sorted([*attack.ids.tolist(), *calibration.ids.tolist()]) == list(range(25))
    for some in (attack, calibration):
        assert torch.equal(some.images, test.images[some.ids])
        assert torch.equal(some.labels, test.labels[some.ids])


def test_the_fake_batches_are_what_the_pickle_module_reads(tmp_path: Path) -> None:
    content = (write(tmp_path, "py") / "cifar-10-batches-py/test_batch").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer NumPy about the types of old files
        found = pickle.loads(content, encoding="bytes")
    assert np.array_equal(found.pop(b"data"), pixels(20, 0))
    assert found == {b"labels": [i % 10 for i in range(20)], b"batch_label": b"testing batch 1 of 1"}


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (lambda path: pickle.dumps({b"data": Evil(path)}), r"(posix|nt)\.mkdir"),
        (lambda path: pickle.dumps([Evil(path)], protocol=0), r"(posix|nt)\.mkdir"),
        (lambda path: b"cbuiltins\neval\n(S'1'\ntR.", r"builtins\.eval"),
        (lambda path: b"cnumpy\nload\n(S'1'\ntR.", r"numpy\.load"),
        (lambda path: b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", r"numpy\.ndarray\.tofile"),
    ],
)
def test_a_pickle_that_calls_anything_else_is_refused_by_name(tmp_path: Path, content: Any, refused: str) -> None:
    (tmp_path / "test_batch").write_bytes(content(tmp_path / "made"))
    with pytest.raises(ValueError, match=f"refused to load {refused}: a batch of CIFAR-10 is"):
        data.load("cifar10", "test", tmp_path)
    assert not (tmp_path / "made").exists()


GOOD = python_batch(pixels(4, 0), [0, 1, 2, 3])
DAMAGED = {
    "empty": ("test_batch", b"", "expected a batch of CIFAR-10, but .*test_batch is none, or is damaged"),
    "cut": ("test_batch", GOOD[:-200], "is none, or is damaged"),
    "a list": ("test_batch", pickle.dumps([1, 2]), "is none, or is damaged"),
    "no labels": ("test_batch", GOOD.replace(b"labels", b"labelz"), "is none, or is damaged: KeyError"),
    "too few": ("test_batch", python_batch(pixels(4, 0), [0, 1]), r"expected bytes \(n, 3072\) as data"),
    "narrow": ("test_batch", python_batch(pixels(4, 0)[:, 1:], [0, 1, 2, 3]), r"expected bytes \(n, 3072\)"),
    "class 10": ("test_batch", python_batch(pixels(1, 0), [10]), "expected images of classes 0 to 9 .*, but got 10"),
    "binary cut": ("test_batch.bin", bytes(3072), "expected records of 3073 bytes in .*, but got 3072 bytes"),
    "binary class": ("test_batch.bin", b"\x0b" + bytes(3072), "expected images of classes 0 to 9 .*, but got 11"),
    "binary empty": ("test_batch.bin", b"", "expected images of classes 0 to 9"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_batch_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", "test", tmp_path)


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "bin", n=2)
    (folder / "cifar-10-batches-bin/data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected data_batch_4 or data_batch_4.bin of CIFAR-10 in"):
        data.load("cifar10", "train", folder)
    with pytest.raises(ValueError, match=r"expected a folder with the Python or binary batches.*--data cifar10=FOLDER"):
        data.load("cifar10", "attack")
