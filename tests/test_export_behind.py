"""A protection behind a network that is an ONNX file: one file, which answers as one after the other."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import queryfoil as qf
from queryfoil.defenses.calibration import Fit
from queryfoil.defenses.terrace_fit import TerraceFit
from queryfoil.deploy.export import export
from queryfoil.models.victim import Input, victim

AAA = Fit("linear", 2.0, 1.0, 5.0, 1.0, "exact", 100, 0.1, 5, 100, 1.0, 0.1, 0.1, 0.1)
TERRACES = TerraceFit((0, 1, 1, 0, 1), ((0.5,), ()), (((0.5,), (0.9,)), ((0.8,),)), 1.0, 100, 0.5, 0.1, 0.1, 0.9, 0.9)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """An ONNX network for images (N, 3, 4, 4) that names tensors as we do, at an older opset."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 5)
    helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["images"]),
            helper.make_node("Gemm", ["images", "w", "b"], ["scores"], transB=1),
            helper.make_node("Mul", ["scores", "four"], ["logits"]),
        ],
        "network",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", FLOAT, ["N", 5])],
        [
            onnx.numpy_helper.from_array(layer.weight.detach().numpy(), "w"),
            onnx.numpy_helper.from_array(layer.bias.detach().numpy(), "b"),
            helper.make_tensor("four", FLOAT, [], [4.0]),
        ],
    )
    path = tmp_path / "network.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def ask(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    assert [session.get_inputs()[0].name, session.get_outputs()[0].name] == ["images", "scores"]
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize("found", [AAA, TERRACES], ids=["aaa", "terraces"])
@pytest.mark.parametrize("input", [Input(), Input((0.4,), (0.2,)), Input((0.4,), (0.2,), 4)], ids=["", "mean", "size"])
def test_one_file_answers_as_both(tmp_path: Path, network: Path, found: Any, input: Input) -> None:
    model = victim(str(network), input=input)
    shape = (3, 7, 7) if input.size else (3, 4, 4)
    done = export(model, found, tmp_path / "m.onnx", shape=shape if input.size else None)
    x = torch.rand(9, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = qf.protect(model, found)(x)
    torch.testing.assert_close(ask(done.path, x), expected, rtol=1e-3, atol=1e-3)
    (about,) = (json.loads(p.value) for p in onnx.load(done.path).metadata_props if p.key == "queryfoil")
    assert about["input_shape"] == list(shape)
    with pytest.raises(ValueError, match="is protected already"):
        export(victim(str(done.path)), found, tmp_path / "twice.onnx")


def test_what_cannot_be_put_behind_is_refused(tmp_path: Path, network: Path) -> None:
    with pytest.raises(ValueError, match="to be written as onnx, but got pt2"):
        export(victim(str(network)), AAA, tmp_path / "m.pt2", to="pt2")
    proto = onnx.load(network)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, network)
    with pytest.raises(ValueError, match=r"for batches of any size, but .* is for 1 images"):
        export(victim(str(network)), AAA, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["network.onnx"]
