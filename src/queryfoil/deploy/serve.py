"""`queryfoil serve`: a protected model over the Open Inference Protocol, HTTP and gRPC, on KServe's server."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from queryfoil.deploy.kserving import ModelServer, no_arguments
from queryfoil.deploy.limits import Gate, Limits
from queryfoil.deploy.logs import log_to_stderr
from queryfoil.deploy.metrics import FOLDER
from queryfoil.deploy.model import ProtectedModel
from queryfoil.deploy.rest import HTTPServer, Workers
from queryfoil.deploy.rpc import RPCServer
from queryfoil.deploy.tokens import Tokens

BACKLOG = 2048  # connections that wait to be accepted
STARTED = 120  # seconds that workers may take to answer first


@dataclass(frozen=True)
class Address:
    """Where a server listens: a host, and ports, of which 0 means any free one; no gRPC without its port."""

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int | None = 8081

    def at(self, port: int) -> str:
        """Host and port as they stand in a URL.

        >>> Address("::1").at(80)
        '[::1]:80'
        """
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


class Server(ModelServer):  # type: ignore[misc]
    """KServe's model server for one protected model: only the routes of the protocol, behind limits and tokens.

    `ready` is called once with the addresses of HTTP and gRPC, when both answer.
    """

    def __init__(
        self,
        address: Address,
        limits: Limits,
        tokens: Tokens | None = None,
        workers: int = 1,
        log_level: str = "info",
        ready: Callable[[str, str | None], None] | None = None,
    ) -> None:
        if workers > 1 and FOLDER not in os.environ:
            raise ValueError(f"expected a folder for the metrics of several workers in {FOLDER}, but it is not set")
        log_to_stderr(log_level)
        super().__init__(
            http_port=address.port, grpc_port=address.grpc_port or 0, workers=workers,
            enable_grpc=address.grpc_port is not None, enable_docs_url=False, enable_latency_logging=False,
            grace_period=int(limits.timeout) + 1,
        )  # fmt: skip
        self.address, self.limits, self.tokens, self.log_level, self.tell = address, limits, tokens, log_level, ready
        self._stopping: asyncio.Task[None] | None = None

    def start(self, models: list[ProtectedModel]) -> None:
        """Serve a model until a signal comes. OSError if an address is taken."""
        self._register_and_check_atleast_one_model_is_ready(models)
        (model,) = models
        bound = _bind(self.address)
        self.http_port = bound.getsockname()[1]
        parts = (
            model,
            self.dataplane,
            self.model_repository_extension,
            self.limits,
            self.tokens,
            Gate(self.limits.max_concurrent),
        )
        server = HTTPServer(*parts, bound=bound, workers=self.workers, log_level=self.log_level)
        if self.workers > 1:
            self._rest_multiprocess_server = Workers(server, bound)
            self.servers.append(self._rest_multiprocess_server.start())
        else:
            self._rest_server = server
            self.servers.append(server.start())
        if self.enable_grpc:
            self._grpc_server = RPCServer(*parts, address=self.address.at(self.grpc_port))
            self.servers.append(self._grpc_server.start())
        self.servers.append(self._announce())
        self.register_signal_handler()
        try:
            with no_arguments():
                asyncio.run(self._serve())
        finally:
            bound.close()
            model.close()

    def register_signal_handler(self) -> None:
        """Stop cleanly on SIGINT and SIGTERM."""
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, lambda number, _: self.stop(number))

    def stop(self, sig: int) -> None:
        """Finish what is in hand and stop; the model stays until then."""
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop(sig))

    async def _stop(self, sig: int) -> None:
        if self._rest_multiprocess_server:
            await self._rest_multiprocess_server.stop(sig)
        if self._rest_server:
            self._rest_server._server.should_exit = True
        if self._grpc_server:
            await self._grpc_server.stop(sig)

    async def _announce(self) -> None:
        """Tell once that all parts answer."""
        async with asyncio.timeout(STARTED):
            while self._stopping is None and self._grpc_server is not None and self._grpc_server.port is None:
                await asyncio.sleep(0.02)
            while self._stopping is None and not await _answers(self.address, self.http_port):
                await asyncio.sleep(0.1)
        if self.tell is not None and self._stopping is None:
            grpc = None if self._grpc_server is None else self.address.at(self._grpc_server.port or 0)
            self.tell(self.address.at(self.http_port), grpc)


def _bind(address: Address) -> socket.socket:
    """A socket that listens; OSError that names the address."""
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        # with its protocol: without it, asyncio would let answers wait 40 ms for the client's acknowledgement (Nagle)
        with ExitStack() as until_it_listens:
            bound = until_it_listens.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((address.host, address.port))
            bound.listen(BACKLOG)
            until_it_listens.pop_all()
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {address.at(address.port)}: {error.strerror}") from None
    return bound


async def _answers(address: Address, port: int) -> bool:
    """Whether the HTTP server says that it is ready."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(address.host, address.host)
    writer: Any = None
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /v2/health/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        return f" {HTTPStatus.OK} ".encode() in await reader.readline()
    except OSError:
        return False
    finally:
        if writer is not None:
            writer.close()
