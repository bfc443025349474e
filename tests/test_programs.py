"""Models with their code in a file: TorchScript and exported programs; and what is done to their input."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import Linear, images
from queryfoil import attacking
from queryfoil.models.victim import Input, Victim, victim
from queryfoil.oracle import answers

DYNAMIC = ({0: torch.export.Dim("n")},)


class Two(nn.Module):
    """One input, two outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.flatten(1)


def script(path: Path, model: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(model, images(2), check_trace=False), path)  # type: ignore[no-untyped-call]
    return path


def export(path: Path, model: nn.Module, batch: int = 3, dynamic: Any = None) -> Path:
    torch.export.save(torch.export.export(model, (images(batch),), dynamic_shapes=dynamic), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("programs")
    found = {
        "TorchScript": script(root / "linear.ts", Linear()),
        "exported": export(root / "linear.pt2", Linear(), dynamic=DYNAMIC),
        "exported for 3": export(root / "fixed.pt2", Linear()),
    }
    found["TorchScript as .pt2"] = script(root / "script.pt2", Linear())
    found["exported as .pt"] = export(root / "exported.pt2", Linear()).rename(root / "exported.pt")
    return found


KINDS = ["TorchScript", "exported", "exported for 3", "TorchScript as .pt2", "exported as .pt"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_answers_like_the_module_for_any_batch(files: dict[str, Path], kind: str) -> None:
    model = victim(str(files[kind]))
    for n in (1, 3, 7):
        x, ids = images(n), torch.arange(n)
        assert torch.equal(answers(model, x, ids, ids), Linear()(x))
    assert list(model.identity) == ["file"]


def test_the_identity_follows_the_bytes(files: dict[str, Path], tmp_path: Path) -> None:
    other = script(tmp_path / "other.ts", Linear(seed=1))
    assert victim(str(other)).identity != victim(str(files["TorchScript"])).identity


def test_a_file_is_attacked_like_the_module(files: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=(images(6) * 255).round().byte().numpy(), labels=np.arange(6))
    settings: dict[str, Any] = {"images": str(tmp_path / "x.npz"), "attack": "square", "eps": "16/255", "budget": 20}
    found = []
    for kind in ("TorchScript", "exported"):
        request = attacking.request(model=str(files[kind]), **settings)
        found.append(attacking.attack(request, tmp_path / kind)[1][0])
    assert found[0]["queries_total"] == found[1]["queries_total"] > 0
    other = attacking.request(model=str(files["exported"]), mean="0.5", std="0.25", **settings)
    assert other.digest() != attacking.request(model=str(files["exported"]), **settings).digest()
    assert attacking.prepare(other, "cpu").key != found[1]["cell"]
    assert other.model_dump(mode="json")["mean"] == [0.5]


def test_weights_without_a_network_are_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(Linear().state_dict(), tmp_path / "weights.pt")
    torch.save(Linear().state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "text.ts").write_text("no model")
    for name in ("weights.pt", "old.pth", "text.ts"):
        with pytest.raises(ValueError, match=rf"but .*{name} is neither; .* weights, .*: pass module:function for"):
            victim(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"expected TorchScript or an exported program at .*, but there is no file"):
        victim(str(tmp_path / "none.pt2"))


@pytest.mark.parametrize("kind", ["TorchScript", "exported"])
def test_a_damaged_file_is_named(files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    content = bytearray(files[kind].read_bytes())
    for start in range(0, len(content) // 2, 64):
        content[start + 30 : start + 60] = bytes(30)
    (tmp_path / "damaged.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.pt"):
        victim(str(tmp_path / "damaged.pt"))


def test_a_network_in_training_mode_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).train()
    with pytest.raises(ValueError, match=r"training; call model.eval\(\)"):
        victim(str(script(tmp_path / "training.ts", model)))
    with pytest.raises(ValueError, match=r"training.pt2 to be exported after model.eval\(\), but dropout is training"):
        victim(str(export(tmp_path / "training.pt2", model)))
    victim(str(export(tmp_path / "evaluation.pt2", model.eval())))


def test_an_exported_program_of_another_form_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"expected one input, images .* and one output"):
        victim(str(export(tmp_path / "two.pt2", Two().eval())))
    with pytest.raises(ValueError, match=r"expected images \(3, 1, 8, 8\) for .*fixed.pt2, but got \(2, 1, 9, 8\)"):
        victim(str(files["exported for 3"]))(images(2, (1, 9, 8)))
    for kind in ("TorchScript", "exported"):
        with pytest.raises(ValueError, match="expected a device that torch can use here"):
            victim(str(files[kind]), "tpu9")


def test_the_input_is_resized_then_normalized() -> None:
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(2, 3, 2, 2)
    seen = Victim(lambda x: x, input=Input(mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25), size=4))(x)
    # bilinear, from 2 to 4 pixels: weights 0, 1/4, 3/4, 1 of the right one
    row = torch.tensor([0.0, 0.25, 0.75, 1.0])
    for channel, (mean, std) in enumerate([(0.5, 0.5), (0.0, 1.0), (0.25, 0.25)]):
        assert torch.allclose(seen[:, channel], ((row - mean) / std).expand(2, 4, 4))
    one = Input(mean=(0.5,), std=(0.25,))(x)
    assert torch.equal(one, (x - 0.5) / 0.25)
    assert Input(size=2)(x) is x


def test_shrinking_averages_over_pixels_and_rows_are_independent() -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, ::2] = 1  # stripes, which a filter without antialiasing would miss
    assert torch.allclose(Input(size=2)(x), torch.full((1, 1, 2, 2), 0.5), atol=0.08)
    many = images(5, (3, 9, 7))
    assert torch.equal(Input(size=4)(many)[2:3], Input(size=4)(many[2:3]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": (0.5,)}, "expected mean and std together"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "expected mean and std together, of one length"),
        ({"mean": (0.5,), "std": (0.0,)}, "expected std > 0"),
        ({"mean": (), "std": ()}, "expected std > 0"),
        ({"size": 0}, "expected a size of at least 1 pixel"),
    ],
)
def test_an_input_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Input(**given)


def test_mean_and_std_fit_the_channels_and_no_shipped_model() -> None:
    with pytest.raises(ValueError, match="expected mean and std of 1 or 3 numbers, as the images have 3 channels"):
        Input(mean=(0.5, 0.5), std=(1.0, 1.0))(images(1, (3, 4, 4)))
    with pytest.raises(ValueError, match="fashion-resnet has its normalization inside; leave out mean, std and size"):
        victim("fashion-resnet", input=Input(size=28))
