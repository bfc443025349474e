"""A model behind a line as a callable: in batches, at a rate, within a budget, asked again where that may help."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from queryfoil.checks import require, require_positive, require_whole
from queryfoil.deploy.endpoint import Address, BatchError, BusyError, Described, EndpointError, is_url
from queryfoil.deploy.ledger import Ledger
from queryfoil.models.victim import Victim

FIRST, LONGEST = 0.5, 30.0  # seconds before a request is sent again; doubled each time
LONG = 5.0  # seconds of a pause that is told
BATCH = 32  # what `queryfoil serve` takes unless told otherwise
RATE = 100.0  # images a second unless told otherwise, but on this machine
Answer = TypeVar("Answer")


class Line(Protocol):
    """The way to a model: images (n, C, H, W) to scores (n, K), or `BusyError`, `BatchError`, `EndpointError`."""

    def ask(self, images: NDArray[Any]) -> NDArray[Any]: ...
    def close(self) -> None: ...


class Served(Line, Protocol):
    """The way to an endpoint, which says what its model is."""

    def describe(self) -> Described: ...


@dataclass(frozen=True)
class Limits:
    """How a model is asked.

    batch: most images a request; None for as many as there are. rate: images a second, requests: requests a second;
    None for no limit. patience: seconds for which a request is sent again and again. timeout: seconds for an answer.
    """

    batch: int | None = BATCH
    rate: float | None = None
    requests: float | None = None
    patience: float = 120.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.batch is not None:
            require_whole("batch", self.batch)
        for name in ("rate", "requests", "timeout"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        require("patience", self.patience, ">= 0", lambda value: value >= 0)

    @classmethod
    def of(
        cls,
        model: str,
        *,
        batch: int | None = None,
        rate: float | None = None,
        requests: float | None = None,
        patience: float = 120.0,
        timeout: float = 60.0,
    ) -> "Limits":
        """Limits that fit a model, a URL or `module:function`; 0 is no limit, and None what is usual.

        Usual are `BATCH` images a request to an endpoint, and `RATE` images a second but to one on this machine.

        >>> Limits.of("https://shop.example/v2/models/a").rate, Limits.of("grpc://127.0.0.1:8081/a").rate
        (100.0, None)
        """
        address = Address.parse(model) if is_url(model) else None
        if batch is None and address is not None:
            batch = BATCH
        if rate is None and not (address is not None and address.loopback):
            rate = RATE
        return cls(batch, rate or None, requests or None, patience, timeout)

    def seconds(self, images: int) -> float | None:
        """The least time for so many images in full batches; None without a limit."""
        paces = [images / self.rate] if self.rate else []
        paces += [images / (self.batch or 1) / self.requests] if self.requests else []
        return max(paces) if paces else None


class Remote:
    """Images (N, C, H, W) in [0, 1] to scores (N, K), of a model that is asked over a line.

    `output` and `deterministic` say what the scores are, as for any model.

    Every image that is sent is in the ledger, those of requests that are sent again too. A request that is refused as
    it is (400, 413) is sent in smaller ones from then on. EndpointError where there is no answer: at once if there
    never was a connection, or the request is at fault; after `patience` if the endpoint is busy or gone. Long pauses
    give a warning.
    """

    def __init__(
        self,
        line: Line,
        ledger: Ledger,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.line, self.ledger, self.limits = line, ledger, limits
        self.clock, self.sleep = clock, sleep
        self.batch, self.bytes = limits.batch, False
        self.deterministic = True
        self.output = "logits"
        self._free = 0.0  # when the next request may be sent
        self._reached = False

    def describe(self, line: Served) -> Described:
        """What the endpoint at the end of the line says of its model; sends no image."""
        told = self._patiently(0, line.describe)
        self.bytes = told.datatype == "UINT8"
        return told

    def __call__(self, x: Tensor) -> Tensor:
        """Scores (N, K) of images (N, C, H, W)."""
        images = x.detach().cpu().float()
        sent = (images * 255).round().to(torch.uint8).numpy() if self.bytes else images.numpy()
        parts: list[NDArray[Any]] = []
        start = 0
        while start < len(sent):
            part = sent[start : start + (self.batch or len(sent))]
            try:
                parts.append(self._scores(part))
            except BatchError as error:
                if len(part) == 1:
                    raise
                self.batch = min(error.most or len(part) // 2, len(part) - 1)
                continue
            start += len(part)
        if len({part.shape[1] for part in parts}) > 1:
            raise EndpointError(
                "expected as many scores for each image, but their number changes from answer to answer"
            )
        return torch.from_numpy(np.concatenate(parts)).to(x.device)

    def _scores(self, part: NDArray[Any]) -> NDArray[Any]:
        scores = self._patiently(len(part), lambda: self.line.ask(part))
        if scores.ndim != 2 or len(scores) != len(part) or scores.dtype.kind not in "fiu":
            raise EndpointError(
                f"expected scores ({len(part)}, K) for {len(part)} images, but got {scores.dtype} {scores.shape}"
            )
        return scores if scores.dtype == np.float64 else scores.astype(np.float32)

    def _patiently(self, n: int, call: Callable[[], Answer]) -> Answer:
        """The answer to a request of n images, asked for until it comes or patience ends."""
        since: float | None = None
        delay = FIRST
        while True:
            self._in_turn(n)
            if n:
                self.ledger.take(n)
            try:
                answer = call()
            except BusyError as error:
                if n and not error.sent:
                    self.ledger.give_back(n)
                if not (error.connected or self._reached):
                    raise EndpointError(f"there is no connection to the endpoint: {error}") from None
                since = self.clock() if since is None else since
                wait = max(delay, error.wait)
                if self.clock() + wait - since > self.limits.patience:
                    later = f"; it wants to be asked again in {error.wait:g} s" if error.wait > delay else ""
                    raise EndpointError(
                        f"the endpoint gave no answer within {self.limits.patience:g} s (--patience): {error}{later}"
                    ) from None
                if wait >= LONG:
                    warnings.warn(f"{error}; asking again in {wait:g} s", stacklevel=2)
                self.sleep(wait)
                delay = min(2 * delay, LONGEST)
            else:
                self._reached = True
                return answer

    def _in_turn(self, n: int) -> None:
        """Wait until the rate allows the next request, of n images."""
        now = self.clock()
        if self._free > now:
            self.sleep(self._free - now)
        gaps = [n / self.limits.rate] if self.limits.rate else []
        gaps += [1 / self.limits.requests] if self.limits.requests else []
        self._free = max(self._free, now) + max(gaps, default=0.0)


class Own:
    """The line to a function of yours; its ConnectionError or TimeoutError is taken for a busy endpoint."""

    def __init__(self, model: Victim) -> None:
        self.model = model

    def ask(self, images: NDArray[Any]) -> NDArray[Any]:
        """Scores (n, K) of images (n, C, H, W)."""
        try:
            scores = self.model(torch.from_numpy(images))
        except (ConnectionError, TimeoutError) as error:
            raise BusyError(f"{type(error).__name__} {error}") from None
        if not isinstance(scores, Tensor):
            raise EndpointError(f"expected scores as a tensor from the function, but got {type(scores).__name__}")
        found: NDArray[Any] = scores.detach().cpu().numpy()
        return found

    def close(self) -> None:
        """Nothing to close."""


def line(address: Address, token: str | None, timeout: float, authorities: Path | None = None) -> Served:
    """The line to an address; ValueError that says what to install where its client is missing.

    authorities: a file with the certificates (PEM) to trust instead of the usual ones.
    """
    try:
        if address.over_http:
            from queryfoil.deploy.line_http import HTTPLine

            return HTTPLine(address, token, timeout, authorities)
        from queryfoil.deploy.line_grpc import GRPCLine

        return GRPCLine(address, token, timeout, authorities)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"an audit of an endpoint needs the package {error.name}, which is not installed; install queryfoil[audit]"
        ) from None
    except RuntimeError as error:  # of tritonclient, where it is installed without this protocol
        raise ValueError(f"an audit of an endpoint needs more: {error}; install queryfoil[audit]") from None
