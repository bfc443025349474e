"""What stands before the routes of the HTTP server: tokens, sizes, times, and errors that say no more than need be."""

import asyncio
import time
from typing import Any

import h11
import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from queryfoil.deploy.faults import as_refusal
from queryfoil.deploy.limits import CLIENT, Gate, Limits, too_large, too_long, too_slow
from queryfoil.deploy.metrics import Metrics
from queryfoil.deploy.tensors import RefusedError, short
from queryfoil.deploy.tokens import Tokens

OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # for probes, which have no token
RETRY = 1  # seconds after which a client may ask a busy server again


class GoneError(Exception):
    """The client went away before its request was complete."""


class Guard:
    """An ASGI application around another: whoever is not let through gets a reason as JSON, {"error": reason}.

    What gives an answer is limited in number and time, and its body is read here, up to the limit.
    """

    def __init__(self, app: ASGIApp, limits: Limits, tokens: Tokens | None, gate: Gate, metrics: Metrics) -> None:
        self.app, self.limits, self.tokens, self.gate, self.metrics = app, limits, tokens, gate, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope["app"] = self.app  # so that unknown routes are raised, not answered
        reply, start = Reply(send), time.perf_counter()
        try:
            await self._let(scope, receive, reply)
        except GoneError:
            self.metrics.refused.labels("http", "gone").inc()
        except Exception as error:
            await reply.refuse(as_refusal(error))
        if reply.kind:
            self.metrics.refused.labels("http", reply.kind).inc()
        if reply.status:
            self.metrics.requests.labels("http", reply.status).inc()
        if scope["method"] == "POST":
            self.metrics.seconds.labels("http").observe(time.perf_counter() - start)
        return None

    async def _let(self, scope: Scope, receive: Receive, reply: "Reply") -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        name = None
        if self.tokens is not None and scope["path"] not in OPEN:
            name = self.tokens.name(headers.get(b"authorization"))
        CLIENT.set(name or (scope["client"] or ("unknown",))[0])
        if scope["method"] != "POST":
            return await self.app(scope, receive, reply)
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            raise RefusedError("encoding", "expected the request as it is, but got "
                               f"content-encoding {short(headers[b'content-encoding'])}")  # fmt: skip
        end = asyncio.get_running_loop().time() + self.limits.timeout
        with self.gate(), self.metrics.running.track_inprogress():
            try:
                async with asyncio.timeout_at(end):
                    body = await self._body(headers, receive)
            except TimeoutError:
                raise too_slow(self.limits.timeout) from None
            try:
                async with asyncio.timeout_at(end):
                    await self.app(scope, replay(body, receive), reply)
            except TimeoutError:  # a client that does not take its answer just loses the connection
                raise too_long(self.limits.timeout) from None

    async def _body(self, headers: dict[bytes, str], receive: Receive) -> bytes:
        """The whole body; RefusedError as soon as it is too large, or says that it will be."""
        length = headers.get(b"content-length", "0")  # of digits, or the HTTP server would not have taken it
        if int(length) > self.limits.max_body:
            raise too_large(self.limits.max_body, int(length))
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise GoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limits.max_body:
                raise too_large(self.limits.max_body)
            if not message.get("more_body", False):
                return b"".join(parts)


class Reply:
    """The way back to a client; remembers the status, and whether a refusal can still be sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.kind: str | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def refuse(self, refusal: RefusedError) -> None:
        """Send a reason; nothing if an answer is already on its way, which ends the connection."""
        self.kind = refusal.kind
        if self.status is not None:
            return
        body, headers = refused(refusal)
        await self({"type": "http.response.start", "status": refusal.status,
                    "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})  # fmt: skip
        await self({"type": "http.response.body", "body": body})


def refused(refusal: RefusedError) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a refusal."""
    body = orjson.dumps({"error": refusal.reason})
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    if refusal.status == 503:
        headers["retry-after"] = str(RETRY)
    if refusal.kind == "token":
        headers["www-authenticate"] = "Bearer"
    return body, headers


def replay(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, as if it were still to come."""
    left = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return again


class _Flow(FlowControl):
    """Reads no more while a whole request is in hand: uvicorn would store what a client sends ahead without end."""

    def __init__(self, protocol: H11Protocol, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._protocol = protocol

    def resume_reading(self) -> None:
        if self._protocol.conn.their_state is not h11.DONE:
            super().resume_reading()


class Patient(H11Protocol):
    """HTTP/1.1 that gives a client `patience` seconds for the head of a request, and for taking what it is sent."""

    patience = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        self.flow = _Flow(self, self.transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.patience, self.transport.abort)  # if it does not take the rest by then

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._taking):
            if timer is not None:
                timer.cancel()

    def _watch(self) -> None:
        """Let the time run while the head of a request is to come."""
        if not (self.cycle is None or self.cycle.response_complete) and self._head is not None:
            self._head.cancel()
            self._head = None
        elif self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._head = self.loop.call_later(self.patience, self.transport.abort)


def patient(seconds: float) -> type[Patient]:
    """The protocol with that patience."""
    return type("Patient", (Patient,), {"patience": seconds})
