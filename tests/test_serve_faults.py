"""What goes wrong at a server: bad requests, slow and broken clients, too many of them, a killed worker, a fuzzer."""

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from schemathesis import GenerationMode

import serving
from queryfoil import data
from queryfoil.deploy.kserving import pb
from serving import Service, binary, offline, plain, wait

ONE = np.full((1, 1, 28, 28), 0.5, np.float32)
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def clean() -> NDArray[np.float32]:
    images: NDArray[np.float32] = data.load("fashion-mnist", "attack").images[:8].numpy()
    return images


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server that has little patience and room for two requests."""
    file = serving.write(tmp_path_factory.mktemp("strict") / "clothes.onnx")
    running = Service(file, "--timeout", "1", "--max-concurrent", "2", "--max-batch", "8")
    yield running
    assert running.stop(signal.SIGTERM) == 0
    assert "Traceback" not in running.log.read_text()
    assert "internal error" not in running.log.read_text()


@pytest.fixture(autouse=True)
def alive(service: Service, clean: NDArray[np.float32]) -> Iterator[None]:
    """After each test the server answers, and right."""
    yield
    assert np.array_equal(service.scores(clean), offline(service.file, clean))


def reason(answer: bytes) -> str:
    found = json.loads(answer)
    assert list(found) == ["error"]
    assert not re.search(r"Traceback|File \"|\.py|onnxruntime|0x[0-9a-f]{6}", found["error"])
    return str(found["error"])


def number(value: Any, at: int = 0) -> dict[str, Any]:
    """A request with one other number."""
    values = ONE.ravel().tolist()
    values[at] = value
    return plain(ONE, data=values)


BAD: list[tuple[Any, int, str]] = [
    (b"", 400, "expected the request as JSON"),
    (b"{", 400, "expected the request as JSON"),
    (b"\xff\xfe", 400, "expected the request as JSON"),
    (b"[" * 5000, 400, "expected the request as JSON"),
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
    (plain(np.repeat(ONE, 9, 0)), 400, "at most 8 images in a request, but got 9"),
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


def ask(service: Service, request: Any, seconds: float = 10) -> tuple[Any, str]:
    """gRPC's status and details for a message, or for bytes as one."""
    with grpc.insecure_channel(service.grpc) as channel:
        call = channel.unary_unary(METHOD)
        try:
            call(request if isinstance(request, bytes) else request.SerializeToString(), timeout=seconds)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def message(values: NDArray[Any] = ONE, **changed: Any) -> Any:
    one = {"name": "images", "datatype": "FP32", "shape": values.shape}
    return pb.ModelInferRequest(**{
        "model_name": "clothes", "inputs": [one], "raw_input_contents": [values.astype("<f4").tobytes()], **changed
    })  # fmt: skip


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


def talk(service: Service, *parts: bytes | float, seconds: float = 10) -> bytes:
    """All that comes back for what is sent on a connection; a number is a pause."""
    with socket.create_connection((service.host, service.port), timeout=seconds) as line:
        answer = b""
        try:
            for part in parts:
                if isinstance(part, bytes):
                    line.sendall(part)
                else:
                    time.sleep(part)
            answer = line.recv(65536)
            line.shutdown(socket.SHUT_WR)
            while more := line.recv(65536):
                answer += more
        except OSError:  # the other side has ended the connection
            pass
        return answer


def head(service: Service, *lines: str) -> bytes:
    return "\r\n".join([f"POST {service.infer} HTTP/1.1", "host: x", *lines, "", ""]).encode()


