"""`queryfoil audit`: the result of the attack on the file itself; a hard budget, retries, resume, refusals."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typer.testing import CliRunner

import queryfoil as qf
import serving
import stub as stubs
from queryfoil import cli, data, summary, table
from queryfoil.attacks import build
from queryfoil.deploy import audit_command
from queryfoil.deploy.audit import SUITE, attackers, prepare
from queryfoil.deploy.audit_run import run
from queryfoil.deploy.endpoint import Address, BatchError, BusyError, EndpointError
from queryfoil.deploy.export import export
from queryfoil.deploy.ledger import Ledger, SpentError, read
from queryfoil.deploy.remote import Limits, Remote
from queryfoil.deploy.sameness import Answers, ChangedError
from queryfoil.models.victim import Victim
from queryfoil.report import page
from queryfoil.run import run as attacking
from queryfoil.store import Store
from queryfoil.task import Task
from serving import Service, wait
from stub import Stub, running

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
    settings = prepare(stub.url, str(stubs.images(folder)), folder / "out", **{**given, **changed})
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


# A served file, over HTTP and gRPC

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


# Counting, budgets and retries


@pytest.mark.parametrize(("binary", "datatype"), [(True, "FP32"), (False, "FP32"), (True, "UINT8")])
def test_the_ledger_has_every_image_and_the_attack_its_queries(tmp_path: Path, binary: bool, datatype: str) -> None:
    with running(Stub(binary=binary, datatype=datatype)) as stub:
        out = go(stub, tmp_path)
    assert read(out / "spent.json") == (stub.images, len(stub.batches))
    assert stub.images == queries(out) + 16 + 2 * 16  # the scores of the report, and twice whether it is the same
    assert max(stub.batches) == 8
    arrays = np.load(tmp_path / "images.npz")
    x, y = torch.from_numpy(arrays["images"][:16]).float() / 255, torch.from_numpy(arrays["labels"][:16])
    offline = qf.attack(lambda x: torch.from_numpy(stubs.scores(x.numpy())), x, y, eps=16 / 255, budget=20)
    assert fooled_at(out)["greedy"] == offline.fooled_at.tolist()


def test_what_is_sent_again_counts_for_the_budget_and_not_for_the_attack(tmp_path: Path) -> None:
    def busy(stub: Stub, n: int) -> tuple[int, dict[str, str], str] | None:
        return (503, {"Retry-After": "0"}, "busy") if len(stub.batches) % 5 == 0 else None

    (tmp_path / "calm").mkdir()
    (tmp_path / "busy").mkdir()
    with running(Stub()) as calm:
        quiet = go(calm, tmp_path / "calm", budget=3)
    with running(Stub(before=busy)) as troubled:
        out = go(troubled, tmp_path / "busy", budget=3)
    assert fooled_at(out) == fooled_at(quiet)
    assert queries(out) == queries(quiet)
    assert troubled.answered == calm.images
    assert troubled.images > calm.images
    assert read(out / "spent.json")[0] == troubled.images


def test_the_budget_is_hard_whatever_fails(tmp_path: Path) -> None:
    def lost(stub: Stub, n: int) -> tuple[int, dict[str, str], str] | None:
        return (503, {}, "busy") if len(stub.batches) == 7 else None

    with running(Stub(before=lost)) as stub, pytest.raises(SpentError, match="of at most 150 images were sent"):
        go(stub, tmp_path, most=150)
    assert 142 < stub.images <= 150
    assert read(tmp_path / "out/spent.json")[0] == stub.images
    with running(stub):
        words = [stub.url, "--images", str(tmp_path / "images.npz"), "--out", str(tmp_path / "out"), "--n", "16",
                 "--budget", "20", "--eps", "16/255", "--attack", "greedy", "--batch", "8"]  # fmt: skip
        status, text = invoke(*words, "--most", "150")
        assert status == 3, text
        assert "run the same command with a larger --most to continue" in text
        assert stub.images <= 150
        status, text = invoke(*words, "--most", "5000")
    assert status == 0, text
    assert read(tmp_path / "out/spent.json")[0] == stub.images


class Faulty:
    """A line that fails as it is told to, and counts what reaches its end."""

    def __init__(self, *faults: Exception) -> None:
        self.faults, self.reached = list(faults), 0

    def ask(self, images: NDArray[Any]) -> NDArray[Any]:
        fault = self.faults.pop(0) if self.faults else None
        if not (isinstance(fault, BusyError) and not fault.sent):
            self.reached += len(images)
        if fault is not None:
            raise fault
        return images.reshape(len(images), -1)[:, :2]

    def close(self) -> None: ...


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


def remote(line: Faulty, path: Path, **limits: Any) -> tuple[Remote, Ledger, Time]:
    time, ledger = Time(), Ledger(path / "spent.json", 1000)
    return Remote(line, ledger, Limits(**limits), time, time.sleep), ledger, time


X = torch.arange(40, dtype=torch.float32).view(10, 1, 2, 2) / 255


def test_it_waits_longer_each_time_and_as_long_as_it_is_told(tmp_path: Path) -> None:
    line = Faulty(BusyError("a"), BusyError("b", wait=7), BusyError("c", sent=False), BusyError("d"))
    model, ledger, time = remote(line, tmp_path)
    with ledger, pytest.warns(UserWarning, match="b; asking again in 7 s"):
        assert torch.equal(model(X), X.flatten(1)[:, :2])
    assert time.slept == [0.5, 7, 2, 4]
    assert ledger.images == line.reached == 40  # four of five requests may have arrived


def test_it_gives_up_in_the_end(tmp_path: Path) -> None:
    model, ledger, time = remote(Faulty(*[BusyError("overload")] * 99), tmp_path, patience=20)
    told = pytest.raises(EndpointError, match=r"gave no answer within 20 s \(--patience\): overload")
    with ledger, told, pytest.warns(UserWarning, match="overload; asking again in 8 s"):
        model(X)
    assert time.now <= 20
    model, ledger, time = remote(Faulty(BusyError("overload", wait=300)), tmp_path / "later")
    with ledger, pytest.raises(EndpointError, match="overload; it wants to be asked again in 300 s"):
        model(X)
    assert time.slept == []
    model, ledger, time = remote(Faulty(BusyError("no way", sent=False, connected=False)), tmp_path / "other")
    with ledger, pytest.raises(EndpointError, match="there is no connection to the endpoint: no way"):
        model(X)
    assert time.slept == []
    assert ledger.images == 0


def test_requests_that_are_too_large_become_smaller(tmp_path: Path) -> None:
    line = Faulty(BatchError("expected at most 3 images in a request, but got 10"), BatchError("too much"))
    model, ledger, _ = remote(line, tmp_path)
    with ledger:
        assert torch.equal(model(X), X.flatten(1)[:, :2])
    assert model.batch == 1
    assert (ledger.images, ledger.requests) == (10 + 3 + 10, 12)
    model, ledger, _ = remote(Faulty(*[BatchError("never")] * 9), tmp_path / "other")
    with ledger, pytest.raises(BatchError, match="never"):
        model(X)
    assert ledger.images == 10 + 5 + 2 + 1


def test_the_rate_is_kept(tmp_path: Path) -> None:
    model, ledger, time = remote(Faulty(), tmp_path, batch=5, rate=10)
    with ledger:
        model(X)
        model(X)
    assert time.now == pytest.approx(1.5)  # 15 images before the last request
    model, ledger, time = remote(Faulty(), tmp_path / "requests", batch=5, rate=1000, requests=0.5)
    with ledger:
        model(X)
    assert time.now == pytest.approx(2)
    assert Limits(batch=5, rate=10).seconds(100) == 10
    assert Limits(batch=5, rate=10, requests=1).seconds(100) == 20
    assert Limits.of("http://127.0.0.1:1/v2/models/a", rate=3).rate == 3
    assert Limits.of("https://shop.example/v2/models/a", rate=0).rate is None
    assert Limits.of("shop:model") == Limits(batch=None, rate=100)


def test_the_endpoint_says_how_many_images_it_takes(tmp_path: Path) -> None:
    def small(stub: Stub, n: int) -> tuple[int, dict[str, str], str] | None:
        return (400, {}, f"expected at most 5 images in a request, but got {n}") if n > 5 else None

    with running(Stub(before=small)) as stub:
        out = go(stub, tmp_path)
    assert [n for n in stub.batches if n > 5] == [8]
    assert read(out / "spent.json")[0] == stub.images


def test_a_ledger_is_of_one_run_and_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "spent.json"
    with Ledger(path, 10) as first:
        first.take(6)
        with pytest.raises(ValueError, match="another audit is running"), Ledger(path, 10):
            pass
        with pytest.raises(SpentError, match="6 of at most 10 images were sent, and the next request has 5"):
            first.take(5)
        first.take(4)
        first.give_back(4)
    with Ledger(path, 10) as second:
        assert (second.images, second.requests) == (6, 1)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"), Ledger(path, 10):
        pass


# Stopped and continued


def test_a_killed_audit_continues_to_the_same_result_within_its_budget(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    settings = {"attacks": ["greedy", "SignHunter"], "budget": 40, "eps": "6/255"}
    with running(Stub()) as stub:
        whole = go(stub, tmp_path / "whole", **settings)

    stopped = threading.Event()

    def late(stub: Stub, n: int) -> None:
        if stub.images > 250:
            stopped.wait(20)

    images = stubs.images(tmp_path)
    with running(Stub(before=late)) as stub:
        words = [stub.url, "--images", str(images), "--out", str(tmp_path / "out"), "--n", "16", "--budget", "40",
                 "--eps", "6/255", "--attack", "greedy", "--attack", "SignHunter", "--chunk", "4", "--batch", "8",
                 "--most", "3000"]  # fmt: skip
        process = command(*words)
        try:
            assert wait(lambda: stub.images > 250, 40), process.poll()
            assert read(tmp_path / "out/spent.json")[0] == stub.images
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            stopped.set()
        chunks = list((tmp_path / "out/cells").glob("*/chunk-*.parquet"))
        assert chunks
        stub.before = lambda stub, n: None
        status, text = invoke(*words)
        assert status == 0, text
        assert "were sent before" in text
        assert read(tmp_path / "out/spent.json")[0] == stub.images <= 3000
    assert all(path.exists() for path in chunks)
    assert fooled_at(tmp_path / "out") == fooled_at(whole)


def test_an_endpoint_that_goes_away_is_told_and_what_was_finished_stays(tmp_path: Path) -> None:
    def gone(stub: Stub, n: int) -> tuple[int, dict[str, str], str] | None:
        return (503, {}, "shutting down") if stub.images > 150 else None

    images = stubs.images(tmp_path)
    with running(Stub(before=gone)) as stub:
        words = [stub.url, "--images", str(images), "--out", str(tmp_path / "out"), "--n", "16", "--budget", "20",
                 "--eps", "6/255", "--attack", "greedy", "--chunk", "4", "--patience", "0.1"]  # fmt: skip
        status, text = invoke(*words)
        assert status == 2
        assert "the endpoint gave no answer within 0.1 s (--patience): it answered 503: shutting down" in text
        assert "what was finished is kept, run the same command to continue" in text
        assert len(list((tmp_path / "out/cells").glob("*/chunk-*.parquet"))) >= 1
        stub.before = lambda stub, n: None
        status, text = invoke(*words)
        assert status == 0, text
        assert read(tmp_path / "out/spent.json")[0] == stub.images
    status, text = invoke(*words)
    assert status == 2
    assert "there is no connection to the endpoint" in text


def test_an_endpoint_that_changes_is_noticed(tmp_path: Path) -> None:
    def other(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return stubs.scores(x) + np.float32([0.01, 0, 0])

    with running(Stub()) as stub:
        out = go(stub, tmp_path)
        before = fooled_at(out)
        stub.answer = other
        with pytest.raises(ChangedError, match="the endpoint has changed since this audit began: scores of the same"):
            go(stub, tmp_path)
        stub.answer = lambda x: stubs.scores(x) * np.float32(1 + 1e-6)  # as another machine may round
        go(stub, tmp_path)
        assert fooled_at(out) == before
        stub.output = "probs"
        with pytest.raises(ValueError, match="expected probabilities in"):
            go(stub, tmp_path)


def test_a_change_in_between_ends_the_audit_for_good(tmp_path: Path) -> None:
    with running(Stub()) as stub:
        stub.answer = lambda x: stubs.scores(x) * np.float32(1 if stub.images < 200 else 2)
        with pytest.raises(ChangedError, match="the endpoint has changed during this audit"):
            go(stub, tmp_path)
        stub.answer = stubs.scores
        with pytest.raises(ChangedError, match="this folder holds answers of both, so audit the endpoint in another"):
            go(stub, tmp_path)


def test_a_randomized_endpoint_is_known_as_such_and_its_successes_are_asked_again(tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    with running(Stub()) as stub:
        stub.answer = lambda x: stubs.scores(x) + noise.normal(0, 0.5, (len(x), 3)).astype(np.float32)
        out = go(stub, tmp_path)
        row = page.write(out)[0]
        assert 0 < row["confirmed"] < 1
        assert read(out / "spent.json")[0] == stub.images > row["queries_total"] + 10
        go(stub, tmp_path)  # not taken for another
        stub.answer = stubs.scores
        with pytest.raises(ChangedError, match="since this audit began"):
            go(stub, tmp_path)


def test_chance_and_change_are_told_apart() -> None:
    exact = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    same = Answers(torch.stack([exact, exact]))
    noisy = Answers(torch.stack([exact, exact + 0.2]))
    assert same.deterministic
    assert not noisy.deterministic
    assert not noisy.moved(Answers(noisy.scores + 0.3))
    assert noisy.moved(Answers(noisy.scores + 3))
    assert same.moved(noisy)
    assert same.moved(Answers(torch.zeros(2, 2, 3))) == "it gives 3 scores an image instead of 2"


# Refusals


def test_without_a_terminal_and_yes_it_asks_nothing_that_is_elsewhere(tmp_path: Path) -> None:
    images = stubs.images(tmp_path)
    words = ["http://192.0.2.1/v2/models/a", "--images", str(images), "--out", str(tmp_path / "out"), "--n", "16"]
    status, text = invoke(*words)
    assert status == 2
    assert "is not on this machine, and there is no terminal to ask whether it is yours; pass --yes" in text
    assert not (tmp_path / "out").exists()


def test_at_a_terminal_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(text: str) -> bool:
        asked.append(text)
        return False

    monkeypatch.setattr(audit_command, "_interactive", lambda: True)
    monkeypatch.setattr(audit_command.typer, "confirm", answer)
    images = stubs.images(tmp_path)
    status, text = invoke("grpc://192.0.2.1:1/a", "--images", str(images), "--out", str(tmp_path / "out"), "--n", "16")
    assert status == 2
    assert "at the rate allowed, 11 min if all are needed" in text
    assert "nothing was sent" in text
    assert "Is grpc://192.0.2.1:1/a such a one?" in asked[0]
    assert not (tmp_path / "out").exists()


def test_a_wrong_token_is_told_before_an_image_is_sent(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef\n")
    with running(Stub(token="0123456789abcdef")) as stub:
        words = [stub.url, "--images", str(stubs.images(tmp_path)), "--out", str(tmp_path / "out"), "--n", "16",
                 "--budget", "5", "--attack", "greedy"]  # fmt: skip
        assert "wants a token: set QUERYFOIL_TOKEN or pass --token-file" in invoke(*words)[1]
        found = CliRunner().invoke(cli.app, ["audit", *words], env={"QUERYFOIL_TOKEN": "wrong", "COLUMNS": "300"})
        assert found.exit_code == 2
        assert "refuses this token" in found.output
        assert "wrong" not in found.output
        assert stub.images == 0
        status, text = invoke(*words, "--token-file", str(secret))
        assert status == 0, text
        assert "0123456789abcdef" not in text
    assert not any(b"0123456789abcdef" in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    secret.write_text("two words")
    assert "expected one token of ASCII characters" in invoke(*words, "--token-file", str(secret))[1]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:80", "expected a URL that names a model"),
        ("ftp://127.0.0.1/v2/models/a", "expected a URL with http, https, grpc, grpcs"),
        ("http://me:secret@127.0.0.1/v2/models/a", "without user, password"),
        ("http://127.0.0.1:99999/v2/models/a", "Port out of range"),
        ("grpc://127.0.0.1/a", "with the port of gRPC"),
    ],
)
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Address.parse(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.8.9.1/v2/models/a", True), ("http://[::1]:80/v2/models/a", True), ("grpc://localhost:1/a", True),
        ("http://localhost.example/v2/models/a", False), ("http://127.0.0.1.example/v2/models/a", False),
        ("https://0.0.0.0/x/v2/models/a/versions/2/infer", False),
    ],
)  # fmt: skip
def test_what_is_on_this_machine(url: str, loopback: bool) -> None:
    assert Address.parse(url).loopback == loopback
    assert Address.parse(str(Address.parse(url))) == Address.parse(url)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attacks": ["squre"]}, "unknown attack 'squre'"),
        ({"attacks": ["leak"]}, "unknown attack 'leak'"),
        ({"n": 14}, "expected n from 15"),
        ({"n": 21}, "to 20, the number of images"),
        ({"budget": 0}, "budget: Input should be greater than or equal to 1"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"attacks": ["RayS"], "norm": "l2", "eps": 1.0}, "RayS supports norm linf"),
        ({"most": 0}, "expected most as a whole number >= 1"),
        ({"model": "fashion-resnet"}, "expected the URL of an endpoint or module:function"),
    ],
)
def test_settings_that_are_wrong_are_told_before_anything_is_asked(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    given = {"model": "http://127.0.0.1:1/v2/models/a", "n": 16, **changed}
    with pytest.raises(ValueError, match=message):
        prepare(given.pop("model"), str(stubs.images(tmp_path)), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_suite_is_of_known_attackers_who_know_no_defense(tmp_path: Path) -> None:
    assert set(SUITE) <= set(attackers())
    assert not any(word in name for name in attackers() for word in ("inverted", "leak"))
    assert {"square", "rays", "surfree"} <= set(attackers())
    for norm, eps in (("linf", "8/255"), ("l2", 0.5)):
        images = str(stubs.images(tmp_path))
        plan = prepare("http://127.0.0.1:1/v2/models/a", images, tmp_path / "out", n=16, norm=norm, eps=eps).plan
        assert len(plan.cells) == len(SUITE) + 1
        assert [cell.loss is None for cell in plan.cells].count(True) == 1


def test_only_the_audit_asks_endpoints(tmp_path: Path) -> None:
    words = ["attack", "http://127.0.0.1:1/v2/models/a", "--images", "fashion-mnist", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 2
    assert "which only `queryfoil audit` asks" in " ".join(found.output.split())


def test_what_an_endpoint_says_of_itself_has_to_fit(tmp_path: Path) -> None:
    with running(Stub(output=None)) as stub:
        with pytest.raises(ValueError, match="does not say what its scores are; pass --output"):
            go(stub, tmp_path)
        stub.output = "log_probs"
        with pytest.raises(ValueError, match="expected output 'log_probs', as the endpoint says it, but got 'logits'"):
            go(stub, tmp_path, output="logits")
        stub.datatype = "FP16"
        with pytest.raises(EndpointError, match="FP32 or UINT8, but the model takes FP16"):
            go(stub, tmp_path)
        stub.datatype, stub.output = "FP32", None
        go(stub, tmp_path, output="logits")
        with pytest.raises(ValueError, match=r"expected images \(1, 6, 6\), as the model takes them, but got \(1, 28"):
            run(prepare(stub.url, "fashion-mnist", tmp_path / "other", n=16))
    assert not list((tmp_path / "other").rglob("*.parquet"))


def test_a_missing_client_is_told_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "queryfoil.deploy.line_http", raising=False)
    settings = prepare("http://127.0.0.1:1/v2/models/a", str(stubs.images(tmp_path)), tmp_path / "out", n=16)
    with pytest.raises(
        ValueError, match=r"needs the package httpx, which is not installed; install queryfoil\[audit\]"
    ):
        run(settings)


# A function


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
