"""The HTTP server: the routes of the Open Inference Protocol and /metrics, on KServe's server, and no others."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from multiprocessing import parent_process
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from queryfoil.deploy import wire
from queryfoil.deploy.guard import Guard, patient
from queryfoil.deploy.kserving import (
    DataPlane,
    InferInput,
    InferRequest,
    ModelRepositoryExtension,
    RESTServer,
    RESTServerMultiProcess,
    RESTServerProcess,
    V2Endpoints,
)
from queryfoil.deploy.limits import Gate, Limits
from queryfoil.deploy.logs import log_to_stderr
from queryfoil.deploy.model import ProtectedModel
from queryfoil.deploy.tokens import Tokens

INLINE = 64 * 1024  # bytes of JSON that are read at once; more are read in a thread, as others would wait
KEEP_ALIVE = 65  # seconds an idle connection stays; longer than those of proxies, as KServe has it

SERVER = {"name": "queryfoil", "version": "", "extensions": ["binary_tensor_data"]}
"""What the server says of itself; its version is nobody's business."""

log = logging.getLogger(__name__)


def routes(dataplane: DataPlane, model: ProtectedModel) -> Router:
    """The routes to a model of the dataplane; errors are raised, for the guard that stands before them."""
    v2, room = V2Endpoints(dataplane), wire.Room.of(model.about, model.max_batch)

    def told(call: Callable[..., Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            found = await call(**request.path_params)
            return JSONResponse(found if isinstance(found, dict) else found.model_dump(exclude_none=True))

        return route

    async def server() -> dict[str, Any]:
        return SERVER

    async def about(model_name: str) -> dict[str, Any]:
        properties = {"defense": model.defense, "output": model.about.output}
        return {**await dataplane.model_metadata(model_name), "platform": model.platform, "properties": properties}

    async def metrics(request: Request) -> Response:
        return Response(model.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def infer(request: Request) -> Response:
        name = request.path_params["model_name"]
        await v2.model_ready(name)
        body, length = await request.body(), request.headers.get(wire.JSON_LENGTH)
        if len(body) <= INLINE:
            asked = wire.decode(body, length, room)
        else:
            asked = await asyncio.to_thread(wire.decode, body, length, room)
        inputs = [InferInput(one.name, list(one.shape), one.datatype, one.values) for one in asked.sent]
        answer, _ = await dataplane.infer(name, InferRequest(name, inputs, asked.id))
        text, size = wire.encode(answer.outputs[0].as_numpy(), name, asked.id, asked.binary)
        if size is None:
            return Response(text, media_type="application/json")
        return Response(text, media_type="application/octet-stream", headers={wire.JSON_LENGTH: str(size)})

    table = [
        Route("/", told(dataplane.live)),
        Route("/metrics", metrics),
        Route("/v2", told(server)),
        Route("/v2/health/live", told(v2.live)),
        Route("/v2/health/ready", told(v2.ready)),
        Route("/v2/models", told(v2.models)),
        Route("/v2/models/{model_name}", told(about)),
        Route("/v2/models/{model_name}/ready", told(v2.model_ready)),
        Route("/v2/models/{model_name}/infer", infer, methods=["POST"]),
    ]
    return Router(table, redirect_slashes=False)


class HTTPServer(RESTServer):  # type: ignore[misc]
    """KServe's HTTP server with our routes alone, behind the guard, on a socket that is bound already."""

    def __init__(
        self,
        model: ProtectedModel,
        dataplane: DataPlane,
        repository: ModelRepositoryExtension,
        limits: Limits,
        tokens: Tokens | None,
        gate: Gate,
        *,
        bound: socket.socket,
        workers: int,
        log_level: str,
    ) -> None:
        super().__init__(
            "", dataplane, repository, bound.getsockname()[1], workers=workers, event_loop="asyncio",
            grace_period=int(limits.timeout) + 1, timeout_keep_alive=KEEP_ALIVE,
        )  # fmt: skip
        self.model, self.limits, self.tokens, self.gate, self.log_level = model, limits, tokens, gate, log_level
        self.bound: socket.socket | None = bound if workers == 1 else None
        self.config.ws, self.config.lifespan = "none", "off"
        self.config.server_header, self.config.proxy_headers = False, False

    def create_application(self) -> None:
        """Put the routes and the guard in place of KServe's application."""
        app = routes(self.dataplane, self.model)
        self.config.http = patient(self.limits.timeout)
        self.config.app = Guard(app, self.limits, self.tokens, self.gate, self.model.metrics)

    async def start(self) -> None:
        """Serve in the running loop."""
        self.create_application()
        await self._server.serve(sockets=[self.bound])

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve in a process of its own, which ends with its parent."""
        log_to_stderr(self.log_level)
        threading.Thread(target=_follow, daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # after uvicorn's own handler; the log is closed below
        self.create_application()
        try:
            self._server.run(sockets=sockets)
        finally:
            self.model.close()


def _follow() -> None:
    """Stop this process when its parent has gone, killed or not."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


class Workers(RESTServerMultiProcess):  # type: ignore[misc]
    """KServe's processes that share a socket; one that dies is replaced."""

    def __init__(self, server: HTTPServer, bound: socket.socket) -> None:
        self._rest_server, self._bound = server, bound
        self.log_config_file = None
        self._processes: list[RESTServerProcess] = []
        self.should_exit = asyncio.Event()

    async def start(self) -> None:
        """Start the processes and keep them alive until `stop`."""
        sockets = [self._bound]
        self.init_processes(sockets)
        while not self.should_exit.is_set():
            await asyncio.sleep(0.5)
            await self.keep_subprocess_alive(sockets)
        await self.terminate_all()

    async def keep_subprocess_alive(self, sockets: list[socket.socket]) -> None:
        """Replace those that are dead. KServe also kills one that does not answer in 5 s, as one that still starts."""
        for index, process in enumerate(self._processes):
            if self.should_exit.is_set() or process._process.is_alive():
                continue
            log.error("worker %s died (exit status %s); starting another", process.pid, process._process.exitcode)
            self._processes[index] = RESTServerProcess(sockets, self._rest_server.run)
            self._processes[index].start()