def test_too_large_bodies_are_refused_by_their_length_and_by_what_comes(service: Service) -> None:
    answer = talk(service, head(service, "content-length: 1000000000"), b"{}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"but got 1000000000" in answer
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = talk(service, head(service, "transfer-encoding: chunked"), chunk * 6)
    assert answer.startswith(b"HTTP/1.1 413 ")
    text = json.dumps(plain(ONE)).encode()
    whole = head(service, "transfer-encoding: chunked", "connection: close") + f"{len(text):x}\r\n".encode() + text
    assert talk(service, whole + b"\r\n0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_truncated_bodies_and_wrong_lengths_harm_nobody(service: Service) -> None:
    text = json.dumps(plain(ONE)).encode()
    name = 'queryfoil_refused_total{protocol="http",reason="gone"}'
    before = service.metric(name)
    for count in range(1, 6):  # more than there is room for: each place becomes free again
        with socket.create_connection((service.host, service.port)) as line:
            line.sendall(head(service, f"content-length: {len(text)}") + text[:100])
        assert wait(lambda count=count: service.metric(name) == before + count, 5)
    short = talk(service, head(service, f"content-length: {len(text) - 10}") + text)
    assert short.startswith(b"HTTP/1.1 400 ")
    assert b"expected the request as JSON" in short
    for line in ("content-length: -5", "content-length: x", "content-length: 5\r\ncontent-length: 6", "x y: z", ": x"):
        assert talk(service, head(service, line) + text).startswith(b"HTTP/1.1 400 "), line


GARBAGE = [
    b"\0" * 100,
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 10**6,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_what_is_no_http_is_refused(service: Service, garbage: bytes) -> None:
    answer = talk(service, garbage)
    assert re.match(rb"HTTP/1.1 4\d\d |$", answer)


def test_an_upgrade_to_web_sockets_is_not_offered(service: Service) -> None:
    lines = (
        "GET / HTTP/1.1",
        "host: x",
        "connection: upgrade",
        "upgrade: websocket",
        "sec-websocket-key: dGhlIHNhbXBsZQ==",
    )
    assert b" 101 " not in talk(service, "\r\n".join([*lines, "sec-websocket-version: 13", "", ""]).encode(), seconds=3)


def test_slow_clients_are_let_go(service: Service) -> None:
    body = [head(service, "content-length: 50") + b"{", *[0.3, b" "] * 5]
    start = [b"POST / HT", *[0.3, b"x"] * 5]
    with ThreadPoolExecutor() as clients:
        answers = list(clients.map(lambda parts: talk(service, *parts, seconds=5), (body, start, [])))
    assert answers[0].startswith(b"HTTP/1.1 408 ")
    assert b"did not come in whole within 1 s" in answers[0]
    assert answers[1:] == [b"", b""]


def test_who_sends_ahead_and_takes_no_answers_is_not_read_and_let_go(service: Service) -> None:
    body = json.dumps(plain(np.repeat(ONE, 8, 0))).encode()
    requests = (head(service, f"content-length: {len(body)}") + body) * 20
    sent = 0
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        line.settimeout(0.3)
        line.connect((service.host, service.port))
        before = service.metric("process_resident_memory_bytes")
        try:
            while sent < 2 * 10**9:
                sent += line.send(requests)
        except OSError:  # it would have to wait, or is gone already
            pass
        assert service.metric("process_resident_memory_bytes") < before + 50 * 10**6
        assert wait(lambda: gone(line), 8)
    assert sent < 2 * 10**9


def gone(line: socket.socket) -> bool:
    """Whether the other side has ended a connection."""
    try:
        line.send(b" ")
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def test_more_requests_than_there_is_room_for_get_a_503_and_a_time(
    service: Service, clean: NDArray[np.float32]
) -> None:
    waiting = [socket.create_connection((service.host, service.port)) for _ in range(2)]
    try:
        for line in waiting:
            line.sendall(head(service, "content-length: 100") + b"{")
        assert wait(lambda: service.metric("queryfoil_running") == 2, 3)
        status, headers, answer = service.call(service.infer, *binary(clean)[:1], **binary(clean)[1])
        assert (status, headers["retry-after"]) == (503, "1")
        assert "2 requests in hand" in reason(answer)
        assert ask(service, message())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert service.call("/v2/health/ready")[0] == 200
    finally:
        for line in waiting:
            line.close()
    assert wait(lambda: service.metric("queryfoil_running") == 0, 3)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_others_answer(service: Service, clean: NDArray[np.float32]) -> None:
    pool = Service(service.file, "--workers", "2")
    try:
        expected = offline(pool.file, clean)
        assert np.array_equal(pool.scores(clean), expected)
        parent = psutil.Process(pool.process.pid)

        def workers() -> set[int]:
            alive = [child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE]
            return {child.pid for child in alive if "spawn_main" in " ".join(child.cmdline())}

        before = workers()
        assert len(before) == 2
        wrong: list[Any] = []
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                try:
                    if not np.array_equal(pool.scores(clean), expected):
                        wrong.append("other scores")
                except (ConnectionError, http.client.RemoteDisconnected):
                    continue  # it was asked by the one that was killed
                except Exception as error:
                    wrong.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        os.kill(min(before), signal.SIGKILL)
        assert wait(lambda: len(workers() - before) == 1, 10)
        assert wait(lambda: "starting another" in pool.log.read_text(), 5)
        done.set()
        thread.join(20)
        assert wrong == []
        assert pool.metric("queryfoil_images_total") >= 16  # of all processes
        assert pool.metric("queryfoil_served") == 1
        assert ask(pool, message())[0] is grpc.StatusCode.OK
    finally:
        assert pool.stop() == 0
    assert wait(lambda: not any(psutil.pid_exists(pid) for pid in before), 5)


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
