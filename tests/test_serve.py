"""`queryfoil serve`: right answers to clients that are not ours, nothing but what is shown, tokens, coarse scores."""

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from numpy.typing import NDArray
from typer.testing import CliRunner

import queryfoil as qf
import serving
from queryfoil import cli, data
from queryfoil.defenses.coarse import RoundedScores, TopK
from serving import CLASSES, TOKEN, Remote, Service, binary, offline, plain, wait

MODEL = "/v2/models/clothes"
NAMED = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def clean() -> NDArray[np.float32]:
    images: NDArray[np.float32] = data.load("fashion-mnist", "attack").images[:32].numpy()
    return images


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The protected model with all defaults."""
    running = Service(serving.write(tmp_path_factory.mktemp("served") / "clothes.onnx"))
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The protected model with tokens, coarse scores and a line for each request in the log."""
    file = serving.write(tmp_path_factory.mktemp("guarded") / "clothes.onnx")
    tokens = file.with_name("tokens")
    tokens.write_text(f"# who\nlab {TOKEN}\nshop fedcba9876543210\n")
    running = Service(file, "--token-file", str(tokens), "--round", "2", "--top-k", "3", "--log-level", "debug")
    yield running
    assert running.stop() == 0


def test_the_first_line_tells_what_is_served_and_where(service: Service) -> None:
    assert re.match(
        r"serving \S+/clothes.onnx \(protected by terraces; probs; no token\) at http://127.0.0.1:\d+/v2/models/clothes"
        r" and gRPC at 127.0.0.1:\d+; Ctrl-C stops",
        service.line,
    )


