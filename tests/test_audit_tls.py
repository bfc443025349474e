"""`queryfoil audit` over TLS: whom it trusts, and what it says of others."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

import serving
import stub as stubs
from serving import Service
from stub import command, invoke


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    found = Service(serving.write(folder / "protected.onnx"))
    yield found
    assert found.stop() == 0


@contextmanager
def behind_tls(port: int, certificate: trustme.LeafCert) -> Iterator[int]:
    """A port where TLS ends, before one where it does not begin."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    loop, opened = asyncio.new_event_loop(), threading.Event()
    ports: list[int] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while part := await reader.read(1 << 16):
                writer.write(part)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, to), pump(there, writer))

    async def main() -> None:
        server = await asyncio.start_server(connect, "127.0.0.1", 0, ssl=context)
        ports.append(server.sockets[0].getsockname()[1])
        opened.set()
        await stop.wait()
        server.close()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert opened.wait(10)
    yield ports[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    assert not thread.is_alive()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def asked(*words: str) -> tuple[int, str]:
    """Status and output of the command, in a process of its own."""
    process = command(*words)
    told = process.communicate(timeout=100)
    return process.returncode, " ".join("".join(told).split())


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_an_authority_that_is_given_is_trusted_and_no_other(tmp_path: Path, service: Service, scheme: str) -> None:
    mine, other = trustme.CA(), trustme.CA()
    for name, authority in (("mine", mine), ("other", other)):
        authority.cert_pem.write_to_path(tmp_path / name)
    settings = ["--images", "fashion-mnist", "--n", "16", "--budget", "5", "--eps", "16/255", "--attack", "greedy"]
    with behind_tls(
        service.port if scheme == "https" else int(service.grpc.rpartition(":")[2]), mine.issue_cert("127.0.0.1")
    ) as port:
        url = (
            f"https://127.0.0.1:{port}/v2/models/{service.name}"
            if scheme == "https"
            else f"grpcs://127.0.0.1:{port}/{service.name}"
        )
        words = [url, *settings, "--output", "probs"]
        status, text = asked(*words, "--out", str(tmp_path / "out"), "--ca-file", str(tmp_path / "mine"))
        assert status == 0, text
        assert "accuracy left after 5 queries" in text
        for trusted, hint in (
            ([], "pass its certificate by --ca-file"),
            (["--ca-file", str(tmp_path / "other")], "--ca-file has no authority that vouches for it"),
        ):
            status, text = asked(*words, "--out", str(tmp_path / "refused"), *trusted)
            assert status != 0
            assert "is not trusted" in text
            assert hint in text
            assert "sent so far: 0 images" in text


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_a_certificate_of_another_host_is_not_trusted(tmp_path: Path, service: Service, scheme: str) -> None:
    mine = trustme.CA()
    mine.cert_pem.write_to_path(tmp_path / "mine")
    port = service.port if scheme == "https" else int(service.grpc.rpartition(":")[2])
    with behind_tls(port, mine.issue_cert("other.example")) as there:
        path = f"/v2/models/{service.name}" if scheme == "https" else f"/{service.name}"
        words = [f"{scheme}://127.0.0.1:{there}{path}", "--images", "fashion-mnist", "--n", "16", "--output", "probs"]
        status, text = asked(*words, "--out", str(tmp_path / "out"), "--ca-file", str(tmp_path / "mine"))
    assert status != 0
    assert "is not trusted" in text
    assert "or it is out of date or of another host" in text
    assert "sent so far: 0 images" in text


def test_authorities_that_nothing_would_use_or_read_are_refused(tmp_path: Path) -> None:
    settings = ["--images", str(stubs.images(tmp_path)), "--n", "16", "--out", str(tmp_path / "out")]
    (tmp_path / "empty").write_text("no certificate\n")
    for url, file, told in (
        ("http://127.0.0.1:1/v2/models/a", "empty", "--ca-file is for endpoints with https or grpcs"),
        ("https://127.0.0.1:1/v2/models/a", "empty", "expected certificates in PEM format in"),
        ("grpcs://127.0.0.1:1/a", "missing", "expected certificates in PEM format in"),
    ):
        status, text = invoke(url, *settings, "--ca-file", str(tmp_path / file))
        assert status == 2
        assert told in text
    assert not (tmp_path / "out").exists()
