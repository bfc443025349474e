"""What an audit sends and counts: a hard budget, what is sent again, batches, rates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import queryfoil as qf
import stub as stubs
from queryfoil.deploy.endpoint import BatchError, BusyError, EndpointError
from queryfoil.deploy.ledger import Ledger, SpentError, read
from queryfoil.deploy.remote import Limits, Remote
from stub import Stub, fooled_at, go, invoke, queries, running


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
