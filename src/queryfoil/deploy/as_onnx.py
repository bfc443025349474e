"""A network and its protection as one ONNX file: from torch programs, or behind a network that is an ONNX file."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METADATA, OUTPUT = "queryfoil", "scores"
LOOPS = {"Loop", "Scan", "If", "SequenceMap"}
LARGEST = 2**31 - 2**20  # bytes of a file without others beside it, some of which are for the protection


def needs() -> Any:
    """The package onnx; ValueError if it, or another that is needed for it, is missing."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX files need the package {error.name}: install queryfoil[export]") from None
    return onnx


def graph_of(program: torch.export.ExportedProgram, name: str, shown: str) -> Any:
    """A program as an ONNX model with an input `name` and an output `shown`, for batches of any size."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.clamp.default:  # torch's exporter fails for a float and an integer bound
            node.args = (node.args[0], *(float(bound) if isinstance(bound, int) else bound for bound in node.args[1:]))
    told = logging.getLogger("torch.onnx")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's exporter, about its own parts
            made = torch.onnx.export(
                program, input_names=[name], output_names=[shown], dynamo=True, verbose=False,
                dynamic_shapes=({0: "batch"},),
            )  # fmt: skip
    finally:
        told.setLevel(level)
    if made is None:
        raise ValueError("torch.onnx gave no graph for this model")
    proto = made.model_proto
    if loops := sorted({node.op_type for node in nodes(proto.graph)} & LOOPS):
        raise ValueError(f"expected a graph without loops and branches, but it has {', '.join(loops)}")
    return proto


def write(proto: Any, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Write a model with what is said `about` it, and nothing of this machine; gives the way to ask it."""
    onnx = needs()
    import onnxruntime

    for part in (*nodes(proto.graph), proto.graph, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        part.ClearField("metadata_props")  # torch's: source lines and paths of this machine
        part.ClearField("doc_string")
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA, about
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = proto.graph.input[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])


def nodes(graph: Any) -> Iterator[Any]:
    """All nodes of an ONNX graph, those of graphs inside among them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from nodes(inner)


def read(path: Path) -> Any:
    """The ONNX model of a network; ValueError if nothing can be put behind it."""
    onnx = needs()
    beside = [p for p in path.parent.iterdir() if p.name.startswith(path.name) and p.is_file()]
    if (size := sum(p.stat().st_size for p in beside)) > LARGEST:
        raise ValueError(
            f"expected a network of at most 2 GB, as one ONNX file holds no more, but got {size / 1e9:.1f} GB in "
            f"{path}; write the protection alone by `queryfoil export scores OUT --fit FIT`, and ask one after another"
        )
    proto = onnx.load(path)
    told: dict[str, Any] = next((json.loads(prop.value) for prop in proto.metadata_props if prop.key == METADATA), {})
    if told.get("defense"):
        raise ValueError(f"expected a network without a defense, but {path} is protected already ({told['defense']})")
    kept = [prop for prop in proto.metadata_props if prop.key != METADATA]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    weights = {tensor.name for tensor in proto.graph.initializer}
    for value in [v for v in proto.graph.input if v.name in weights]:  # as old files list them
        proto.graph.input.remove(value)
    if proto.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        fixed = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        raise ValueError(
            f"expected a network for batches of any size, but {path} is for {fixed} images; export it with a dynamic "
            "batch (torch.onnx.export(..., dynamic_shapes=({0: 'batch'},)))"
        )
    if proto.graph.output[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise ValueError(f"expected scores in single precision (tensor(float)) as the output of {path}")
    return proto


def chain(models: list[Any], shape: tuple[int, ...]) -> Any:
    """ONNX models, each with one input and one output, one after another: from `images` (N, *shape) to `scores`."""
    needs()
    from onnx import compose, inliner, version_converter

    opset, ir = max(map(_opset, models)), max(model.ir_version for model in models)
    whole: Any = None
    for i, model in enumerate(models):
        if _opset(model) < opset:
            try:
                model = version_converter.convert_version(inliner.inline_local_functions(model), opset)
            except Exception as error:  # whatever the converter raises
                raise ValueError(f"onnx cannot bring this network to opset {opset}: {error}; export it anew") from None
        part = compose.add_prefix(model, f"part{i}.")  # so that no names meet
        part.ir_version = ir
        del part.graph.value_info[:]  # the batch may have another name in each
        if whole is not None:
            joint = [(whole.graph.output[0].name, part.graph.input[0].name)]
            part = compose.merge_models(whole, part, io_map=joint, name="protected", producer_name="queryfoil")
        whole = part
    for value, name in ((whole.graph.input[0], "images"), (whole.graph.output[0], OUTPUT)):
        _rename(whole.graph, value.name, name)
        value.name = name
    batch, *sides = whole.graph.input[0].type.tensor_type.shape.dim
    batch.dim_param = "batch"
    for dim, side in zip(sides, shape, strict=True):
        dim.dim_value = side
    whole.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return whole


def _opset(model: Any) -> int:
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def _rename(graph: Any, old: str, new: str) -> None:
    for node in nodes(graph):
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
