"""From a query log to its page: attackers are found, others are not, and what cannot be read is said."""

import shutil
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import queryfoil as qf
from queryfoil import cli, data
from queryfoil.deploy.grouping import Queries, read
from queryfoil.deploy.querylog import SCHEMA, QueryLog
from queryfoil.deploy.watch import ATTACK, CALM, LOOK, Client, Rules, sequence, watch
from queryfoil.report import queries as page

SCRIPT = "<script>alert(1)</script>"
Images = NDArray[np.float32]


class Service:
    """A model whose answers are logged, client by client."""

    def __init__(self, model: nn.Module, log: QueryLog, clients: Iterable[str]) -> None:
        self.model, self.log, self.clients, self.asked = model, log, [*clients], 0

    def __call__(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scores = self.model(x)
        self.log.add(self.clients[self.asked % len(self.clients)], x.numpy(), scores.numpy(), "logits")
        self.asked += 1
        return scores


@pytest.fixture(scope="module")
def protected(network: nn.Module) -> nn.Module:
    held_out = data.load("fashion-mnist", "calibration")[:500]
    with torch.inference_mode():
        return qf.protect(network, qf.fit(network(held_out.images), held_out.labels))


@pytest.fixture(scope="module")
def recorded(network: nn.Module, protected: nn.Module, clothes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of attackers, on the model as it is and behind terraces, and of others."""
    folder = tmp_path_factory.mktemp("log")
    log = QueryLog(folder)
    with torch.inference_mode():
        right = (network(clothes.images[:100]).argmax(1) == clothes.labels[:100]).nonzero().squeeze(1)

    def attack(model: nn.Module, attack: str, number: int, *clients: str, eps: float = 8 / 255) -> None:
        i = int(right[number])
        x, y = clothes.images[i : i + 1], clothes.labels[i : i + 1]
        qf.attack(Service(model, log, clients), x, y, attack, eps=eps, budget=115 if len(clients) == 1 else 100)

    attack(protected, "square", 0, "square")
    attack(protected, "signhunter", 1, "signhunter")
    attack(network, "square", 2, SCRIPT, eps=4 / 255)
    attack(network, "square", 3, *(f"spread-{i}" for i in range(5)), eps=4 / 255)
    honest = Service(protected, log, ["visitor"])
    for start in range(100, 400, 20):
        honest(clothes.images[start : start + 20])
    again = Service(protected, log, ["again"])
    for _ in range(40):
        again(clothes.images[400:405])
    camera, rng = Service(protected, log, ["camera"]), np.random.default_rng(0)
    scene = clothes.images[500:501].numpy()
    for _ in range(105):
        noise = np.rint(rng.normal(0, 2, scene.shape)) / 255
        camera(torch.from_numpy(np.clip(scene + noise, 0, 1).astype(np.float32)))
    log.close()
    return folder


@pytest.fixture(scope="module")
def judged(recorded: Path) -> dict[str, Client]:
    return {client.name: client for client in watch(read(recorded)).clients}


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["report", *map(str, arguments)])


def test_attackers_are_found_and_others_are_not(judged: dict[str, Client]) -> None:
    levels = {name: client.level for name, client in judged.items()}
    assert levels[SCRIPT] == ATTACK  # walks down
    assert levels["square"] >= LOOK  # sees a few levels, whatever it tries
    assert levels["signhunter"] >= LOOK
    assert levels["camera"] == LOOK  # looks the same
    assert levels["visitor"] == levels["again"] == CALM
    assert judged["again"].near == 0
    assert judged["again"].images == 5
    assert judged["square"].near > 0.9 * judged["square"].images
    assert 30 <= (judged[SCRIPT].since or 0) <= judged[SCRIPT].queries
    assert "the shown margin fell from" in judged[SCRIPT].evidence[0]


def test_an_attack_that_is_spread_over_clients_is_found(recorded: Path, judged: dict[str, Client]) -> None:
    spread = [judged[f"spread-{i}"] for i in range(5)]
    assert all(client.level >= LOOK for client in spread)
    assert all("together with 4 other clients" in client.evidence[-1] for client in spread)
    assert all(client.queries == 20 for client in spread)
    (found,) = (names for _, names in watch(read(recorded)).shared)
    assert sorted(found) == [f"spread-{i}" for i in range(5)]


def made(margins: Iterable[float], tops: Iterable[int], images: Iterable[int] | None = None) -> Queries:
    """Queries of one client about variants of one image."""
    margin, top = np.array([*margins], np.float32), np.array([*tops], np.int32)
    n = len(margin)
    image = np.arange(n) if images is None else np.array([*images])
    return Queries(
        folder=Path(), time=np.arange(n).astype("datetime64[us]"), client=np.zeros(n, np.int32), clients=["one"],
        image=image.astype(np.uint64), top=top, margin=margin, group=np.zeros(n, np.int32), files=1, damaged=(), keys=1,
    )  # fmt: skip


def level(*arguments: Any) -> tuple[int, int]:
    queries = made(*arguments)
    found = sequence(queries, np.arange(len(queries)), Rules())
    return found.level, found.since


def test_a_sequence_is_a_walk_when_its_margin_falls_or_its_class_keeps_changing() -> None:
    same = [0] * 200
    assert level([8.0] * 200, same) == (LOOK, 99)
    assert level([8.0] * 99, same[:99]) == (CALM, 0)
    assert level([8.0] * 20 + [3.5] * 10, same[:30]) == (ATTACK, 29)
    assert level([8.0] * 20 + [3.75] * 10, same[:30]) == (CALM, 0)  # 1 + 3.75 is more than half of 1 + 8
    assert level([8.0] * 20 + [3.5] * 9, same[:29]) == (CALM, 0)
    assert level([8.0, 1.0] * 50, same[:100]) == (ATTACK, 29)  # mostly low: the lower of two middles
    assert level([8.0, 8.0, 1.0] * 30, same[:90]) == (CALM, 0)  # one query in three is no walk
    assert level([2.0] * 40, [*[0] * 28, 1, 0, 1, *[0] * 9]) == (ATTACK, 31)  # the fourth change
    assert level([2.0] * 40, [0, 1, *[0] * 38]) == (CALM, 0)
    assert level([8.0] * 200, same, [0] * 200) == (CALM, 0)  # one image, again and again


def test_many_short_walks_look_like_an_attack() -> None:
    one = made(np.tile([5.0] * 9 + [0.25], 12), np.tile([0] * 9 + [1], 12))
    groups = np.repeat(np.arange(12), 10).astype(np.int32)
    (client,) = watch(Queries(**{**vars(one), "group": groups})).clients
    assert client.level == ATTACK
    assert client.since == 50
    assert client.evidence == ["12 of 12 sequences of variants fell or ended in another class"]
    few = (groups < 4) | (groups >= 8)
    (client,) = watch(Queries(**{**vars(one), "group": groups, "top": np.where(few, 0, one.top)})).clients
    assert client.level == CALM  # four of twelve


def test_the_page_and_the_table_say_who_and_why(recorded: Path, tmp_path: Path) -> None:
    result = call("--log", recorded, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    for text in ("of 11 clients", "look like an attack", "spread-3", str(tmp_path / "page.html")):
        assert text in result.output
    assert SCRIPT[:8] in result.output  # a narrow terminal breaks the name
    html = (tmp_path / "page.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<svg") >= 5
    assert "http" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    for text in ("Together with 4 other clients", "to look at", "A fixed camera", "30 variants of one image or more"):
        assert text in html
    assert not list(recorded.glob("*.html"))
    assert call("--log", recorded).exit_code == 0
    (recorded / "report.html").unlink()


def test_a_name_in_a_log_does_nothing_to_the_terminal(tmp_path: Path, clothes: Any) -> None:
    log = QueryLog(tmp_path)
    log.add("\x1b[31mred\x1b[0m [bold]", clothes.images[:1].numpy(), np.eye(3, dtype=np.float32)[:1], "logits")
    log.close()
    result = call("--log", tmp_path)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "?[31mred?[0m" in result.output
    assert "[bold]" in result.output


def test_what_is_older_is_left_out(recorded: Path) -> None:
    everything = read(recorded)
    middle = everything.time[len(everything) // 2]
    later = read(recorded, since=middle.astype(datetime))
    assert 0 < len(later) == int((everything.time >= middle).sum()) < len(everything)
    tomorrow = f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%d}"
    result = call("--log", recorded, "--since", tomorrow)
    assert result.exit_code == 2
    assert "has no row from" in result.output


def test_files_that_are_damaged_or_of_something_else_are_named(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    shutil.copytree(recorded, folder)
    whole = next(folder.glob("*.parquet")).read_bytes()
    (folder / "queries-1.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "queries-2.parquet").write_bytes(whole[:5000] + bytes(100) + whole[5100:])
    pq.write_table(pa.table({"a": [1]}), folder / "queries-3.parquet")
    missing = pa.Table.from_pylist([{"client": None}], schema=SCHEMA)
    pq.write_table(missing.replace_schema_metadata({"queryfoil": '{"key": "a"}'}), folder / "queries-4.parquet")
    rows = pq.read_table(next(folder.glob("queries-*-*.parquet")))
    for i, (place, column, values) in enumerate([(3, "coarse", []), (3, "coarse", [None]), (5, "margin", np.nan)], 5):
        wrong = pa.array([values] * len(rows), SCHEMA.field(column).type)
        pq.write_table(rows.set_column(place, column, wrong), folder / f"queries-{i}.parquet")
    result = call("--log", folder)
    assert result.exit_code == 0, result.output
    assert [f"queries-{i}.parquet" in result.stderr for i in range(1, 8)] == [True] * 7
    assert "7 files could not be read" in (folder / "report.html").read_text()
    assert len(read(folder)) == len(read(recorded))
    for path in folder.glob("queries-*-*.parquet"):
        path.unlink()
    assert "none of the 7 files" in call("--log", folder).output


def test_logs_of_different_keys_are_compared_within_each(tmp_path: Path, clothes: Any) -> None:
    x, scores = clothes.images[:3].numpy(), np.eye(3, dtype=np.float32)
    for name in ("a", "b"):
        log = QueryLog(tmp_path / name)
        log.add("one", x, scores, "logits")
        log.add("one", x, scores, "logits")
        log.close()
    for path in (tmp_path / "b").glob("*.parquet"):
        shutil.copy(path, tmp_path / "a")
    queries = read(tmp_path / "a")
    assert (queries.keys, queries.files, len(queries)) == (2, 2, 12)
    assert len(np.unique(queries.image)) == len(np.unique(queries.group)) == 6
    assert "2: queries are compared with others of the same key alone" in page.html(watch(queries))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass one of them"),
        (["here", "--log", "there"], "pass one of them"),
        (["here", "--out", "page.html"], "--out and --since are for --log alone"),
        (["--log", "nowhere"], "expected the folder of a query log, but there is none: nowhere"),
    ],
)
def test_what_cannot_be_reported_is_said_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    (tmp_path / "empty").mkdir()
    assert "expected a query log in empty" in call("--log", "empty").stderr
