"""The parts of a server by themselves: the model behind any KServe server, the guard, tokens, limits, drift."""

import asyncio
import json
import logging
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import serving
from queryfoil import data
from queryfoil.deploy import drift, wire
from queryfoil.deploy.drift import Drift, distance
from queryfoil.deploy.guard import Guard
from queryfoil.deploy.kserving import DataPlane, InferInput, InferRequest, InvalidInput, pb
from queryfoil.deploy.limits import CLIENT, Gate, Limits
from queryfoil.deploy.margins import shown_margins
from queryfoil.deploy.metrics import Metrics
from queryfoil.deploy.model import ProtectedModel
from queryfoil.deploy.served import About, Margins
from queryfoil.deploy.tensors import RefusedError
from queryfoil.deploy.tokens import Tokens
from serving import ONE, binary, offline, plain


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write(tmp_path_factory.mktemp("parts") / "clothes.onnx")


@pytest.fixture
def clean() -> NDArray[np.float32]:
    images: NDArray[np.float32] = data.load("fashion-mnist", "attack").images[:4].numpy()
    return images


def request(x: NDArray[np.float32]) -> Any:
    return InferRequest("m", [InferInput("images", list(x.shape), "FP32", x)], "7")


def answer(model: ProtectedModel, x: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = asyncio.run(model.predict(request(x))).outputs[0].as_numpy()
    return found


def test_the_same_class_answers_behind_kserves_own_server(file: Path, clean: NDArray[np.float32]) -> None:
    model, expected = ProtectedModel("m", file), offline(file, clean)
    plane = DataPlane(model_registry=registry(model))
    body, headers = binary(clean)
    by_bytes = InferRequest.from_bytes(body, int(headers["inference_header_content_length"]), "m")
    one = {"name": "images", "datatype": "FP32", "shape": clean.shape}
    by_grpc = pb.ModelInferRequest(model_name="m", inputs=[one], raw_input_contents=[clean.tobytes()])
    for asked in (by_bytes, InferRequest.from_grpc(by_grpc), request(clean)):
        found, _ = asyncio.run(plane.infer("m", asked))
        assert np.array_equal(found.outputs[0].as_numpy(), expected)
    sent = asyncio.run(plane.infer("m", InferRequest.from_grpc(by_grpc)))[0].to_grpc()
    assert np.array_equal(np.frombuffer(sent.raw_output_contents[0], "<f4").reshape(expected.shape), expected)
    text, size = asyncio.run(plane.infer("m", by_bytes))[0].to_rest()
    assert np.array_equal(np.frombuffer(text[size:], "<f4").reshape(expected.shape), expected)
    for wrong in ({"instances": clean.tolist()}, request(clean + 1), request(clean[:, :, 1:])):
        with pytest.raises(InvalidInput, match="expected"):
            asyncio.run(plane.infer("m", wrong))
    model.close()


def registry(model: ProtectedModel) -> Any:
    from kserve.model_repository import ModelRepository

    found = ModelRepository()
    found.update(model)
    return found


def test_a_model_goes_to_another_process_by_its_file(file: Path, clean: NDArray[np.float32]) -> None:
    model = pickle.loads(pickle.dumps(ProtectedModel("m", file, max_batch=2, decimals=2)))
    assert (model.name, model.max_batch, model.ready) == ("m", 2, True)
    assert answer(model, clean[:2]).round(2) == pytest.approx(answer(model, clean[:2]), abs=1e-6)
    with pytest.raises(InvalidInput, match="at most 2 images"):
        answer(model, clean[:3])


def test_the_query_log_gets_what_the_client_saw(file: Path, clean: NDArray[np.float32], tmp_path: Path) -> None:
    model = ProtectedModel("m", file, decimals=1, query_log=tmp_path / "log")
    token = CLIENT.set("lab")
    try:
        shown = answer(model, clean)
    finally:
        CLIENT.reset(token)
    assert not np.array_equal(shown, offline(file, clean))
    with pytest.raises(InvalidInput):
        answer(model, clean * 2)
    model.close()
    (path,) = (tmp_path / "log").glob("*.parquet")
    rows = pq.read_table(path)
    assert rows.column("client").to_pylist() == ["lab"] * 4
    assert rows.column("top").to_pylist() == shown.argmax(1).tolist()
    assert np.array_equal(rows.column("margin").to_numpy(), np.floor(shown_margins(shown.copy(), "probs") * 4) / 4)


def test_an_answer_is_not_lost_when_the_log_cannot_be_written(
    file: Path, clean: NDArray[np.float32], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ProtectedModel("m", file, query_log=tmp_path / "log")
    model._log.rows = 1  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"")  # a file where the folder was
    assert np.array_equal(answer(model, clean), offline(file, clean))
    assert "the query log cannot be written: File exists" in caplog.text
    assert b"queryfoil_unlogged_images_total 4.0" in model.metrics.text()
    model.close()


def endless(path: Path) -> Path:
    """A file whose answers take for ever: it counts to a number that is never reached."""
    node, value = helper.make_node, helper.make_tensor_value_info
    scalar = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, [1])]
    outputs = [value("went", TensorProto.BOOL, []), value("y", TensorProto.FLOAT, [1])]
    body = helper.make_graph(
        [node("Identity", ["go"], ["went"]), node("Add", ["x", "step"], ["y"])], "count", scalar, outputs,
        [numpy_helper.from_array(np.ones(1, np.float32), "step")],
    )  # fmt: skip
    graph = helper.make_graph(
        [node("Flatten", ["images"], ["flat"]), node("Loop", ["most", "", "start"], ["end"], body=body),
         node("Mul", ["end", "none"], ["nothing"]), node("Add", ["flat", "nothing"], ["scores"])],
        "endless", [value("images", TensorProto.FLOAT, ["batch", 1, 1, 2])],
        [value("scores", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.array(2**62), "most"), numpy_helper.from_array(np.zeros(1, np.float32), "start"),
         numpy_helper.from_array(np.zeros(1, np.float32), "none")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    told = serving.about(input_shape=[1, 1, 2], classes=2, output="logits")
    helper.set_model_props(model, {"queryfoil": json.dumps(told)})
    onnx.save(model, path)
    return path


def test_what_nobody_waits_for_is_computed_no_further(tmp_path: Path) -> None:
    model = ProtectedModel("m", endless(tmp_path / "endless.onnx"))

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(model.predict(request(np.zeros((1, 1, 1, 2), np.float32))), 0.2)

    asyncio.run(impatient())
    start = time.monotonic()
    model.close()  # waits for all threads
    assert time.monotonic() - start < 5


def told() -> About:
    return About.model_validate(serving.about())


def asked(app: Any, *, timeout: float = 5.0, most: int = 4, method: str = "POST", **options: Any) -> Any:
    """Status, headers and body of what the guard before an application answers."""
    guard = Guard(app, Limits(1000, timeout=timeout), options.get("tokens"), Gate(most), Metrics(told()))
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/x", "headers": [], "client": ("10.0.0.1", 5)}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(part["body"] for part in sent[1:])


def test_what_takes_too_long_gets_a_503() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    status, headers, body = asked(slow, timeout=0.05)
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert json.loads(body)["error"].startswith("the service could not answer within 0.05 s")


def test_an_error_of_ours_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("the client's own words: 0.1234567")

    with caplog.at_level(logging.DEBUG):
        status, _, body = asked(broken)
    assert (status, json.loads(body)) == (500, {"error": "internal error"})
    assert "internal error: KeyError at " in caplog.text
    assert "test_serve_parts.py:" in caplog.text
    assert "words" not in caplog.text
    assert caplog.records[0].exc_info is None


def test_a_full_gate_and_a_missing_token_stop_a_request_before_it_is_read() -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    assert asked(never, most=0)[0] == 503
    assert asked(never, tokens=Tokens.parse("x 0123456789abcdef"))[0] == 401


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "at least one token"),
        ("# nothing\n\n", "at least one token"),
        ("a b c", "line 1 of the tokens, but got more words"),
        ("lab short", "at least 16 ASCII characters in line 1, but it has 5"),
        ("lab 0123456789abcdefé", "16 ASCII"),
        ("lab 0123456789abcdef\nlab fedcba9876543210", "in line 2 comes twice"),
        ("lab 0123456789abcdef\nshop 0123456789abcdef", "in line 2 comes twice"),
    ],
)
def test_tokens_that_are_none_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        Tokens.parse(text)
    assert "0123456789abcdef" not in str(error.value)


