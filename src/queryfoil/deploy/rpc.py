"""The gRPC server: the Open Inference Protocol on KServe's server, with the limits and reasons of the HTTP server."""

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from queryfoil.deploy.faults import as_refusal
from queryfoil.deploy.kserving import (
    DataPlane,
    GRPCServer,
    InferenceServicer,
    InferInput,
    InferRequest,
    ModelRepositoryExtension,
    RequestedOutput,
    add_servicer,
    pb,
)
from queryfoil.deploy.limits import CLIENT, Gate, Limits, too_long
from queryfoil.deploy.model import ProtectedModel
from queryfoil.deploy.rest import SERVER
from queryfoil.deploy.served import OUTPUT
from queryfoil.deploy.tensors import RefusedError, short
from queryfoil.deploy.tokens import Tokens
from queryfoil.deploy.wire import UNSUPPORTED

OPEN = ("ServerLive", "ServerReady")  # for probes, which have no token
CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""Of a refusal's HTTP status; all others are INVALID_ARGUMENT."""
CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents"}
IDLE = 300  # seconds after which an idle connection is closed

log = logging.getLogger(__name__)


class Servicer(InferenceServicer):  # type: ignore[misc]
    """The protocol's calls; what is wrong is raised, for the guard. Loading and unloading models is not offered."""

    def __init__(self, model: ProtectedModel, dataplane: DataPlane, repository: ModelRepositoryExtension) -> None:
        super().__init__(dataplane, repository)
        self._model = model

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(**SERVER)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        found = await self._data_plane.model_metadata(request.name)
        return pb.ModelMetadataResponse(**{**found, "platform": self._model.platform})

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        if not await self._data_plane.model_ready(request.model_name):
            raise RefusedError("busy", "the model is not ready")
        _check(request)
        raw = bool(request.raw_input_contents)
        if raw:
            values = list(request.raw_input_contents)
        else:
            most = self._model.max_batch * self._model.about.values
            values = [await asyncio.to_thread(_contents, one, most) for one in request.inputs]
        inputs = [
            InferInput(one.name, list(one.shape), one.datatype, given)
            for one, given in zip(request.inputs, values, strict=True)
        ]
        wanted = [RequestedOutput(one.name) for one in request.outputs]
        asked = InferRequest(request.model_name, inputs, request.id, request_outputs=wanted)
        answer, _ = await self._data_plane.infer(request.model_name, asked)
        scores = answer.outputs[0].as_numpy()
        output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": scores.shape}
        if not raw:
            output["contents"] = {"fp32_contents": scores.ravel()}
        return pb.ModelInferResponse(
            model_name=request.model_name, id=request.id, outputs=[output],
            raw_output_contents=[scores.tobytes()] if raw else [],
        )  # fmt: skip

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        raise RefusedError("method", "this service does not load models")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        raise RefusedError("method", "this service does not unload models")


def _check(request: Any) -> None:
    """RefusedError for a request whose parts do not go together."""
    if request.model_version:
        raise RefusedError("route", f"expected no version of the model, but got {short(request.model_version)}")
    if request.raw_input_contents:
        inputs, raw = len(request.inputs), len(request.raw_input_contents)
        if raw != inputs:
            raise RefusedError("length", f"expected raw contents for each of {inputs} inputs, but got {raw}")
        if any(one.HasField("contents") for one in request.inputs):
            raise RefusedError("format", "expected contents or raw contents, but got both")
    for part in (request, *request.inputs, *request.outputs):
        for name in UNSUPPORTED:
            if name in part.parameters:
                raise RefusedError("format", f"the parameter {name} is not supported; leave it out")


