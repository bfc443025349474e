"""`queryfoil audit` over HTTP and gRPC gives the result of the attack on the file itself; and on a function."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import queryfoil as qf
import serving
import stub as stubs
from queryfoil import cli, data
from queryfoil.attacks import build
from queryfoil.deploy.export import export
from queryfoil.deploy.ledger import read
from queryfoil.models.victim import Victim
from queryfoil.run import run as attacking
from queryfoil.task import Task
from serving import Service
from stub import Stub, command, fooled_at, go, invoke, running

ROOT = Path(__file__).parent.parent
ATTACKS = {"protected": ("greedy", "drift, p 0.3", "RayS"), "plain": ("greedy",)}
SETTINGS = ["--images", "fashion-mnist", "--n", "24", "--budget", "40", "--eps", "24/255"]


def words(name: str) -> list[str]:
    return SETTINGS + [word for attack in ATTACKS[name] for word in ("--attack", attack)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A linear classifier: protected, as `queryfoil export` writes it, and plain, as in the tests of the server."""
    folder = tmp_path_factory.mktemp("exported")
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, serving.CLASSES)).eval()
    with torch.no_grad():
        w, b = serving.weights()
        network[1].weight.copy_(torch.from_numpy(w.T))
        network[1].bias.copy_(torch.from_numpy(b))
        held_out = data.load("fashion-mnist", "calibration")[:300]
        found = qf.fit(network(held_out.images), held_out.labels)
    export(Victim(network), found, folder / "protected.onnx", shape=serving.SHAPE)
    serving.write(folder / "plain.onnx", protected=False)
    return {name: folder / f"{name}.onnx" for name in ATTACKS}


@pytest.fixture(scope="module")
def services(files: dict[str, Path]) -> Iterator[dict[str, Service]]:
    found = {"protected": Service(files["protected"]), "plain": Service(files["plain"], "--unprotected")}
    yield found
    assert [service.stop() for service in found.values()] == [0, 0]


