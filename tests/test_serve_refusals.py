"""What is wrong with a request is told to its client, over HTTP and gRPC, and a fuzzer finds no crash."""

import http.client
import json
import re
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from schemathesis import GenerationMode

import serving
from queryfoil import data
from serving import METHOD, ONE, Service, ask, binary, message, offline, plain, reason


@pytest.fixture(scope="module")
def clean() -> NDArray[np.float32]:
    images: NDArray[np.float32] = data.load("fashion-mnist", "attack").images[:8].numpy()
    return images


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server of small batches."""
    file = serving.write(tmp_path_factory.mktemp("refusals") / "clothes.onnx")
    running = Service(file, "--max-batch", "8")
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log.read_text()
    assert "internal error" not in running.log.read_text()


@pytest.fixture(autouse=True)
def alive(service: Service, clean: NDArray[np.float32]) -> Iterator[None]:
    """After each test the server answers, and right."""
    yield
    assert np.array_equal(service.scores(clean), offline(service.file, clean))


def number(value: Any, at: int = 0) -> dict[str, Any]:
    """A request with one other number."""
    values = ONE.ravel().tolist()
    values[at] = value
    return plain(ONE, data=values)


BAD: list[tuple[Any, int, str]] = [
    (b"", 400, "expected the request as JSON"),
    (b"{", 400, "expected the request as JSON"),
    (b"\xff\xfe", 400, "expected the request as JSON"),
    (b"[" * 5000, 400, "fewer lists and objects"),
    (b'{"inputs": [{"data": [NaN]}]}', 400, "expected the request as JSON"),
    ([], 400, "the body.*dictionary"),
    ({}, 400, "'inputs': Field required"),
    ({"inputs": {}}, 400, "'inputs': Input should be a valid list"),
    ({"inputs": []}, 400, "expected one input, 'images', but got none"),
    (plain(ONE, name="x"), 400, "expected one input, 'images', but got 'x'"),
    ({"inputs": plain(ONE)["inputs"] * 2}, 400, "but got 'images', 'images'"),
    (plain(ONE, name="x" * 10**5), 400, r"but got 'x+\.\.\.$"),
    (plain(ONE, datatype="FP64"), 400, "expected images as FP32 or UINT8, but got 'FP64'"),
    (plain(ONE, datatype="BYTES"), 400, "FP32 or UINT8"),
    (plain(ONE, datatype=7), 400, "datatype': Input should be a valid string"),
    (plain(ONE, shape=[1, 28, 28]), 400, r"shape \(N, 1, 28, 28\), N >= 1, but got \[1, 28, 28\]"),
    (plain(ONE, shape=[0, 1, 28, 28], data=[]), 400, "N >= 1"),
    (plain(ONE, shape=[-1, 1, 28, 28]), 400, "N >= 1"),
    (plain(ONE, shape=[2**63, 1, 28, 28]), 400, "at most 8 images"),
    (plain(ONE, shape=[1.0, 1, 28, 28]), 400, "shape.0': Input should be a valid integer"),
    (plain(ONE, shape=[True, 1, 28, 28]), 400, "valid integer"),
    (plain(np.repeat(ONE, 9, 0)), 400, "at most 8 images in a request, 6272 numbers, but got more"),
    (plain(ONE, shape=[2, 1, 28, 28]), 400, "expected 1568 values.*but got 784"),
    (plain(ONE, data=[]), 400, "expected 784 values.*but got 0"),
    (plain(ONE, data=ONE.reshape(28, 28).tolist()), 400, r"but got 784 of shape \[28, 28\]"),
    (plain(ONE, data=[[0.5], [0.5, 0.5]]), 400, "lists of equal lengths, but got list"),
    (plain(ONE, data=[0.5] * 783 + [[0.5]]), 400, "but got float, list"),
    (number("0.5"), 400, "data as numbers.*but got float, str"),
    (number(None), 400, "but got NoneType, float"),
    (number(True), 400, "but got bool, float"),
    (number({}), 400, "but got dict, float"),
    (number(1.5, 100), 400, r"values in \[0, 1\], but got values from 0.5 to 1.5"),
    (number(-1e-7, 783), 400, r"values in \[0, 1\], but got values from -1e-07 to 0.5"),
    (number(10**400), 400, "expected the request as JSON|finite"),
    (number(1e39), 400, "finite values, but got NaN or infinite"),
    (json.dumps(number(0)).replace("[0,", "[1e999,").encode(), 400, "finite|JSON"),
    (plain(ONE, datatype="UINT8", data=[0.5] * 784), 400, "data as whole numbers.*but got float"),
    (plain(ONE, datatype="UINT8", data=[256] * 784), 400, r"UINT8 values in \[0, 255\], but got 256 to 256"),
    (plain(ONE, datatype="UINT8", data=[-1] * 784), 400, r"UINT8 values in \[0, 255\]"),
    (plain(ONE) | {"outputs": [{"name": "logits"}]}, 400, "one, 'scores', but got 'logits'"),
    (plain(ONE) | {"outputs": [{"name": "scores"}] * 2}, 400, "but got 'scores, scores'"),
    (plain(ONE) | {"outputs": [{"name": "scores", "parameters": {"classification": 3}}]}, 400, "not supported"),
    (plain(ONE, parameters={"shared_memory_region": "x"}), 400, "shared_memory_region is not supported"),
    (plain(ONE, parameters={"binary_data_size": 4}), 400, "but got both"),
    (plain(ONE, data=None), 400, "expected data or binary_data_size.*neither"),
    (plain(ONE, data=None, parameters={"binary_data_size": 3136}), 400, "expected the header inference-header-content"),
    (plain(ONE) | {"id": 7}, 400, "'id': Input should be a valid string"),
    (rb'{"id": "\ud800", "inputs": []}', 400, "expected the request as JSON|'images', but got none"),
    ({"inputs": [{}] * 20}, 400, "'inputs': List should have at most 16"),
    ({"inputs": [{}] * 100}, 400, "fewer lists and objects"),
    (plain(ONE, shape=[1] * 100), 400, "shape': List should have at most 16"),
    (plain(ONE, data=[0] * 10**4), 400, "at most 8 images in a request, 6272 numbers"),
    (plain(ONE) | {"id": "x" * 1000}, 400, "'id': String should have at most 256"),
    (plain(ONE * 0), 422, "the model has no finite scores for image 0"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "text"), BAD, ids=range(len(BAD)))
def test_a_bad_request_gets_a_reason(service: Service, body: Any, status: int, text: str) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, _, answer = service.call(service.infer, sent)
    assert got == status, answer
    assert re.search(text, reason(answer)), answer
    assert len(answer) < 500


def raw(changed: NDArray[Any] = ONE, length: str | None = None, cut: int = 0, more: bytes = b"", **one: Any) -> Any:
    body, headers = binary(changed, **one)
    if length is not None:
        headers["inference_header_content_length"] = length
    return body[: len(body) - cut] + more, headers


BINARY: list[tuple[Any, str]] = [
    (raw(cut=4), "binary_data_size.*at most the 3132 that are left, but got 3136"),
    (raw(more=b"\0" * 4), r"expected \d+ bytes, JSON and tensors, but got"),
    (raw(length="0"), "expected the request as JSON"),
    (raw(length="-1"), "expected inference-header-content-length as the number of bytes"),
    (raw(length="99999999999999999999999"), "as the number of bytes of the JSON"),
    (raw(length="5000"), "as the number of bytes of the JSON, at most"),
    (raw(length="1e2"), "as the number of bytes"),
    (raw(length="x" * 1000), "as the number of bytes"),
    (raw(parameters={"binary_data_size": -4}), "binary_data_size as a number of bytes"),
    (raw(parameters={"binary_data_size": "3136"}), "binary_data_size as a number of bytes"),
    (raw(parameters={"binary_data_size": True}), "binary_data_size as a number of bytes"),
    (raw(shape=[2, 1, 28, 28]), "expected 6272 bytes for FP32"),
    (raw(datatype="UINT8"), "expected 784 bytes for UINT8"),
    (raw(ONE * np.nan), "finite values, but got NaN"),
    (raw(ONE * np.inf), "finite values, but got NaN or infinite"),
    (raw(ONE * 2.5), "but got values from 1.25 to 1.25"),
]


@pytest.mark.parametrize(("sent", "text"), BINARY, ids=range(len(BINARY)))
def test_a_bad_binary_request_gets_a_reason(service: Service, sent: Any, text: str) -> None:
    status, _, answer = service.call(service.infer, sent[0], **sent[1])
    assert status == 400
    assert re.search(text, reason(answer)), answer


def test_a_compressed_request_is_refused(service: Service) -> None:
    status, _, answer = service.call(service.infer, b"x", content_encoding="gzip")
    assert (status, "gzip" in reason(answer)) == (415, True)


FLAT = {"name": "images", "datatype": "FP32", "shape": ONE.shape}
RPC: list[tuple[Any, str, str]] = [
    (b"\xff\xff\xff", "INVALID_ARGUMENT", "expected a message of the Open Inference Protocol"),
    (b"", "NOT_FOUND", "no such model"),
    (message(model_name="other"), "NOT_FOUND", "no such model"),
    (message(model_version="2"), "NOT_FOUND", "no version"),
    (message(raw_input_contents=[]), "INVALID_ARGUMENT", "expected 784 values"),
    (message(raw_input_contents=[b"", b""]), "INVALID_ARGUMENT", "each of 1 inputs, but got 2"),
    (message(raw_input_contents=[b"x" * 9]), "INVALID_ARGUMENT", "expected 3136 bytes"),
    (message(inputs=[FLAT | {"contents": {"fp32_contents": [0]}}]), "INVALID_ARGUMENT", "but got both"),
    (message(inputs=[FLAT | {"datatype": "FP16"}]), "INVALID_ARGUMENT", "FP32 or UINT8"),
    (message(inputs=[FLAT | {"shape": [-1, 1, 28, 28]}]), "INVALID_ARGUMENT", "N >= 1"),
    (message(outputs=[{"name": "logits"}]), "INVALID_ARGUMENT", "'scores', but got 'logits'"),
    (message(ONE * np.nan), "INVALID_ARGUMENT", "finite"),
    (message(ONE * 3), "INVALID_ARGUMENT", r"\[0, 1\]"),
    (message(np.repeat(ONE, 9, 0)), "INVALID_ARGUMENT", "at most 8 images"),
    (message(ONE * 0), "INVALID_ARGUMENT", "no finite scores for image 0"),
    (b"x" * 10**7, "RESOURCE_EXHAUSTED", "larger than max"),
    (message(), "OK", ""),
    (message(raw_input_contents=[], inputs=[FLAT | {"contents": {"fp32_contents": ONE.ravel()}}]), "OK", ""),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "code", "text"), RPC, ids=range(len(RPC)))
def test_a_bad_call_gets_a_reason(service: Service, sent: Any, code: str, text: str) -> None:
    got, told = ask(service, sent)
    assert (got.name, bool(re.search(text, told))) == (code, True), told
    assert not re.search(r"Traceback|\.py|onnxruntime", told)


@pytest.mark.parametrize("name", ["RepositoryModelLoad", "RepositoryModelUnload", "ModelConfig", "Nothing"])
def test_models_are_not_loaded_or_unloaded_by_calls(service: Service, name: str) -> None:
    with grpc.insecure_channel(service.grpc) as channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(METHOD.replace("ModelInfer", name))(b"", timeout=10)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


OPENAPI = {
    "openapi": "3.0.2", "info": {"title": "Open Inference Protocol", "version": "2"},
    "paths": {"/v2/models/clothes/infer": {"post": {
        "parameters": [
            {"name": "Inference-Header-Content-Length", "in": "header", "schema": {"type": "integer", "minimum": 0}},
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {
            "type": "object", "required": ["inputs"], "additionalProperties": False, "properties": {
                "id": {"type": "string"}, "parameters": {"type": "object"},
                "outputs": {"type": "array", "maxItems": 2, "items": {
                    "type": "object", "required": ["name"], "properties": {
                        "name": {"enum": ["scores", "logits"]}, "parameters": {"type": "object"}}}},
                "inputs": {"type": "array", "minItems": 1, "maxItems": 2, "items": {
                    "type": "object", "required": ["name", "shape", "datatype", "data"], "properties": {
                        "name": {"enum": ["images", "image"]}, "datatype": {"enum": ["FP32", "UINT8", "FP64", "BYTES"]},
                        "shape": {"enum": [[1, 1, 28, 28], [2, 1, 28, 28], [784], [], [-1, 1, 28, 28]]},
                        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
                        "data": {"anyOf": [
                            {"enum": [ONE.ravel().tolist(), ONE.tolist(), [7] * 784, [0.5] * 1568]},
                            {"type": "array", "maxItems": 8, "items": {"type": "number"}}]}}}},
            }}}}},
        "responses": {"200": {"description": "scores"}, "default": {"description": "a reason"}},
    }}},
}  # fmt: skip


def fuzz(service: Service, described: int, spoilt: int) -> dict[int, int]:
    """Send requests by the schema, against it, and valid ones with spoilt bytes; how many got which status."""
    counts: dict[int, int] = {}
    line = http.client.HTTPConnection(service.host, service.port, timeout=30)

    def send(body: bytes, headers: dict[str, str]) -> None:
        line.request("POST", service.infer, body, headers)
        answer = line.getresponse()
        status, text = answer.status, answer.read()
        counts[status] = counts.get(status, 0) + 1
        assert status == 200 or 400 <= status < 500, (status, body, headers)
        if status != 200:
            reason(text)

    def options(count: int) -> Any:
        return settings(
            max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip

    operation = schemathesis.openapi.from_dict(OPENAPI)["/v2/models/clothes/infer"]["POST"]
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        @options(described)
        @given(operation.as_strategy(generation_mode=mode))
        def by_schema(case: Any) -> None:
            body = case.body if isinstance(case.body, bytes) else json.dumps(case.body, default=str).encode()
            names = {k: str(v) for k, v in dict(case.headers or {}).items()}
            send(body, {k: v for k, v in names.items() if f"{k}{v}".isascii() and f"{k}{v}".isprintable()})

        by_schema()

    valid, length = binary(ONE)
    text = json.dumps(plain(ONE)).encode()
    edits = st.lists(
        st.tuples(st.integers(0, len(valid)), st.binary(max_size=8), st.integers(0, 40)), min_size=1, max_size=4
    )

    @options(spoilt)
    @given(edits, st.booleans())
    def broken(changes: list[tuple[int, bytes, int]], as_bytes: bool) -> None:
        body = valid if as_bytes else text
        for at, put, drop in changes:
            body = body[:at] + put + body[at + drop :]
        send(body, {name.replace("_", "-"): value for name, value in length.items()} if as_bytes else {})

    broken()
    line.close()
    return counts


def test_a_fuzzer_finds_no_crash(service: Service) -> None:
    counts = fuzz(service, 12, 120)
    assert sum(counts.values()) >= 100
    assert counts[400] > 50


@pytest.mark.slow
def test_a_thousand_malformed_requests_and_messages_find_no_crash(service: Service) -> None:
    counts = fuzz(service, 250, 700)
    assert sum(n for status, n in counts.items() if status != 200) >= 1000, counts
    rng, valid = np.random.default_rng(0), message().SerializeToString()
    for _ in range(500):
        at, size = rng.integers(len(valid)), rng.integers(1, 30)
        code, _ = ask(service, valid[:at] + rng.bytes(size) + valid[at + rng.integers(0, 30) :])
        assert code.name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED")
