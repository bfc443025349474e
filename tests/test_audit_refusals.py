"""What an audit refuses before it sends an image, and why."""

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import stub as stubs
from queryfoil import cli
from queryfoil.deploy import audit_command
from queryfoil.deploy.audit import BORDERS, SUITE, attackers, prepare
from queryfoil.deploy.audit_run import run
from queryfoil.deploy.endpoint import Address, EndpointError
from stub import Stub, go, invoke, running


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
    assert "at the rate allowed, 13 min if all are needed" in text
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
        assert [cell.label for cell in plan.cells] == [*SUITE, *BORDERS[norm]]


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