@pytest.mark.parametrize("bytes_in", [True, False])
@pytest.mark.parametrize("bytes_out", [True, False])
def test_tritonclient_gets_over_http_what_the_file_gives(
    service: Service, clean: NDArray[np.float32], bytes_in: bool, bytes_out: bool
) -> None:
    with triton.InferenceServerClient(f"{service.host}:{service.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("clothes")
        wanted = [triton.InferRequestedOutput("scores", binary_data=bytes_out)]
        for n in (1, 5, 32):
            given = triton.InferInput("images", clean[:n].shape, "FP32")
            given.set_data_from_numpy(clean[:n], binary_data=bytes_in)
            answer = client.infer("clothes", [given], outputs=wanted, request_id="7")
            assert answer.get_response()["id"] == "7"
            assert np.array_equal(answer.as_numpy("scores"), offline(service.file, clean[:n]))


GRPC_CLIENT = """
import sys
import time
import numpy as np
import tritonclient.grpc as triton
address, path = sys.argv[1:]
images = np.load(path)
with triton.InferenceServerClient(address) as client:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("clothes")
    about = client.get_model_metadata("clothes")
    assert [(i.name, i.datatype, list(i.shape)) for i in about.inputs] == [("images", "FP32", [-1, 1, 28, 28])]
    assert [(o.name, o.datatype, list(o.shape)) for o in about.outputs] == [("scores", "FP32", [-1, 10])]
    assert about.platform == "queryfoil_terraces"
    assert client.get_server_metadata().name == "queryfoil"
    found = []
    for images, kind in ((images, "FP32"), ((images * 255).round().astype(np.uint8), "UINT8")):
        given = triton.InferInput("images", images.shape, kind)
        given.set_data_from_numpy(images)
        for outputs in (None, [triton.InferRequestedOutput("scores")]):
            found.append(client.infer("clothes", [given], outputs=outputs).as_numpy("scores"))
    try:
        given.set_shape([1, 28, 28])
        client.infer("clothes", [given])
    except triton.InferenceServerException as error:
        assert error.status() == "StatusCode.INVALID_ARGUMENT", error
        assert "expected images of shape (N, 1, 28, 28)" in error.message(), error
    np.save(path, np.stack(found))
"""


def test_tritonclient_gets_over_grpc_what_the_file_gives(
    service: Service, clean: NDArray[np.float32], tmp_path: Path
) -> None:
    # in a process of its own: its generated messages and KServe's have the same names
    np.save(tmp_path / "x.npy", clean[:5])
    command = [sys.executable, "-c", GRPC_CLIENT, service.grpc, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "x.npy")
    assert found.shape == (4, 5, CLASSES)
    assert (found == offline(service.file, clean[:5])).all()


def test_json_flat_and_nested_and_bytes_of_0_to_255_give_the_same(service: Service, clean: NDArray[np.float32]) -> None:
    expected = offline(service.file, clean[:3])
    levels = (clean[:3] * 255).round().astype(np.uint8)
    assert np.array_equal(service.scores(levels), expected)
    for given in (
        plain(clean[:3]),
        plain(clean[:3], data=clean[:3].tolist()),
        plain(clean[:3], data=levels.tolist(), datatype="UINT8"),
        plain(clean[:3]) | {"outputs": [{"name": "scores"}], "id": "é"},
    ):
        status, _, body = service.call(service.infer, json.dumps(given).encode())
        answer = json.loads(body)
        assert (status, answer["model_name"], answer.get("id")) == (200, "clothes", given.get("id"))
        (output,) = answer["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("scores", "FP32", [3, CLASSES])
        assert np.array_equal(np.float32(output["data"]).reshape(3, CLASSES), expected)


def test_metadata_have_names_and_shapes_and_of_the_defense_the_name_alone(service: Service) -> None:
    found = json.loads(service.call("/v2/models/clothes")[2])
    assert found == {
        "name": "clothes", "platform": "queryfoil_terraces",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 28, 28]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, CLASSES]}],
        "properties": {"defense": "terraces", "output": "probs"},
    }  # fmt: skip
    assert json.loads(service.call("/v2/models")[2]) == {"models": ["clothes"]}
    assert json.loads(service.call("/v2")[2])["version"] == ""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *[("GET", path, 200) for path in ("/", "/v2", "/v2/health/live", "/v2/health/ready", f"{MODEL}/ready")],
        *[("GET", path, 404) for path in ("/docs", "/redoc", "/openapi.json", "/v1/models", "/v2/", "/v2/repository")],
        *[("GET", path, 404) for path in ("/v2/models/other", f"{MODEL}/versions/1", "/v2/models/..%2f/config")],
        *[("POST", f"/v1/models/clothes:{verb}", 404) for verb in ("predict", "explain")],
        *[("POST", f"/v2/repository/models/clothes/{verb}", 404) for verb in ("load", "unload")],
        *[("POST", f"{MODEL}/{what}", 404) for what in ("versions/1/infer", "generate", "explain", "logits")],
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/openai/v1/completions", 404),
        ("GET", "/v2/models/clothes/infer", 405),
        ("DELETE", "/v2/models/clothes", 405),
        ("PUT", "/v2/models/clothes/infer", 405),
        ("OPTIONS", "/v2/models/clothes/infer", 405),
    ],
)  # fmt: skip
def test_no_route_but_those_of_the_protocol(service: Service, method: str, path: str, status: int) -> None:
    body = json.dumps(plain(np.zeros((1, 1, 28, 28), np.float32))).encode() if method == "POST" else None
    got, headers, answer = service.call(path, body, method)
    assert got == status
    assert set(headers) <= {"date", "content-type", "content-length"}  # no server, no versions
    assert not re.search(rb"Traceback|\.py|onnxruntime|kserve|uvicorn|logits|borders", answer)
    if status != 200:
        assert list(json.loads(answer)) == ["error"]


def test_metrics_count_requests_refusals_images_and_time(service: Service, clean: NDArray[np.float32]) -> None:
    names = (
        'queryfoil_requests_total{code="200"', 'queryfoil_refused_total{protocol="http",reason="range"}',
        "queryfoil_images_total ", 'queryfoil_request_seconds_count{protocol="http"}',
    )  # fmt: skip
    before = [service.metric(name) for name in names]
    service.scores(clean[:7])
    assert service.call(service.infer, *binary(clean[:7] + 1)[:1], **binary(clean[:7] + 1)[1])[0] == 400
    after = [service.metric(name) for name in names]
    assert np.subtract(after, before)[1:].tolist() == [1, 7, 2]
    assert after[0] > before[0]
    text = service.call("/metrics")[2].decode()
    assert 'queryfoil_served{defense="terraces"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert not re.search(r"python_info|version=|borders", text)


def test_an_answer_on_an_open_connection_does_not_wait_for_acknowledgements(service: Service) -> None:
    body, headers = binary(np.full((1, 1, 28, 28), 0.5, np.float32))
    line, seconds = http.client.HTTPConnection(service.host, service.port, timeout=10), []
    for _ in range(15):
        start = time.perf_counter()
        line.request("POST", service.infer, body, {name.replace("_", "-"): value for name, value in headers.items()})
        assert line.getresponse().read()
        seconds.append(time.perf_counter() - start)
    line.close()
    assert sorted(seconds)[7] < 0.03  # Nagle's algorithm makes it 0.04