def test_tokens_have_names_and_are_not_kept() -> None:
    tokens = Tokens.parse("lab 0123456789abcdef\nfedcba9876543210")
    assert tokens.name("bearer fedcba9876543210") == "token"
    assert "0123456789abcdef" not in repr(vars(tokens))
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer 0123456789abcdefx",
        "Basic 0123456789abcdef",
        "0123456789abcdef",
    ):
        with pytest.raises(RefusedError, match="expected the header"):
            tokens.name(wrong)


@pytest.mark.parametrize(
    "changed",
    [
        {"quantiles": [0.0, 1.0], "margins": [1.0]},
        {"quantiles": [1.0, 0.0], "margins": [1.0, 2.0]},
        {"quantiles": [0.0, 1.0], "margins": [2.0, 1.0]},
        {"quantiles": [0.0, 1.5], "margins": [1.0, 2.0]},
        {"quantiles": [0.0, 1.0], "margins": [1.0, float("nan")]},
        {"quantiles": [], "margins": []},
    ],
)
def test_quantiles_that_are_none_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|finite|at least"):
        Margins(**changed)


def fitted(margins: NDArray[np.float64]) -> Margins:
    shares = np.linspace(0, 1, 41)
    return Margins(quantiles=tuple(shares), margins=tuple(np.quantile(margins, shares, method="inverted_cdf")))


