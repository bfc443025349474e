"""ImageNet's validation images: two layouts, one choice of images, the paper's preprocessing."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import levels
from queryfoil import data
from queryfoil.data import imagenet

SYNSETS = ("n01440764", "n01443537", "n02129604")
EACH = 8


def name_of(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def photo(number: int) -> Image.Image:
    """A photograph of its own, no square, in one of the modes that ImageNet has."""
    values = np.random.default_rng(number).integers(0, 256, (9 + number % 5, 12, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(("RGB", "L", "CMYK")[number % 3])


def label_of(number: int) -> int:
    return number * 2 % 3


def write(folder: Path, layout: str, numbers: range = range(1, 3 * EACH + 1)) -> Path:
    """Photos of three classes; their order on disk is not that of their names."""
    for number in reversed(numbers):
        place = folder / "val" / (SYNSETS[label_of(number)] if layout == "synsets" else "")
        place.mkdir(parents=True, exist_ok=True)
        photo(number).save(place / name_of(number), format="JPEG", quality=95)
    if layout == "flat":
        (folder / "val.txt").write_text("".join(f"{name_of(n)} {label_of(n)}\n" for n in numbers))
    return folder


@pytest.fixture(autouse=True)
def three_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "CLASSES", 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {layout: write(tmp_path_factory.mktemp(layout), layout) for layout in ("synsets", "flat")}


@pytest.mark.parametrize("layout", ["synsets", "flat"])
def test_one_image_of_each_class_is_attacked_and_five_others_calibrate(folders: dict[str, Path], layout: str) -> None:
    attack, calibration = (data.load("imagenet", split, folders[layout]) for split in ("attack", "calibration"))
    assert attack.labels.bincount().tolist() == [1, 1, 1]
    assert calibration.labels.bincount().tolist() == [5, 5, 5]
    assert not set(attack.ids.tolist()) & set(calibration.ids.tolist())
    for some in (attack, calibration):
        assert some.ids.tolist() == sorted(some.ids.tolist())
        assert some.labels.tolist() == [label_of(i + 1) for i in some.ids.tolist()]  # the photo of rank i is i + 1


def test_a_photo_becomes_224_pixels_wide_and_high_by_pillows_bicubic_filter(folders: dict[str, Path]) -> None:
    attack = data.load("imagenet", "attack", folders["synsets"])
    assert attack.images.shape == (3, 3, 224, 224)
    for image, i in zip(levels(attack.images), attack.ids.tolist(), strict=True):
        path = folders["flat"] / "val" / name_of(i + 1)
        whole = Image.open(path).convert("RGB").resize((224, 224), resample=Image.Resampling.BICUBIC)
        assert np.array_equal(image.numpy().transpose(1, 2, 0), np.asarray(whole))


def test_both_layouts_and_both_folders_give_the_same_images(folders: dict[str, Path]) -> None:
    for split in ("attack", "calibration"):
        whole = data.load("imagenet", split, folders["synsets"])
        for folder in (folders["flat"], folders["synsets"] / "val", folders["flat"] / "val"):
            other = data.load("imagenet", split, folder)
            assert torch.equal(whole.images, other.images)
            assert whole.ids.tolist() == other.ids.tolist()
            assert whole.labels.tolist() == other.labels.tolist()


def test_the_choice_does_not_depend_on_the_systems_order_or_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, "synsets")
    before = data.load("imagenet", "attack", folder)
    for stray in ("notes.txt", ".DS_Store", f"{SYNSETS[0]}/._{name_of(1)}", f"{SYNSETS[1]}/thumbs.db"):
        (folder / "val" / stray).write_bytes(b"no picture")
    glob = Path.glob

    def backwards(self: Path, pattern: str) -> Iterator[Path]:
        return iter(sorted(glob(self, pattern), reverse=True))

    monkeypatch.setattr(Path, "glob", backwards)
    after = data.load("imagenet", "attack", folder)
    assert after.ids.tolist() == before.ids.tolist()
    assert torch.equal(after.images, before.images)


def test_the_choice_of_a_class_does_not_depend_on_the_other_classes(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, "flat")
    for number in range(1, 3 * EACH + 1):
        if label_of(number) == 1:
            (folder / "val" / name_of(number)).unlink()
    whole = data.load("imagenet", "attack", folders["flat"])
    monkeypatch.setattr(imagenet, "CLASSES", 2)
    (folder / "val.txt").write_text((folder / "val.txt").read_text().replace(" 2\n", " 1\n"))
    fewer = data.load("imagenet", "attack", folder)
    assert torch.equal(fewer.images, whole.images[whole.labels != 1])


def test_the_choice_is_a_shuffle_and_no_list_of_first_ones() -> None:
    ranks = [
        sorted(range(50), key=lambda n, c=c: imagenet._shuffled(imagenet.Photo(0, Path(f"{c}-{n}"), c)))[0]
        for c in range(200)
    ]
    assert len(set(ranks)) > 40
    assert 19 < np.mean(ranks) < 30


def test_only_the_images_of_the_split_are_decoded(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = write(tmp_path, "synsets")
    chosen = {name_of(i + 1) for i in data.load("imagenet", "attack", folder).ids.tolist()}
    for path in folder.glob("val/*/*.JPEG"):
        if path.name not in chosen:
            path.write_bytes(b"damaged")
    assert torch.equal(
        data.load("imagenet", "attack", folder).images, data.load("imagenet", "attack", folders["flat"]).images
    )
    with pytest.raises(ValueError, match=r"expected a picture, but .*JPEG is none that Pillow can read"):
        data.load("imagenet", "calibration", folder)


def test_batches_are_the_whole_in_parts(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "BATCH", 4)
    parts = list(data.batches("imagenet", "calibration", folders["flat"]))
    whole = data.load("imagenet", "calibration", folders["flat"])
    assert [len(part) for part in parts] == [4, 4, 4, 3]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.cat([part.ids for part in parts]).tolist() == whole.ids.tolist()
    assert torch.cat([part.labels for part in parts]).tolist() == whole.labels.tolist()


def test_what_is_missing_or_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected ImageNet's validation images as SYNSET/NAME.JPEG"):
        data.load("imagenet", "attack", tmp_path)
    folder = write(tmp_path, "flat")
    listed = (folder / "val.txt").read_text()
    for text, message in (
        (listed.replace(f"{name_of(3)} 0", ""), "expected a line for each image in .*, but .*00000003.JPEG has none"),
        (listed.replace(f"{name_of(3)} 0", f"{name_of(3)} cat"), "line 3 of .*val.txt, but got '.* cat'"),
        (listed.replace(f"{name_of(3)} 0\n", ""), "expected a line for each image in .*, but .*00000003.JPEG has none"),
        (listed.replace(" 0\n", " 1\n", 3), "expected at least 6 images of"),
        (listed.replace(" 2\n", " 1\n"), "expected images of all 3 classes in .*, but got those of 2"),
        (listed.replace(" 2\n", " 3\n"), "expected classes from 0 to 2 in .*, but got 3"),
    ):
        (folder / "val.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            data.load("imagenet", "attack", folder)
    (folder / "val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected val.txt with lines NAME.JPEG CLASS"):
        data.load("imagenet", "attack", folder)
    with pytest.raises(ValueError, match="unknown split 'test': expected one of attack, calibration"):
        data.load("imagenet", "test", folder)


def test_names_that_are_not_their_own_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "synsets")
    os.link(folder / "val" / SYNSETS[label_of(1)] / name_of(1), folder / "val" / SYNSETS[label_of(2)] / name_of(1))
    with pytest.raises(ValueError, match=r"expected each file name once .*, but .*00000001.JPEG is in several folders"):
        data.load("imagenet", "attack", folder)
    photo(99).save(folder / "val/extra.JPEG", format="JPEG")
    (folder / "val" / SYNSETS[label_of(2)] / name_of(1)).unlink()
    with pytest.raises(
        ValueError, match=r"expected images in .* or in its folders, but .* in both, such as extra.JPEG"
    ):
        data.load("imagenet", "attack", folder)


def test_a_folder_that_is_no_synset_is_refused_as_it_would_shift_the_classes(tmp_path: Path) -> None:
    folder = write(tmp_path, "synsets")
    (folder / "val/extras").mkdir()
    photo(99).save(folder / "val/extras/extra.JPEG", format="JPEG")
    with pytest.raises(ValueError, match=r"folders named by synsets, such as n01440764, but got .*extras"):
        data.load("imagenet", "attack", folder)
