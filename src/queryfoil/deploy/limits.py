"""What a client may do: how much, how many at once, for how long, and who. The same for HTTP and gRPC."""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from queryfoil.checks import require_positive, require_whole
from queryfoil.deploy.served import About
from queryfoil.deploy.tensors import RefusedError

CLIENT: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="unknown")
"""Who asks, as the query log tells: the name of a token, or an address. Set by the server for each request."""

PER_VALUE = 24  # bytes that a number may need as JSON
JSON_FRAME = 64 * 1024  # and all else in a request
MOST_BODY = 64 * 1024 * 1024  # largest body unless asked for more


@dataclass(frozen=True)
class Limits:
    """Limits of one process of the server.

    max_body: bytes of a request. max_batch: images in a request. max_concurrent: inference requests in hand.
    timeout: seconds for a request to come in whole, and for it to be answered.
    """

    max_body: int
    max_batch: int = 32
    max_concurrent: int = 64
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body", "max_batch", "max_concurrent"):
            require_whole(name, getattr(self, name))
        require_positive("timeout", self.timeout)

    @classmethod
    def of(cls, about: About, *, max_body: int | None, max_batch: int, max_concurrent: int, timeout: float) -> "Limits":
        """Limits that fit a model: by default a body may hold a full batch as JSON, up to 64 MiB.

        ValueError if a full batch would not fit in the body, even as bytes.

        >>> about = About(version="1", defense=None, input="images", input_shape=(3, 32, 32), classes=2, output="probs")
        >>> Limits.of(about, max_body=None, max_batch=32, max_concurrent=64, timeout=30.0).max_body
        2424832
        """
        require_whole("max_batch", max_batch)
        if max_body is None:
            max_body = min(max_batch * about.values * PER_VALUE + JSON_FRAME, MOST_BODY)
        found = cls(max_body, max_batch, max_concurrent, timeout)
        needed = max_batch * about.values * 4 + 1024
        if needed > max_body:
            raise ValueError(
                f"{max_batch} images need {needed:,} bytes as a binary tensor, but a request may have {max_body:,}; "
                "raise the size of requests (--max-body) or lower the batch (--max-batch)"
            )
        return found


class Gate:
    """Lets `most` requests in at once and refuses the others."""

    def __init__(self, most: int) -> None:
        self.most, self.inside = most, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Be inside; RefusedError if there is no room. For use in one event loop."""
        if self.inside >= self.most:
            raise RefusedError("busy", f"the service has {self.most} requests in hand, as many as it takes; try again")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def too_long(timeout: float) -> RefusedError:
    """A request that could not be answered in time."""
    return RefusedError("time", f"the service could not answer within {timeout:g} s; try again, or send fewer images")


def too_slow(timeout: float) -> RefusedError:
    """A request that did not come in time."""
    return RefusedError("slow", f"the request did not come in whole within {timeout:g} s")


def too_large(most: int, got: int | None = None) -> RefusedError:
    """A request with too many bytes, or with a length that says so."""
    return RefusedError("size", f"expected a request of at most {most} bytes, but got {'more' if got is None else got}")