@pytest.mark.parametrize("levels", [0, 3, 7])
def test_the_distance_is_that_of_kolmogorov_and_smirnov_for_continuous_and_for_stepped_margins(levels: int) -> None:
    rng = np.random.default_rng(0)

    def draw(n: int, scale: float = 3.0) -> NDArray[np.float64]:
        margins = rng.exponential(scale, n)
        return np.minimum(np.floor(margins), levels - 1) if levels else margins

    reference = fitted(draw(1000))
    same = [distance(draw(1000), reference) for _ in range(50)]
    assert max(same) < drift.GONE
    assert distance(draw(1000, 1.0), reference) > drift.LIMIT
    assert distance(np.zeros(1000), reference) > drift.LIMIT
    assert distance(draw(1000) + 50, reference) > 0.9


def test_a_drift_is_told_once_and_again_when_it_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    watch = Drift(fitted(rng.exponential(3, 1000)), "logits")

    def show(scale: float, n: int) -> None:
        watch.add(np.stack([rng.exponential(scale, n), np.zeros(n)], 1).astype(np.float32))

    show(3, 900)
    assert watch.value is None
    for _ in range(30):
        show(3, 10)
    assert watch.value is not None
    assert watch.value < drift.GONE
    assert caplog.text == ""
    for _ in range(30):
        show(0.5, 100)
    assert watch.value > drift.LIMIT
    assert caplog.text.count("drift: the margins of the last 1000 images are not those") == 1
    for _ in range(30):
        show(3, 100)
    assert caplog.text.count("drift: the margins are again as fitted") == 1
    show(3, 2500)  # more than a window at once
    assert watch.value < drift.GONE


def test_the_margin_of_probabilities_is_that_of_their_logarithms() -> None:
    z = np.array([[2.0, 0.5, -1.0], [0.0, 0.0, 3.0]], np.float32)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert shown_margins(p, "probs") == pytest.approx(shown_margins(z, "logits"), abs=1e-5)
    assert shown_margins(np.array([[1.0, 0.0]], np.float32), "probs") == pytest.approx(87.3, abs=0.1)


def test_served_margins_raise_the_gauge(file: Path) -> None:
    model = ProtectedModel("m", file, max_batch=1000)
    assert b"queryfoil_drift{" not in model.metrics.text()
    answer(model, data.load("fashion-mnist", "calibration").images.numpy())
    assert b'queryfoil_drift{defense="terraces"} 0.0\n' in model.metrics.text()
    answer(model, np.repeat(ONE, 1000, 0))
    (line,) = [x for x in model.metrics.text().decode().splitlines() if x.startswith("queryfoil_drift{")]
    assert float(line.split()[-1]) > 0.3


def test_a_request_as_json_and_as_bytes_is_the_same() -> None:
    room = wire.Room.of(told(), 1)
    body, headers = binary(ONE)
    by_bytes = wire.decode(body, headers["inference_header_content_length"], room)
    by_json = wire.decode(json.dumps(plain(ONE)).encode(), None, room)
    assert (by_bytes.binary, by_json.binary) == (True, False)
    assert np.array_equal(np.frombuffer(by_bytes.sent[0].values, "<f4"), by_json.sent[0].values)


@pytest.mark.parametrize(
    ("part", "count"), [(b"{}", 200), (b"[]", 2000), (b"[" * 500 + b"]" * 500, 100), (b"0", 10**5), (b'""', 10**5)]
)
@pytest.mark.parametrize("key", [b"inputs", b"outputs", b"more"])
def test_a_request_full_of_brackets_is_refused_before_it_is_read(key: bytes, part: bytes, count: int) -> None:
    body = b'{"' + key + b'": [' + b",".join([part] * count) + b"]}"
    with pytest.raises(RefusedError, match=r"25088 numbers, but got more|fewer lists and objects"):
        wire.decode(body, None, wire.Room.of(told(), 32))


def test_a_full_batch_has_room_as_nested_lists() -> None:
    x = np.zeros((32, 1, 28, 28), np.float32)
    body = json.dumps(plain(x, data=x.tolist())).encode()
    assert wire.decode(body, None, wire.Room.of(told(), 32)).sent[0].shape == [32, 1, 28, 28]
    with pytest.raises(RefusedError, match="at most 31 images in a request, 24304 numbers"):
        wire.decode(body, None, wire.Room.of(told(), 31))
