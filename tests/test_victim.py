"""Models of one's own: shipped names, functions in modules, ONNX files."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from helpers import Declared, Linear, images
from queryfoil import models, provenance
from queryfoil.models import checkpoints
from queryfoil.models.victim import Input, Victim, victim
from queryfoil.oracle import answers

FLOAT = TensorProto.FLOAT


def write_onnx(
    path: Path, batch: int | str = "N", shape: tuple[Any, ...] = (1, 8, 8), kind: int = FLOAT, outputs: int = 1
) -> Path:
    """`Linear` as an ONNX file; its arithmetic is exact, so its answers are the module's."""
    model = Linear()
    constants = {
        "levels": np.array(255, np.float32),
        "weight": model.weight.detach().numpy(),
        "bias": model.bias.detach().numpy(),
        "size": np.array(1024, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=FLOAT),
        helper.make_node("Mul", ["float", "levels"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["bytes"]),
        helper.make_node("Flatten", ["bytes"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["sum"], transB=1),
        helper.make_node("Div", ["sum", "size"], ["scores"]),
        helper.make_node("Identity", ["scores"], ["again"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", kind, [batch, *shape])],
        [helper.make_tensor_value_info(name, FLOAT, [batch, 10]) for name in ("scores", "again")[:outputs]],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + text)
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_shipped_name_gives_its_network() -> None:
    x = images(3, (1, 28, 28))
    found, network = victim("fashion-resnet"), models.load("fashion-resnet")
    assert torch.equal(found(x), network(x))
    assert (found.output, found.deterministic, found.training) == ("logits", True, False)
    assert found.identity["weights"] == provenance.weights(network)


def test_a_function_gives_a_module_or_any_callable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
def plain():
    return lambda x: x.flatten(1)
"""
    module(here, "own_models", text, monkeypatch)
    before = list(sys.path)
    net, plain = victim("own_models:net"), victim("own_models:plain")
    assert sys.path == before
    assert net(images(2, (1, 2, 2))).shape == (2, 3)
    assert plain(images(2, (1, 2, 2))).shape == (2, 4)
    assert (list(net.identity), list(plain.identity)) == (["source", "code", "weights"], ["source"])


def test_the_identity_of_a_module_follows_source_and_weights(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def net():\n    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()\n"
    text += (
        "    nn.init.constant_(net[1].weight, {})\n    nn.init.zeros_(net[1].bias)\n    return net.to(torch.bfloat16)\n"
    )
    found = []
    for number, weight in enumerate((0, 0, 1)):
        module(here, f"weighted{number}", text.format(weight), monkeypatch)
        found.append(victim(f"weighted{number}:net").identity)
    assert found[0] == found[1]
    assert found[0]["source"] != found[2]["source"]
    assert found[0]["weights"] != found[2]["weights"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fashion-resnt", "did you mean 'fashion-resnet'.*module:function, a path that ends in .onnx"),
        ("nowhere_at_all:net", "expected a module 'nowhere_at_all' in this folder or installed, but there is none"),
        ("os.nowhere:net", "expected a module 'os.nowhere'"),
        (":net", "expected module:function, such as"),
        ("own:", "expected module:function, such as"),
        ("own:nett", "unknown function of own 'nett'.*did you mean 'net'"),
        ("own:number", "expected own:number to be a function without arguments"),
        ("own:needs", "expected own:needs to be a function without arguments"),
        ("own:ready", "expected own:ready to be a function without arguments"),
        ("own:nothing", "expected own:nothing to return a callable from images to scores, but got NoneType"),
        ("own:training", r"\(partly\) training; call model.eval\(\)"),
        ("own:partly", r"\(partly\) training; call model.eval\(\)"),
        ("own:declares", "unknown output 'scores'"),
    ],
)
def test_what_is_no_model_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    text = """
number = 5
ready = nn.Flatten().eval()
def net(): return nn.Flatten().eval()
def needs(size): return nn.Flatten().eval()
def nothing(): return None
def training(): return nn.Sequential(nn.Flatten())
def partly():
    net = nn.Sequential(nn.Flatten()).eval()
    net[0].train()
    return net
def declares():
    net = nn.Flatten().eval()
    net.output = "scores"
    return net
"""
    module(here, "own", text, monkeypatch)
    with pytest.raises(ValueError, match=message):
        victim(spec)


def test_what_a_module_itself_misses_or_raises_is_shown_as_it_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(here, "misses", "import nowhere_at_all\ndef net(): return nn.Flatten().eval()", monkeypatch)
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        victim("misses:net")
    module(here, "raises", "def net(): raise KeyError('weights')", monkeypatch)
    with pytest.raises(KeyError, match="weights"):
        victim("raises:net")


def test_a_module_without_a_file_has_no_known_source(monkeypatch: pytest.MonkeyPatch) -> None:
    made = type(sys)("made")
    made.plain = lambda: lambda x: x.flatten(1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made", made)
    assert victim("made:plain").identity == {}


def test_the_output_is_declared_by_the_model_or_said(here: Path) -> None:
    model = Declared(Linear(), "probs")
    assert Victim(model).output == Victim(model, "probs").output == "probs"
    assert Victim(lambda x: x, "log_probs").output == "log_probs"
    with pytest.raises(ValueError, match="expected output 'probs', as the model declares it, but got 'logits'"):
        Victim(model, "logits")
    with pytest.raises(ValueError, match="did you mean 'probs'"):
        Victim(lambda x: x, "prob")


@pytest.mark.parametrize("device", ["tpu9", "meta"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match="expected a device that torch can use here"):
        victim("fashion-resnet", device)


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_an_onnx_file_answers_like_the_module(tmp_path: Path, batch: int | str) -> None:
    model = victim(str(write_onnx(tmp_path / "linear.onnx", batch)))
    x = images(7)
    ids = torch.arange(7)
    assert torch.equal(answers(model, x, ids, ids), Linear()(x))
    assert list(model.identity) == ["ONNX file"]


def test_the_identity_of_an_onnx_file_covers_weights_beside_it(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "linear.onnx")
    (tmp_path / "linear.onnx.folder").mkdir()
    before = victim(str(path)).identity
    (tmp_path / "linear.onnx.data").write_bytes(b"weights")
    assert victim(str(path)).identity != before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": TensorProto.DOUBLE}, r"as tensor\(float\) as the input of .*, but got tensor\(double\)"),
        ({"shape": (64,)}, r"expected images \(N, C, H, W\) .* but got tensor\(float\) \('N', 64\)"),
        ({"outputs": 2}, "expected one input and one output .* outputs scores, again"),
    ],
)
def test_an_onnx_file_of_another_form_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    path = write_onnx(tmp_path / "linear.onnx", **given)
    with pytest.raises(ValueError, match=message):
        victim(str(path))


def test_images_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    model = victim(str(write_onnx(tmp_path / "linear.onnx")))
    with pytest.raises(ValueError, match=r"expected images \('N', 1, 8, 8\) for .*linear.onnx, but got \(2, 1, 9, 8\)"):
        model(images(2, (1, 9, 8)))


def test_no_onnx_file_and_no_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"expected an ONNX file at .*, but there is none"):
        victim(str(tmp_path / "none.onnx"))
    path = tmp_path / "text.onnx"
    path.write_text("no model")
    with pytest.raises(ValueError, match=r"expected an ONNX file that onnxruntime can load, but got .*text.onnx"):
        victim(str(path))
    with pytest.raises(ValueError, match="unknown device for ONNX files 'meta'"):
        victim(str(path), "meta")
    with pytest.raises(ValueError, match="unknown provider of this onnxruntime 'CUDAExecutionProvider'"):
        victim(str(path), "cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'queryfoil\[export\]'"):
        victim(str(path))


def test_published_weights_are_named_by_network_and_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> dict[str, torch.Tensor]:
        return {"0.weight": torch.full((3, 64), float(path.stem))}

    def flat() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(64, 3, bias=False))
        model.register_forward_pre_hook(lambda module, given: (given[0].flatten(1),))
        return model

    monkeypatch.setitem(checkpoints.PUBLISHED, "Small", checkpoints.Published("", flat, read, ""))
    one, two = victim("Small=1.pt"), victim("Small=sub/2.pt")
    assert one(torch.ones(1, 1, 8, 8)).tolist() == [[64.0] * 3]
    assert two(torch.ones(1, 1, 8, 8)).tolist() == [[128.0] * 3]
    assert one.identity["weights"] != two.identity["weights"]
    with pytest.raises(ValueError, match=r"Small=1.pt has its normalization inside"):
        victim("Small=1.pt", input=Input(size=32))
    with pytest.raises(ValueError, match=r"unknown published network 'Smal': .*did you mean 'Small'"):
        victim("Smal=1.pt")
