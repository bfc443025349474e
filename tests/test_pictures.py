"""Images of one's own: folders with labels.csv, NumPy files, and PNG files that hold every bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from queryfoil import data, pictures
from queryfoil.pictures import read, read_picture, write_picture

GREY = np.arange(20, dtype=np.uint8).reshape(1, 4, 5) * 12
COLOUR = np.arange(60, dtype=np.uint8).reshape(3, 4, 5) * 4


def folder_of(folder: Path, lines: str, *values: np.ndarray) -> Path:
    for number, picture in enumerate(values):
        write_picture(folder / f"{number}.png", picture)
    (folder / "labels.csv").write_text(lines)
    return folder


@pytest.mark.parametrize("values", [GREY, COLOUR, GREY[:, :1, :1]])
def test_a_png_reads_back_bit_for_bit(tmp_path: Path, values: np.ndarray) -> None:
    write_picture(tmp_path / "new" / "a.png", values)
    back = read_picture(tmp_path / "new" / "a.png")
    assert back.dtype == np.uint8
    assert np.array_equal(back, values)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_picture_that_does_not_read_back_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "read_picture", lambda path: GREY + 1)
    with pytest.raises(OSError, match=r"a.png does not read back as it was written"):
        write_picture(tmp_path / "a.png", GREY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["png", "bmp", "webp"])
def test_a_folder_gives_images_labels_and_ids_in_the_order_of_labels_csv(tmp_path: Path, kind: str) -> None:
    for name, values in (("a", COLOUR), ("b", COLOUR[::-1])):
        picture = Image.fromarray(np.ascontiguousarray(values.transpose(1, 2, 0)))
        picture.save(tmp_path / f"{name}.{kind}", **({"lossless": True} if kind == "webp" else {}))
    (tmp_path / "labels.csv").write_text(f"\ufefffile,label,note\nb.{kind},3,x\na.{kind},10,y\n", encoding="utf-8")
    found = read(tmp_path)
    assert found.names == (f"b.{kind}", f"a.{kind}")
    assert found.images.labels.tolist() == [3, 10]
    assert found.images.ids.tolist() == [0, 1]
    assert found.targets is None
    assert torch.equal((found.images.images * 255).byte(), torch.from_numpy(np.stack([COLOUR[::-1], COLOUR])))


def test_one_picture_of_a_folder_is_the_same_as_in_the_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "file,label,target\n0.png,1,2\n1.png,3,4\n", GREY, GREY[:, ::-1])
    whole, one = read(folder), read(folder / "1.png")
    assert one.names == ("1.png",)
    assert one.images.ids.tolist() == [1]
    assert torch.equal(one.images.images, whole.images.images[1:])
    assert whole.targets is not None
    assert whole.targets.tolist() == [2, 4]


LABELS = {
    "no columns": ("", "expected columns file and label in .*labels.csv, but got none"),
    "other columns": ("name,label\n0.png,1\n", "expected columns file and label in .*, but got name, label"),
    "no pictures": ("file,label\n", "expected at least one picture"),
    "text": ("file,label\n0.png,cat\n", "expected the number of a class as label in line 2 of .*, but got 'cat'"),
    "negative": ("file,label\n0.png,-1\n", "as label in line 2 of .*, but got '-1'"),
    "no label": ("file,label\n0.png\n", "as label in line 2 of .*, but got ''"),
    "some targets": ("file,label,target\n0.png,1,2\n1.png,1,\n", "as target in line 3 of .*, but got ''"),
    "repeated": ("file,label\n0.png,1\n0.png,1\n", "expected each file once, but 0.png is repeated in line 3"),
    "huge": ("file,label\n0.png,99999999999999999999\n", "the number of a class as label in .* is too large"),
    "missing": ("file,label\n7.png,1\n", "expected a picture at .*7.png, as labels.csv lists it, but there is none"),
    "other size": ("file,label\n0.png,1\n2.png,1\n", r"2.png has \(C, H, W\) = \(1, 5, 4\) and 0.png has \(1, 4, 5\)"),
    "other kind": ("file,label\n0.png,1\n3.png,1\n", r"3.png has \(C, H, W\) = \(3, 4, 5\) and 0.png has \(1, 4, 5\)"),
}


@pytest.mark.parametrize(("lines", "message"), LABELS.values(), ids=LABELS)
def test_a_wrong_labels_csv_is_refused_with_the_line(tmp_path: Path, lines: str, message: str) -> None:
    folder_of(tmp_path, lines, GREY, GREY, GREY.reshape(1, 5, 4), COLOUR)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_where_there_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected images at nowhere, but there are none; give the name of a data set"
    ):
        read("nowhere")
    with pytest.raises(ValueError, match=r"expected .*labels.csv with columns file and label, but there is none"):
        read(tmp_path)
    folder_of(tmp_path, "file,label\n0.png,1\n", GREY, GREY)
    with pytest.raises(ValueError, match=r"expected a line for 1.png in .*labels.csv"):
        read(tmp_path / "1.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16", "CMYK"])
def test_a_picture_of_another_kind_is_refused_by_name(tmp_path: Path, mode: str) -> None:
    name = "a.tiff" if mode == "CMYK" else "a.png"
    Image.new(mode, (5, 4)).save(tmp_path / name)
    with pytest.raises(
        ValueError, match=rf"expected an 8-bit grey or RGB picture .* but .*{name} is {mode}; convert it"
    ):
        read_picture(tmp_path / name)


@pytest.mark.parametrize("cut", [0, 20, 45])
def test_a_damaged_picture_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    write_picture(tmp_path / "a.png", COLOUR)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a.png is none that Pillow can read, or is damaged"):
        read_picture(tmp_path / "a.png")


def test_a_numpy_file_of_bytes_or_numbers(tmp_path: Path) -> None:
    images, labels = np.stack([COLOUR, COLOUR]), np.array([1, 2])
    np.savez(tmp_path / "bytes.npz", images=images, labels=labels)
    np.savez(tmp_path / "floats.npz", images=images.astype(np.float32) / 255, labels=labels, ids=[7, 5], targets=[3, 3])
    whole, numbers = read(tmp_path / "bytes.npz"), read(tmp_path / "floats.npz")
    assert torch.equal(whole.images.images, numbers.images.images)
    assert whole.images.ids.tolist() == [0, 1]
    assert numbers.images.ids.tolist() == [7, 5]
    assert numbers.targets is not None
    assert (whole.targets, numbers.targets.tolist()) == (None, [3, 3])
    assert whole.names is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": COLOUR[None], "labels": [1]}, "unknown array in .* 'images'.*did you mean 'image'"),
        ({"images": COLOUR[None]}, "unknown array in .* 'labels'"),
        ({"images": COLOUR, "labels": [1]}, r"expected images \(N, C, H, W\) .* torch.uint8 \(3, 4, 5\)"),
        (
            {"images": COLOUR[None].astype(np.int64), "labels": [1]},
            r"uint8 or float32 in \[0, 1\], but got torch.int64",
        ),
        ({"images": np.array(["a"]), "labels": [1]}, "expected numbers in the arrays"),
    ],
)
def test_a_wrong_numpy_file_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "wrong.npz")
    with pytest.raises(ValueError, match="expected a NumPy file"):
        read(tmp_path / "none.npz")


def test_a_mark_says_which_images_calibrate(tmp_path: Path) -> None:
    lines = "file,label,calibration\n0.png,1,0\n1.png,3,1\n2.png,0,0\n"
    folder = folder_of(tmp_path, lines, GREY, GREY[:, ::-1], GREY[:, :, ::-1])
    images = np.stack([GREY, GREY[:, ::-1], GREY[:, :, ::-1]])
    np.savez(tmp_path / "own.npz", images=images, labels=[1, 3, 0], calibration=[False, True, False])
    for source in (folder, tmp_path / "own.npz"):
        attack, calibration = (data.load("own-images", split, source) for split in ("attack", "calibration"))
        assert (attack.ids.tolist(), calibration.ids.tolist()) == ([0, 2], [1])
        assert (attack.labels.tolist(), calibration.labels.tolist()) == ([1, 0], [3])
        assert torch.equal((attack.images * 255).byte(), torch.from_numpy(images[[0, 2]]))
        assert torch.equal((calibration.images * 255).byte(), torch.from_numpy(images[[1]]))
    assert len(read(folder).images) == 3


def test_without_marks_images_with_an_even_id_calibrate(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "file,label\n0.png,1\n1.png,3\n2.png,0\n", GREY, GREY, GREY)
    assert data.load("own-images", "attack", folder).ids.tolist() == [1]
    assert data.load("own-images", "calibration", folder).ids.tolist() == [0, 2]
    np.savez(tmp_path / "ids.npz", images=np.stack([GREY] * 3), labels=[0, 1, 2], ids=[9, 4, 5])
    assert data.load("own-images", "attack", tmp_path / "ids.npz").ids.tolist() == [9, 5]
    assert data.load("own-images", "calibration", tmp_path / "ids.npz").ids.tolist() == [4]


def test_marks_that_are_none_or_all_alike_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "file,label,calibration\n0.png,1,0\n1.png,1,2\n", GREY, GREY)
    with pytest.raises(ValueError, match=r"expected 1 or 0 as calibration in line 3 of .*, but got 2"):
        data.load("own-images", "attack", folder)
    (folder / "labels.csv").write_text("file,label,calibration\n0.png,1,1\n1.png,1,yes\n")
    with pytest.raises(ValueError, match=r"expected 1 or 0 as calibration in line 3 of .*, but got 'yes'"):
        data.load("own-images", "attack", folder)
    (folder / "labels.csv").write_text("file,label,calibration\n0.png,1,1\n1.png,1,1\n")
    with pytest.raises(ValueError, match=r"expected images to attack and others to calibrate on in .*, but all are of"):
        data.load("own-images", "attack", folder)
    np.savez(tmp_path / "marks.npz", images=GREY[None], labels=[0], calibration=[3])
    with pytest.raises(ValueError, match="expected 1 or 0 for each image as calibration in"):
        read(tmp_path / "marks.npz")


def test_a_data_set_is_read_from_its_folder_by_name(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073 * 12))
    assert read(f"cifar10={tmp_path}").images.ids.tolist() == [*range(1, 10), 11]
    with pytest.raises(ValueError, match=r"expected a folder with the Python or binary batches.*--data cifar10=FOLDER"):
        read("cifar10")


def test_a_labels_csv_of_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes("file,label\nschön.png,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"expected .*labels.csv as UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"labels": np.zeros(3, int)},
            r"expected labels in .* as an integer for each of the 2 images, but got .*\(3,\)",
        ),
        ({"labels": np.zeros(2)}, r"expected labels in .* as an integer"),
        ({"ids": np.zeros((2, 1), int)}, r"expected ids in .* as an integer"),
        ({"ids": np.array([4, 4])}, r"expected each id once in .*, but some repeat"),
        ({"targets": np.zeros(1, int)}, r"expected targets in .* as an integer"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    whole = {"images": np.stack([COLOUR, COLOUR]), "labels": np.array([1, 2]), **arrays}
    np.savez(tmp_path / "x.npz", **whole)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.npz")
