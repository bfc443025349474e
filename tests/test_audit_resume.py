"""An audit that is killed, loses its endpoint, or finds another one, continues rightly or not at all."""

import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import stub as stubs
from queryfoil.deploy.ledger import read
from queryfoil.deploy.sameness import Answers, ChangedError
from queryfoil.report import page
from serving import wait
from stub import Stub, command, fooled_at, go, invoke, running


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
