"""One file with a model and its protection: what it answers, what it says of itself, and what is refused."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import queryfoil as qf
from queryfoil import cli
from queryfoil.defenses import calibration, terrace_fit
from queryfoil.deploy import export as exporting
from queryfoil.deploy.export import Exported, export
from queryfoil.deploy.graph import Protection, off_borders
from queryfoil.models.victim import Victim


def drawn(classes: int = 5, n: int = 1000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, classes, generator=generator)
    return logits, logits.softmax(1).multinomial(1, generator=generator).squeeze(1)


FITS: dict[str, Any] = {
    "linear": lambda z, y: calibration.fit(z, y, curve="linear", tau=2.0),
    "sine": lambda z, y: calibration.fit(z, y, curve="sine", tau=2.0),
    "terraces": lambda z, y: terrace_fit.fit(z, y, allowed=0.1),
    "terraces, two places": lambda z, y: terrace_fit.fit(z, y, allowed=0.1, ranks=2),
}


def network(output: str = "logits", classes: int = 5) -> Victim:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(12, classes)]
    layers += {"logits": [], "log_probs": [nn.LogSoftmax(1)], "probs": [nn.Softmax(1)]}[output]
    return Victim(nn.Sequential(*layers).eval(), output)


def ask(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("output", ["logits", "probs"])
def test_an_onnx_file_answers_as_the_protected_model_does(tmp_path: Path, name: str, output: str) -> None:
    found, victim = FITS[name](*drawn()), network(output)
    done = export(victim, found, tmp_path / "model.onnx", shape=(1, 3, 4))
    x = 4 * torch.rand(7, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = qf.protect(victim, found)(x)
    torch.testing.assert_close(ask(done.path, x), expected.float(), rtol=1e-3, atol=1e-4)
    assert (done.n, done.largest < 1e-3) == (68, True)
    kinds = {node.op_type for node in onnx.load(done.path).graph.node}
    assert not kinds & {"Loop", "Scan", "If"}


def test_the_graph_does_not_grow_with_the_classes(tmp_path: Path) -> None:
    nodes = []
    for classes in (5, 50):
        found = calibration.fit(*drawn(classes), tau=2.0)
        nodes.append(len(onnx.load(export(None, found, tmp_path / f"{classes}.onnx").path).graph.node))
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("name", ["sine", "terraces"])
def test_an_exported_program_is_read_back(tmp_path: Path, name: str) -> None:
    found, victim = FITS[name](*drawn()), network()
    path = export(victim, found, tmp_path / "model.pt2", to="pt2", shape=(1, 3, 4)).path
    extra = {"queryfoil.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    x = torch.rand(9, 1, 3, 4)
    torch.testing.assert_close(program(x), qf.protect(victim, found)(x).detach().float(), rtol=1e-4, atol=1e-5)
    assert json.loads(extra["queryfoil.json"])["defense"] == ("terraces" if name == "terraces" else "aaa")


def test_the_protection_alone_takes_scores_and_can_show_probabilities(tmp_path: Path) -> None:
    z, y = drawn()
    found = terrace_fit.fit(z, y, allowed=0.1)
    path = export(None, found, tmp_path / "scores.onnx", softmax=True, held_out=(z, y)).path
    torch.testing.assert_close(ask(path, z), qf.disguise(z, curve="terraces", key=found).softmax(1))
    broken = z[:3].clone()
    broken[1, 0] = torch.nan
    assert ask(path, broken).isnan().all(1).tolist() == [False, True, False]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    z, y = drawn()
    found = calibration.fit(z, y, tau=2.0)
    path = export(network(), found, tmp_path / "model.onnx", shape=(1, 3, 4), softmax=True, held_out=(z, y)).path
    (about,) = (json.loads(p.value) for p in onnx.load(path).metadata_props if p.key == "queryfoil")
    assert about["version"] == qf.__version__
    assert about["parameters"] == json.loads(json.dumps(vars(found)))
    assert (about["input"], about["input_shape"], about["classes"], about["output"]) == (
        "images",
        [1, 3, 4],
        5,
        "probs",
    )
    assert len(about["fit_data"]) == 16
    top = qf.disguise(z, **found.settings()).topk(2).values
    np.testing.assert_allclose(about["shown_margins"]["margins"][10], (top[:, 0] - top[:, 1]).median(), atol=0.02)


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_the_file_has_no_paths_of_the_machine_that_wrote_it(tmp_path: Path, to: str) -> None:
    path = export(network(), terrace_fit.fit(*drawn(), allowed=0.1), tmp_path / "m", to=to, shape=(1, 3, 4)).path
    parts = [path.read_bytes()]
    if to == "pt2":
        with zipfile.ZipFile(path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
    assert not any(b".py" in part or str(Path.home()).encode() in part for part in parts)


def test_what_is_no_probability_is_shown_as_nothing() -> None:
    shown = Protection(terrace_fit.fit(*drawn(), allowed=0.1), "probs")(
        torch.tensor([[0.6, 0.4, 0.0, 0.0, 0.0], [-0.1, 1.1, 0.0, 0.0, 0.0]])
    )
    assert shown.isnan().all(1).tolist() == [False, True]


def test_a_file_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = terrace_fit.fit(*drawn(), allowed=0.1)
    whole = exporting._onnx
    for spoil, message in (
        (lambda s: s.roll(1, 1), r"68 of 68 labels"),
        (lambda s: 1.1 * s, r"0 of 68 labels, margins by up to"),
        (lambda s: s * torch.nan, "does not give finite scores"),
    ):
        monkeypatch.setattr(exporting, "_onnx", lambda *given, spoil=spoil: lambda x: spoil(whole(*given)(x)))
        with pytest.raises(ValueError, match=message):
            export(None, found, tmp_path / "model.onnx")
        assert list(tmp_path.iterdir()) == []


def test_rows_at_a_border_are_told_from_others() -> None:
    margins = torch.tensor([1.0, 2.0, 2.00005, 2.5, 0.00005])
    z = torch.stack([margins, torch.zeros(5), torch.full((5,), -9.0)], 1)
    linear = calibration.Fit("linear", 2.0, 1.0, 5.0, 1.0, "exact", 100, 0.1, 3, 100, 1.0, 0.1, 0.1, 0.1)
    assert off_borders(z, linear).tolist() == [True, False, False, True, False]
    key = terrace_fit.TerraceFit(
        (0, 1, 1), ((2.5,), ()), (((0.5,), (0.9,)), ((0.8,),)), 1.0, 100, 0.5, 0.1, 0.1, 0.9, 0.9
    )
    assert off_borders(z, key).tolist() == [True, True, True, False, False]
    assert off_borders(z, None).tolist() == [True, True, True, True, False]


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    z, y = drawn()
    adam, found = calibration.fit(z, y, tau=2.0, solver="adam", steps=3), calibration.fit(z, y, tau=2.0)
    with pytest.raises(ValueError, match="expected a fit with the solver exact, but got adam"):
        Protection(adam)
    for given, message in (
        ({"shape": None}, "expected the shape of an image"),
        ({"to": "tflite"}, "unknown format 'tflite': expected one of numpy, onnx, pt2"),
        ({"held_out": (z[:500], y[:500])}, "expected the 1000 held-out rows of 5 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            export(network(), found, tmp_path / "model.onnx", **{"shape": (1, 3, 4), **given})
    drawing = network()
    drawing.deterministic = False
    with pytest.raises(ValueError, match="draws at random"):
        export(drawing, found, tmp_path / "model.onnx", shape=(1, 3, 4))
    with pytest.raises(
        ValueError, match=r"answers images \(N, 2, 3, 4\), but of 68 it raised RuntimeError: .*by --shape"
    ):
        export(network(), found, tmp_path / "model.onnx", shape=(2, 3, 4))
    for answer, got in (((z, y), "tuple"), (z, r"\(1000, 5\)"), (z[:68, None], r"\(68, 1, 5\)")):
        odd = Victim(lambda x, answer=answer: answer)
        with pytest.raises(ValueError, match=rf"expected scores as a tensor \(68, K\) from the model, but got {got}"):
            export(odd, found, tmp_path / "model.onnx", shape=(1, 3, 4))
    with pytest.raises(ValueError, match="expected scores of 5 classes, as the protection was fitted to, but got 4"):
        export(network(classes=4), found, tmp_path / "model.onnx", shape=(1, 3, 4))
    assert list(tmp_path.iterdir()) == []


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), 5)


class Centered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, :5]
        return z - z.mean(0)


class Switched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, :5]
        return z if float(z.sum()) > 0 else -z


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5] * torch.nan


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5].squeeze()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Nothing(), "does not give finite scores"),
        (Squeezed(), r"expected scores as a tensor \(1, K\) from the model, but got \(5,\)"),
        (Drawing(), "asked twice this one gave others"),
        (Centered(), "in another batch this one gave the same images other scores"),
        (Switched(), "torch.export makes no graph of this model"),
    ],
)
def test_a_network_that_no_graph_can_hold_is_refused_in_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], module: nn.Module, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(Victim(module.eval()), None, tmp_path / "model.onnx", shape=(1, 3, 4))
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    z, y = drawn(10)
    np.savez(tmp_path / "logits.npz", logits=z.numpy(), labels=y.numpy())
    calibration.fit(z, y, tau=2.0).save(tmp_path / "fit.json")

    def told(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, ["export", *arguments])
        return result.output.replace("\n", " ")

    fit, out = ("--fit", str(tmp_path / "fit.json")), str(tmp_path / "model.onnx")
    done = told("fashion-resnet", out, *fit, "--held-out", str(tmp_path / "logits.npz"))
    assert "the labels are those of the module" in done
    assert ask(Path(out), torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert "but got neither" in told("fashion-resnet", out)
    assert "but got both" in told("fashion-resnet", out, *fit, "--unprotected")
    assert "is protected already (aaa)" in told(out, str(tmp_path / "twice.onnx"), *fit)
    assert "sees no images; leave out" in told("scores", out, *fit, "--size", "28")
    assert "labels are those of the module" in told("scores", out, *fit)


def test_the_report_is_a_line() -> None:
    assert str(Exported(Path("m.onnx"), 2_000_000, 68, 1, 2e-6)).count("\n") == 0
