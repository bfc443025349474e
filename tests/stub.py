"""An endpoint over HTTP that does what a test tells it and counts what it is sent; and how tests run audits."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typer.testing import CliRunner

from queryfoil import cli, summary, table
from queryfoil.deploy.audit import prepare
from queryfoil.deploy.audit_run import run
from queryfoil.deploy.remote import Limits
from queryfoil.store import Store

SHAPE, CLASSES = (1, 6, 6), 3
WEIGHTS = np.random.default_rng(7).normal(size=(36, CLASSES)).astype(np.float32)
WEIGHTS -= WEIGHTS.mean(0)  # so that brightness says nothing
Scores = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def scores(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (n, K) of images, each image by itself."""
    return np.stack([(one.reshape(-1, 1) * WEIGHTS).sum(0) for one in x])


def images(folder: Path, n: int = 20) -> Path:
    """A NumPy file of bytes and the labels that the stub gives them."""
    levels = np.random.default_rng(3).integers(0, 256, (n, *SHAPE)).astype(np.uint8)
    labels = scores(levels.astype(np.float32) / np.float32(255)).argmax(1)
    np.savez(folder / "images.npz", images=levels, labels=labels)
    return folder / "images.npz"


@dataclass
class Stub:
    """What the endpoint does, and what it was sent."""

    answer: Scores = scores
    before: Callable[["Stub", int], tuple[int, dict[str, str], str] | None] = lambda stub, n: None  # another answer
    token: str | None = None
    binary: bool = True
    datatype: str = "FP32"
    output: str | None = "logits"
    images: int = 0  # that came in
    batches: list[int] = field(default_factory=list)
    answered: int = 0  # images that got scores
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v2/models/stub"

    def metadata(self) -> dict[str, Any]:
        told = {
            "name": "stub", "platform": "test",
            "inputs": [{"name": "pixels", "datatype": self.datatype, "shape": [-1, *SHAPE]}],
            "outputs": [{"name": "out", "datatype": "FP32", "shape": [-1, CLASSES]}],
        }  # fmt: skip
        return told | ({} if self.output is None else {"properties": {"output": self.output}})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stub: Stub

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _let_in(self) -> bool:
        if self.stub.token is None or self.headers.get("authorization") == f"Bearer {self.stub.token}":
            return True
        self._reply(401, b'{"error": "expected a token"}')
        return False

    def do_GET(self) -> None:
        if self._let_in():
            server = {"name": "stub", "extensions": ["binary_tensor_data"] if self.stub.binary else []}
            self._reply(200, json.dumps(server if self.path == "/v2" else self.stub.metadata()).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if not self._let_in():
            return
        length = int(self.headers.get("inference-header-content-length") or len(body))
        one = json.loads(body[:length])["inputs"][0]
        assert one["name"] == "pixels"
        assert ("data" in one) != self.stub.binary
        kind = np.dtype("<f4") if self.stub.datatype == "FP32" else np.dtype("u1")
        values = np.array(one["data"], kind) if "data" in one else np.frombuffer(body[length:], kind)
        x = values.reshape(one["shape"]).astype(np.float32)
        self.stub.images += len(x)
        self.stub.batches.append(len(x))
        other = self.stub.before(self.stub, len(x))
        if other is not None:
            self._reply(other[0], json.dumps({"error": other[2]}).encode(), **other[1])
            return
        found = self.stub.answer(x / np.float32(255) if kind == np.uint8 else x).astype("<f4")
        self.stub.answered += len(x)
        output: dict[str, Any] = {"name": "out", "datatype": "FP32", "shape": list(found.shape)}
        if not self.stub.binary:
            text = json.dumps({"outputs": [output | {"data": found.ravel().tolist()}]}).encode()
            self._reply(200, text)
            return
        output["parameters"] = {"binary_data_size": found.nbytes}
        text = json.dumps({"outputs": [output]}).encode()
        self._reply(200, text + found.tobytes(), Inference_Header_Content_Length=str(len(text)))


@contextmanager
def running(stub: Stub) -> Iterator[Stub]:
    """The stub on a free port of this machine, or on its own."""
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", stub.port), handler)
    server.daemon_threads = True
    stub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


ROOT = Path(__file__).parent.parent
QUICK = Limits(batch=8, patience=5, timeout=5)


def fooled_at(folder: Path) -> dict[str, list[int]]:
    _, results = summary.collect(Store(folder))
    return {r.label: table.fooled_at(r.attacked).tolist() for r in results}


def queries(folder: Path) -> int:
    """Of all attacks, as counted by them."""
    return sum(sum(r.attacked.column("queries").to_pylist()) for r in summary.collect(Store(folder))[1])


def go(stub: Stub, folder: Path, **changed: Any) -> Path:
    """An audit of a stub, in this process."""
    given: dict[str, Any] = {"attacks": ["greedy"], "n": 16, "budget": 20, "eps": "16/255", "limits": QUICK}
    options = {key: changed.pop(key) for key in ("token", "chunk") if key in changed}
    settings = prepare(stub.url, str(images(folder)), folder / "out", **{**given, **changed})
    assert run(settings, **options).left == 0
    return folder / "out"


def command(*words: str, **environment: str) -> subprocess.Popen[str]:
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "queryfoil.cli", "audit", *words], env=surroundings, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def invoke(*words: str, **named: Any) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, ["audit", *map(str, words)], env={"COLUMNS": "300"}, **named)
    return found.exit_code, found.output
