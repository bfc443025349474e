"""Slow and broken clients, too many of them, and a killed worker: the server goes on, and right."""

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
from numpy.typing import NDArray

import serving
from queryfoil import data
from serving import ONE, Service, ask, binary, message, offline, plain, reason, wait


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
    answer = talk(service, "\r\n".join([*lines, "sec-websocket-version: 13", "", ""]).encode())
    assert answer.startswith(b"HTTP/1.1 200 ")  # as without the upgrade


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