def _contents(one: Any, most: int) -> Any:
    """The numbers of a tensor that came as such, at most so many."""
    field = CONTENTS.get(one.datatype)
    if field is None:
        return []  # its datatype will be refused
    sent = getattr(one.contents, field)
    if len(sent) > most:
        raise RefusedError("batch", f"expected at most {most} numbers in a request, but got {len(sent)}")
    values = np.array(sent, np.float32 if one.datatype == "FP32" else np.int64)
    if one.datatype == "UINT8" and values.size and values.max() > 255:
        raise RefusedError("range", f"expected UINT8 values in [0, 255], but got {values.max()}")
    return values


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """What stands before the calls: a token, the limits, and errors that say no more than they should."""

    def __init__(self, model: ProtectedModel, limits: Limits, tokens: Tokens | None, gate: Gate) -> None:
        self.limits, self.tokens, self.gate, self.metrics = limits, tokens, gate, model.metrics

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler  # no such call: gRPC says so
        name = handler_call_details.method.rpartition("/")[2]
        sent = dict(handler_call_details.invocation_metadata or ())

        async def guarded(raw: bytes, context: Any) -> Any:
            start = time.perf_counter()
            try:
                return await self._let(name, sent, handler, raw, context)
            except Exception as error:
                refusal = as_refusal(error)
            finally:
                if name == "ModelInfer":
                    self.metrics.seconds.labels("grpc").observe(time.perf_counter() - start)
            self.metrics.refused.labels("grpc", refusal.kind).inc()
            code = CODES.get(refusal.status, grpc.StatusCode.INVALID_ARGUMENT)
            self.metrics.requests.labels("grpc", code.name).inc()
            return await context.abort(code, refusal.reason)

        return grpc.unary_unary_rpc_method_handler(guarded, None, handler.response_serializer)

    async def _let(self, name: str, sent: dict[str, Any], handler: Any, raw: bytes, context: Any) -> Any:
        client = None
        if self.tokens is not None and name not in OPEN:
            client = self.tokens.name(sent.get("authorization"))
        CLIENT.set(client or _address(context.peer()))
        try:
            request = handler.request_deserializer(raw)
        except DecodeError:
            raise RefusedError("format", "expected a message of the Open Inference Protocol") from None
        if name == "ModelInfer":
            with self.gate(), self.metrics.running.track_inprogress():
                try:
                    async with asyncio.timeout(self.limits.timeout):
                        answer = await handler.unary_unary(request, context)
                except TimeoutError:
                    raise too_long(self.limits.timeout) from None
        else:
            answer = await handler.unary_unary(request, context)
        self.metrics.requests.labels("grpc", grpc.StatusCode.OK.name).inc()
        return answer


def _address(peer: str) -> str:
    """The address in gRPC's name of a peer.

    >>> _address("ipv4:127.0.0.1:50000"), _address("ipv6:%5B::1%5D:50000")
    ('127.0.0.1', '::1')
    """
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]") or "unknown"


class RPCServer(GRPCServer):  # type: ignore[misc]
    """KServe's gRPC server with our calls, behind the guard, on one address."""

    def __init__(
        self,
        model: ProtectedModel,
        dataplane: DataPlane,
        repository: ModelRepositoryExtension,
        limits: Limits,
        tokens: Tokens | None,
        gate: Gate,
        *,
        address: str,
    ) -> None:
        super().__init__(0, dataplane, repository, {}, grace_period=int(limits.timeout) + 1)
        self.model, self.limits, self.address = model, limits, address
        self.guard = Guard(model, limits, tokens, gate)
        self.port: int | None = None

    async def start(self, max_workers: int = 1) -> None:
        """Serve in the running loop; `port` is set once it does. OSError if the address is taken."""
        self._server = grpc.aio.server(
            interceptors=[self.guard],
            options=[
                ("grpc.max_receive_message_length", self.limits.max_body),
                ("grpc.max_connection_idle_ms", IDLE * 1000),
                ("grpc.so_reuseport", 0),  # or a second server would quietly take half the calls
            ],
            maximum_concurrent_rpcs=2 * self.limits.max_concurrent + 16,
        )
        add_servicer(Servicer(self.model, self._data_plane, self._model_repository_extension), self._server)
        try:
            port = self._server.add_insecure_port(self.address)
        except RuntimeError:
            raise OSError(
                errno.EADDRINUSE, f"gRPC cannot listen on {self.address}: the address is taken or none of this machine"
            ) from None
        await self._server.start()
        self.port = port
        await self._server.wait_for_termination()