def test_a_token_is_asked_for_everywhere_but_by_probes(guarded: Service, clean: NDArray[np.float32]) -> None:
    body, headers = binary(clean[:1])
    assert guarded.scores(clean[:1], **NAMED).shape == (1, CLASSES)
    for wrong in (
        {},
        {"authorization": "Bearer 0123456789abcdeg"},
        {"authorization": TOKEN},
        {"authorization": "Basic x"},
    ):
        for path, sent in ((guarded.infer, body), ("/metrics", None), ("/v2/models", None), ("/nowhere", None)):
            status, told, answer = guarded.call(path, sent, **(headers if sent else {}), **wrong)
            assert (status, told["www-authenticate"]) == (401, "Bearer")
            assert TOKEN not in answer.decode()
    for path in ("/", "/v2/health/live", "/v2/health/ready"):
        assert guarded.call(path)[0] == 200
    assert "tokens of 2" in guarded.line
    assert guarded.metric('queryfoil_refused_total{protocol="http",reason="token"}', **NAMED) == 16


def test_coarse_scores_are_those_of_the_defenses_and_keep_the_label(
    guarded: Service, clean: NDArray[np.float32]
) -> None:
    class Given(torch.nn.Module):
        output = "probs"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    full, found = offline(guarded.file, clean), guarded.scores(clean, **NAMED)
    expected = RoundedScores(TopK(Given().eval(), k=3, rest="equal"), decimals=2)(torch.from_numpy(full))
    assert np.array_equal(found, expected.numpy())
    assert np.array_equal(found.argmax(1), full.argmax(1))
    assert all(len(set(row[row.argsort()[:7]].round(2).tolist())) <= 2 for row in found)  # a unit may be left over
    assert found.sum(1) == pytest.approx(1, abs=1e-6)
    assert np.abs(found * 100 - (found * 100).round()).max() < 1e-4


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The model without a defense."""
    file = serving.write(tmp_path_factory.mktemp("bare") / "bare.onnx", protected=False)
    running = Service(file, "--unprotected", "--no-grpc")
    yield running
    running.stop()


def test_coarse_scores_do_not_undo_the_protection(
    service: Service, guarded: Service, bare: Service, same_random_states: None
) -> None:
    clothes = data.load("fashion-mnist", "attack")[:40]
    victims = {"bare": Remote(bare), "protected": Remote(service), "coarse": Remote(guarded, **NAMED)}
    left = {
        name: qf.attack(victim, clothes.images, clothes.labels, "square", eps=24 / 255, budget=100).accuracy(100)
        for name, victim in victims.items()
    }
    assert "UNPROTECTED" in bare.line
    assert left["bare"] <= 0.4
    assert left["protected"] >= left["bare"] + 0.25
    assert left["coarse"] >= left["protected"] - 0.05


def test_ctrl_c_lets_a_request_in_hand_finish(bare: Service, clean: NDArray[np.float32]) -> None:
    body, headers = binary(clean[:1])
    line = http.client.HTTPConnection(bare.host, bare.port, timeout=20)
    line.putrequest("POST", bare.infer)
    for name, value in {**headers, "content_length": str(len(body))}.items():
        line.putheader(name.replace("_", "-"), value)
    line.endheaders(body[:100])
    assert wait(lambda: bare.metric("queryfoil_running") == 1)
    bare.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    with pytest.raises(OSError, match=r"refused|reset"):
        bare.call("/v2")
    line.send(body[100:])
    answer = line.getresponse()
    assert answer.status == 200
    raw = answer.read()[int(answer.headers["inference-header-content-length"]) :]
    assert np.array_equal(np.frombuffer(raw, "<f4")[None], offline(bare.file, clean[:1]))
    line.close()
    assert bare.process.wait(20) == 0
    assert bare.process.stdout.read() == "stopped\n"


def test_grpc_asks_for_the_token_too(guarded: Service) -> None:
    def code(name: str, **sent: str) -> str:
        with grpc.insecure_channel(guarded.grpc) as channel:
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
            try:
                call(b"", timeout=10, metadata=list(sent.items()))
            except grpc.RpcError as error:
                return str(error.code().name)
        return "OK"

    assert code("ServerLive") == code("ServerReady") == "OK"
    for name in ("ModelInfer", "ModelMetadata", "ModelReady", "ServerMetadata", "RepositoryModelUnload"):
        assert (
            code(name) == code(name, authorization="Bearer x") == code(name, authorization=TOKEN) == "UNAUTHENTICATED"
        )
    assert code("ServerMetadata", **NAMED) == "OK"
    assert code("ModelInfer", **NAMED) == "NOT_FOUND"  # of a model without a name


def test_logs_have_no_images_and_no_scores(guarded: Service, clean: NDArray[np.float32]) -> None:
    marked = clean[:1].copy()
    marked[0, 0, 0, :3] = 0.1234567, 0.7654321, 0.5555511
    body = json.dumps(plain(marked, data=[*marked.ravel().tolist(), "0.123"])).encode()
    assert guarded.call(guarded.infer, json.dumps(plain(marked)).encode(), **NAMED)[0] == 200
    assert guarded.call(guarded.infer, body, **NAMED)[0] == 400
    text = guarded.log.read_text()
    assert f"POST {guarded.infer}" in text  # a line a request, at this level
    assert not re.search(r"0\.1234567|0\.123|0\.7654|Traceback|0123456789abcdef", text)


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner(env={"COLUMNS": "200", **environment}).invoke(cli.app, ["serve", *arguments])


@pytest.mark.parametrize(
    ("told", "options", "reason"),
    [
        ({}, [], "has no metadata 'queryfoil', so that nothing says whether its scores are protected; export"),
        ({"defense": None}, [], "has no defense: its scores would be shown as they are; export it with --fit, or pass"),
        ({"input": "scores", "input_shape": [10]}, [], "protects scores that it is given"),
        ({"classes": 7}, [], r"expected scores of \S+ as float32 \(batch, 7\), but they are tensor\(float\)"),
        ({"input_shape": [3, 28, 28]}, [], r"expected images of \S+ as float32 \(batch, 3, 28, 28\)"),
        ({"output": "votes"}, [], "is not as `queryfoil export` writes it: output: Input should be 'logits'"),
        ({"output": "logits"}, ["--round", "2"], "are for probabilities, but this file shows logits.*--softmax"),
        (None, ["--top-k", "10"], "expected --top-k below the 10 classes"),
        (None, ["--max-body", "1000"], "32 images need 101,376 bytes as a binary tensor.*may have 1,000"),
        (None, ["--timeout", "0"], "expected timeout > 0"),
        (None, ["--name", "a/b"], "expected a name of letters"),
        (None, ["--log-level", "loud"], "expected --log-level debug"),
        (None, ["--token-file", "short"], "at least 16 ASCII characters in line 1, but it has 3"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any] | None, options: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("abc\n")
    serving.write(Path("x.onnx"), told=serving.about(**told) if told else told)
    result = run("x.onnx", *options)
    assert result.exit_code == 2, result.output
    assert re.search(reason, result.stderr, re.DOTALL), result.stderr


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in run(str(tmp_path / "none.onnx")).stderr
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    assert "expected an ONNX file that `queryfoil export --to onnx` wrote" in run(str(tmp_path / "x.onnx")).stderr
    serving.write(tmp_path / "two.onnx", told=serving.about(), outputs=("scores", "logits"))
    assert "to have one output, scores, but it has scores, logits" in run(str(tmp_path / "two.onnx")).stderr


def test_a_missing_extra_is_told_by_its_name() -> None:
    code = "import sys; sys.modules['kserve'] = None; from queryfoil import cli; cli.app(['serve', 'x.onnx'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "needs the package kserve, which is not installed; install queryfoil[serve]" in done.stderr.replace(
        "\n", " "
    )


def test_a_taken_port_is_told(service: Service) -> None:
    result = run(str(service.file), "--port", str(service.port))
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{service.port}: Address already in use" in result.stderr


def test_a_token_in_a_file_and_in_the_environment_is_one_too_many(service: Service, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    result = run(str(service.file), "--token-file", str(tmp_path / "tokens"), QUERYFOIL_TOKEN=TOKEN)
    assert result.exit_code == 2
    assert "expected --token-file or QUERYFOIL_TOKEN, but got both" in result.stderr
    assert TOKEN not in result.stderr
