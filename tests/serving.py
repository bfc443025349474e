"""A small protected model as `queryfoil export` writes it, a server of it in a process, and a plain client."""

import http.client
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import queryfoil
from queryfoil import data
from queryfoil.deploy.kserving import pb
from queryfoil.deploy.margins import shown_margins

ROOT = Path(__file__).parent.parent
SHAPE, CLASSES = (1, 28, 28), 10
BORDERS = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
LEVELS = [0.05, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
TOKEN = "0123456789abcdef"
ONE = np.full((1, *SHAPE), 0.5, np.float32)
METHOD = "/inference.GRPCInferenceService/ModelInfer"


def weights() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A linear classifier (784, 10) of the shipped clothes and its bias, by least squares with a penalty."""
    held_out = data.load("fashion-mnist", "calibration")
    x = torch.cat([held_out.images.flatten(1), torch.ones(len(held_out.images), 1)], 1).double()
    y = torch.nn.functional.one_hot(held_out.labels, CLASSES).double()
    w = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y) * 8
    return w[:-1].float().numpy(), w[-1].float().numpy()


def about(**changed: Any) -> dict[str, Any]:
    """The metadata of a file."""
    plain = {
        "version": queryfoil.__version__, "defense": "terraces", "parameters": {"borders": [BORDERS]},
        "fit_data": "0" * 64, "input": "images", "input_shape": list(SHAPE), "classes": CLASSES, "output": "probs",
        "shown_margins": None, "created": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return {**plain, **changed}


def write(
    path: Path, *, protected: bool = True, told: dict[str, Any] | None = None, outputs: tuple[str, ...] = ("scores",)
) -> Path:
    """An ONNX file with its metadata: probabilities in a few levels, or as the classifier has them.

    A black image has no finite scores. `told` is the metadata, {} for none.
    """
    w, b = weights()
    constants = {"w": w, "b": b, "zero": np.float32(0), "axis": np.array([1], np.int64)}
    if protected:
        constants |= {
            "k": np.array([2], np.int64), "first": np.array([0], np.int64), "second": np.array([1], np.int64),
            "borders": np.array([BORDERS], np.float32), "levels": np.array(LEVELS, np.float32),
            "depth": np.int64(CLASSES), "off_on": np.array([0, 1], np.float32),
        }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Flatten", ["images"], ["flat"]), node("MatMul", ["flat", "w"], ["product"]),
        node("Add", ["product", "b"], ["linear"]),
        node("ReduceSum", ["flat", "axis"], ["light"]), node("Log", ["light"], ["bright"]),
        node("Mul", ["bright", "zero"], ["nothing"]), node("Add", ["linear", "nothing"], ["logits"]),
    ]  # fmt: skip
    if protected:
        nodes += [
            node("TopK", ["logits", "k"], ["top", "which"]),
            node("Gather", ["top", "first"], ["best"], axis=1), node("Gather", ["top", "second"], ["next"], axis=1),
            node("Sub", ["best", "next"], ["margin"]), node("GreaterOrEqual", ["margin", "borders"], ["above"]),
            node("Cast", ["above"], ["ones"], to=TensorProto.INT64), node("ReduceSum", ["ones", "axis"], ["interval"]),
            node("Gather", ["levels", "interval"], ["level"]), node("Gather", ["which", "first"], ["label"], axis=1),
            node("Squeeze", ["label", "axis"], ["answer"]), node("OneHot", ["answer", "depth", "off_on"], ["one"]),
            node("Mul", ["one", "level"], ["flat_shown"]), node("Add", ["flat_shown", "nothing"], ["shown"]),
        ]  # fmt: skip
    nodes.append(node("Softmax", ["shown" if protected else "logits"], ["scores"], axis=1))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "clothes", [value("images", TensorProto.FLOAT, ["batch", *SHAPE])],
        [value(name, TensorProto.FLOAT, ["batch", CLASSES]) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if told is None:
        onnx.save(model, path)
        margins = shown_margins(offline(path, data.load("fashion-mnist", "calibration").images.numpy()), "probs")
        shares = np.linspace(0, 1, 21)
        rows = np.quantile(margins, shares, method="inverted_cdf")
        told = about(defense="terraces" if protected else None)
        told["shown_margins"] = {"quantiles": shares.tolist(), "margins": rows.tolist()}
    if told:
        helper.set_model_props(model, {"queryfoil": json.dumps(told)})
    onnx.save(model, path)
    return path


def offline(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores that the file gives without a server."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scores: NDArray[np.float32] = session.run(["scores"], {"images": images})[0]
    return scores


class Service:
    """`queryfoil serve FILE` in a process on free ports, until `stop`."""

    def __init__(self, file: Path, *options: str, **environment: str) -> None:
        self.file, self.log = file, file.with_suffix(".log")
        command = [
            sys.executable,
            "-m",
            "queryfoil.cli",
            "serve",
            str(file),
            "--port",
            "0",
            "--grpc-port",
            "0",
            *options,
        ]
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200", **environment}
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=surroundings, start_new_session=True
            )
        self.line = self._line(60)
        found = re.search(r"http://([^:/]+):(\d+)/v2/models/(\S+)(?: and gRPC at (\S+);)?", self.line)
        assert found, self.line + self.log.read_text()
        self.host, self.port, self.name, self.grpc = found[1], int(found[2]), found[3].rstrip(";"), found[4]
        self.infer = f"/v2/models/{self.name}/infer"

    def _line(self, seconds: float) -> str:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            return self.process.stdout.readline() if waiting.select(seconds) else ""

    def call(
        self, path: str, body: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of an answer; the names of headers with _ for -."""
        line = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            line.request(method or ("GET" if body is None else "POST"), path, body, named)
            answer = line.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            line.close()

    def scores(self, images: NDArray[np.float32], **headers: str) -> NDArray[np.float32]:
        """Scores by a binary request."""
        status, sent, answer = self.call(self.infer, *binary(images)[:1], **binary(images)[1], **headers)
        assert status == 200, answer
        return np.frombuffer(answer[int(sent["inference-header-content-length"]) :], "<f4").reshape(len(images), -1)

    def metric(self, name: str, **headers: str) -> float:
        """The sum of a metric's lines that begin with this name."""
        text = self.call("/metrics", **headers)[2].decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def stop(self, how: int = signal.SIGINT) -> int:
        """Stop as Ctrl-C does; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(20)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process.stdout.close()


def binary(images: NDArray[np.float32], **changed: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with a binary tensor, which wants one back."""
    raw = images.tobytes()
    one = {"name": "images", "shape": list(images.shape), "datatype": "FP32" if images.dtype == np.float32 else "UINT8",
           "parameters": {"binary_data_size": len(raw)}, **changed}  # fmt: skip
    text = json.dumps({"inputs": [one], "parameters": {"binary_data_output": True}}).encode()
    return text + raw, {"inference_header_content_length": str(len(text))}


def plain(images: NDArray[np.float32], **changed: Any) -> dict[str, Any]:
    """A request as JSON."""
    one = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return {"inputs": [{**one, **changed}]}


def message(values: NDArray[Any] = ONE, **changed: Any) -> Any:
    """A call's message for images."""
    one = {"name": "images", "datatype": "FP32", "shape": values.shape}
    return pb.ModelInferRequest(**{
        "model_name": "clothes", "inputs": [one], "raw_input_contents": [values.astype("<f4").tobytes()], **changed
    })  # fmt: skip


def ask(service: Service, request: Any, seconds: float = 10) -> tuple[Any, str]:
    """gRPC's status and details for a message, or for bytes as one."""
    with grpc.insecure_channel(service.grpc) as channel:
        call = channel.unary_unary(METHOD)
        try:
            call(request if isinstance(request, bytes) else request.SerializeToString(), timeout=seconds)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def reason(answer: bytes) -> str:
    """The reason of a refusal, which tells nothing of our code."""
    found = json.loads(answer)
    assert list(found) == ["error"]
    assert not re.search(r"Traceback|File \"|\.py|onnxruntime|0x[0-9a-f]{6}", found["error"])
    return str(found["error"])


class Remote:
    """A server as a model that `queryfoil.attack` takes."""

    output = "probs"

    def __init__(self, service: Service, **headers: str) -> None:
        self.service, self.headers = service, headers

    def __call__(self, x: Tensor) -> Tensor:
        parts = [self.service.scores(part.numpy(), **self.headers) for part in x.split(32)]
        return torch.from_numpy(np.concatenate(parts))


def wait(holds: Any, seconds: float = 10.0) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False