@pytest.fixture(scope="module")
def audited(services: dict[str, Service], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of audits of both, by the command over HTTP."""
    found = {}
    for name, service in services.items():
        found[name] = tmp_path_factory.mktemp("audits") / name
        url = f"http://{service.host}:{service.port}/v2/models/{service.name}"
        status, text = invoke(url, "--out", str(found[name]), *words(name))
        assert status == 0, text
        assert {"protected": "3 attacks x 24 images x 40 queries, at most 2,880", "plain": "1 attack x"}[name] in text
        assert "under the worst attack for each image" in text
    return found


@pytest.mark.parametrize("name", ["protected", "plain"])
def test_over_http_it_is_the_attack_on_the_file(
    files: dict[str, Path], audited: dict[str, Path], services: dict[str, Service], name: str
) -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(serving.offline(files[name], part.numpy())) for part in x.split(32)])

    images = data.load("fashion-mnist", "attack")[:24]
    task = Task.create(images.images, images.labels, images.ids, eps=24 / 255)
    attacks = {"greedy": build("square"), "drift, p 0.3": build("square", "drift", p_init=0.3), "RayS": build("rays")}
    found = fooled_at(audited[name])
    model.output = {"protected": "logits", "plain": "probs"}[name]  # type: ignore[attr-defined]
    for label in ATTACKS[name]:
        assert found[label] == attacking(attacks[label], model, task, 40).fooled_at.tolist()
    assert any(1 < number < 40 for number in found["greedy"])


def test_protected_leaves_more_than_unprotected_to_who_believes_it(audited: dict[str, Path]) -> None:
    left = {name: np.mean(np.array(fooled_at(folder)["greedy"]) > 40) for name, folder in audited.items()}
    assert left["protected"] > left["plain"] + 0.1


def test_the_report_is_that_of_bench_and_its_headline_the_worst_case(audited: dict[str, Path]) -> None:
    text = (audited["protected"] / "report.md").read_text()
    first = np.array([v for k, v in fooled_at(audited["protected"]).items() if k != "RayS"])
    assert f"as served: {100 * (first.min(0) > 40).mean():.1f} ± " in text
    assert "(2)" in text.split("as served: ")[1].split("\n")[0]
    assert "labels changed" not in text
    assert "nan" not in text
    assert "F16 attack weak without the defense (missing" in text
    rows = json.loads((audited["protected"] / "summary.json").read_text())
    assert [row["label"] for row in rows] == list(ATTACKS["protected"])
    assert rows[0]["labels_changed"] is None
    assert not any(name.startswith("rank") or "change" in name for name in rows[0]["usefulness"])
    assert "worst attack for each image" in (audited["protected"] / "report.html").read_text()


def test_over_grpc_the_same(services: dict[str, Service], audited: dict[str, Path], tmp_path: Path) -> None:
    url = f"grpc://{services['protected'].grpc}/protected"
    process = command(url, "--out", str(tmp_path / "out"), "--output", "logits", *words("protected"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert fooled_at(tmp_path / "out") == fooled_at(audited["protected"])


GRPC_FAULTS = """
from types import SimpleNamespace
from tritonclient.utils import InferenceServerException
from queryfoil.deploy.endpoint import Address
from queryfoil.deploy.line_grpc import GRPCLine

line = GRPCLine(Address.parse("grpc://127.0.0.1:9/a"), None, 1.0)
for status, reason in [
    ("UNAVAILABLE", "failed to connect to all addresses"), ("UNAVAILABLE", "Socket closed"),
    ("RESOURCE_EXHAUSTED", "as many as it takes"), ("RESOURCE_EXHAUSTED", "expected a request of at most 9 bytes"),
    ("DEADLINE_EXCEEDED", "late"), ("UNAUTHENTICATED", "no"), ("INVALID_ARGUMENT", "at most 4 images"),
    ("INTERNAL", "oh"),
]:
    def fail(*values, **named):
        raise InferenceServerException(reason, status=f"StatusCode.{status}")
    line.client = SimpleNamespace(get_model_metadata=fail)
    try:
        line.describe()
    except Exception as error:
        told = [getattr(error, name, "") for name in ("sent", "connected", "most")]
        print(type(error).__name__, *told, "token" in str(error))
"""


def test_what_goes_wrong_over_grpc_is_told_apart() -> None:
    found = subprocess.run(
        [sys.executable, "-c", GRPC_FAULTS], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, text=True,
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert found.stdout.splitlines() == [
        "BusyError False False  False",
        "BusyError True True  False",
        "BusyError True True  False",
        "BatchError   None False",
        "BusyError True True  False",
        "EndpointError    True",
        "BatchError   4 False",
        "EndpointError    False",
    ]


def test_a_finished_audit_asks_for_nothing_but_whether_it_is_the_same(
    services: dict[str, Service], audited: dict[str, Path]
) -> None:
    before = read(audited["plain"] / "spent.json")[0]
    service = services["plain"]
    url = f"http://{service.host}:{service.port}/v2/models/plain"
    status, text = invoke(url, "--out", str(audited["plain"]), *words("plain"))
    assert status == 0, text
    assert read(audited["plain"] / "spent.json")[0] == before + 2 * 16


def test_a_function_that_is_yours_is_audited_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_audit.py").write_text(
        "import torch\nfrom stub import scores\ncalls = []\n\n"
        "def model():\n"
        "    def ask(x):\n"
        "        calls.append(len(x))\n"
        "        if len(calls) == 3:\n"
        "            raise ConnectionError('lost')\n"
        "        return torch.from_numpy(scores(x.numpy()))\n"
        "    return ask\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("queryfoil.deploy.remote.FIRST", 0.01)
    words = ["shop_audit:model", "--images", str(stubs.images(tmp_path)), "--out", str(tmp_path / "out"), "--n", "16",
             "--budget", "20", "--eps", "16/255", "--attack", "greedy", "--rate", "0"]  # fmt: skip
    status, text = invoke(*words)
    assert status == 2
    assert "wherever it sends the images, is not on this machine" in text
    status, text = invoke(*words, "--yes")
    assert status == 0, text
    calls = sys.modules["shop_audit"].calls
    assert read(tmp_path / "out/spent.json") == (sum(calls), len(calls))
    (tmp_path / "stub").mkdir()
    with running(Stub()) as stub:
        assert fooled_at(tmp_path / "out") == fooled_at(go(stub, tmp_path / "stub"))
    assert "a token is for endpoints" in CliRunner().invoke(
        cli.app, ["audit", *words], env={"QUERYFOIL_TOKEN": "abc", "COLUMNS": "300"}
    ).output  # fmt: skip
    assert pq.read_table(tmp_path / "out/images.parquet").num_rows == 16
