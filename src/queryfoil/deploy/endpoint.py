"""An endpoint of the Open Inference Protocol for a client: where it is, what it says of itself, how it fails."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SCHEMES = ("http", "https", "grpc", "grpcs")
EXAMPLES = "http://127.0.0.1:8080/v2/models/NAME or grpc://127.0.0.1:8081/NAME"
HTTP_PATH = re.compile(r"(?P<base>/.*?)?/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?(?:/infer)?/?")
GRPC_PATH = re.compile(r"(?P<base>)/(?P<model>[^/]+)(?:/(?P<version>[^/]+))?/?")
OUTPUTS = ("logits", "log_probs", "probs")
DATATYPES = ("FP32", "UINT8")
UNTRUSTED = re.compile("certificate_verify_failed|verification check failed", re.IGNORECASE)  # as both clients say


class EndpointError(ConnectionError):
    """An endpoint does not answer, or not as it should; asking again would not help."""


class BatchError(EndpointError):
    """A request was refused, maybe for its size; `most` is how many images it may have, where the reason says so."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        found = re.search(r"at most (\d+) images", reason)
        self.most = int(found[1]) if found else None


class BusyError(Exception):
    """No answer this time: overload, a lost connection, no answer in time.

    wait: seconds after which the endpoint wants to be asked again. sent: whether images may have reached it.
    connected: whether there was a connection at all.
    """

    def __init__(self, reason: str, wait: float = 0.0, sent: bool = True, connected: bool = True) -> None:
        super().__init__(reason)
        self.wait, self.sent, self.connected = wait, sent, connected


def is_url(spec: str) -> bool:
    """Whether a model is given as the address of an endpoint.

    >>> is_url("http://127.0.0.1:8080/v2/models/a"), is_url("shop:model")
    (True, False)
    """
    return "://" in spec


@dataclass(frozen=True)
class Address:
    """Where a model is served: scheme, host, port (None: the scheme's), path before /v2, name and version.

    >>> str(Address.parse("HTTP://localhost:8080/v2/models/clothes/infer"))
    'http://localhost:8080/v2/models/clothes'
    """

    scheme: str
    host: str
    port: int | None
    base: str
    model: str
    version: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Read a URL; ValueError that says what is wrong with it."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"expected a URL such as {EXAMPLES}, but got {url!r}: {error}") from None
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError(
                f"expected a URL such as {EXAMPLES}, without user, password, query and fragment; a token comes in the "
                "environment or a file"
            )
        if parts.scheme not in SCHEMES or not host:
            raise ValueError(f"expected a URL with {', '.join(SCHEMES)}, such as {EXAMPLES}, but got {url!r}")
        path = HTTP_PATH if parts.scheme.startswith("http") else GRPC_PATH
        found = path.fullmatch(parts.path)
        if found is None or "=" in parts.path:
            raise ValueError(f"expected a URL that names a model, such as {EXAMPLES}, but got {url!r}")
        if path is GRPC_PATH and port is None:
            raise ValueError(f"expected a URL with the port of gRPC, such as {EXAMPLES}, but got {url!r}")
        return cls(parts.scheme, host, port, found["base"] or "", found["model"], found["version"] or "")

    @property
    def over_http(self) -> bool:
        """HTTP, or else gRPC."""
        return self.scheme.startswith("http")

    @property
    def encrypted(self) -> bool:
        """Whether others on the way cannot read along."""
        return self.scheme in ("https", "grpcs")

    @property
    def loopback(self) -> bool:
        """Whether it is on this machine, by its address: 127.0.0.0/8, ::1, localhost."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def place(self) -> str:
        """Host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def server(self) -> str:
        """URL of the server's own description, over HTTP."""
        return f"{self.scheme}://{self.place}{self.base}/v2"

    def __str__(self) -> str:
        if self.over_http:
            return f"{self.server}/models/{self.model}" + (f"/versions/{self.version}" if self.version else "")
        return f"{self.scheme}://{self.place}/{self.model}" + (f"/{self.version}" if self.version else "")


@dataclass(frozen=True)
class Described:
    """What an endpoint says of a model: its input and output, and the kind of scores (None: it does not say)."""

    input: str
    datatype: str
    shape: tuple[int, ...]  # of an image, -1 for any size
    output: str
    kind: str | None
    told: dict[str, Any]

    @classmethod
    def of(cls, told: dict[str, Any]) -> "Described":
        """From the protocol's metadata; EndpointError for a model that does not map images to scores."""
        try:
            inputs, outputs = told["inputs"], told["outputs"]
            shapes = [[int(size) for size in one["shape"]] for one in inputs]
            names = [[str(one["name"]) for one in some] for some in (inputs, outputs)]
            types = [str(one["datatype"]) for one in inputs]
        except (KeyError, TypeError, ValueError):
            raise EndpointError("the metadata of the model is not as the Open Inference Protocol has it") from None
        if len(inputs) != 1 or len(outputs) != 1:
            raise EndpointError(
                f"expected a model with one input and one output, but it has {', '.join(names[0]) or 'none'} and "
                f"{', '.join(names[1]) or 'none'}; audit a function of yours (module:function) that asks it"
            )
        if types[0] not in DATATYPES or len(shapes[0]) != 4:
            raise EndpointError(
                f"expected images (N, C, H, W), {' or '.join(DATATYPES)}, but the model takes {types[0]} {shapes[0]}; "
                "audit a function of yours (module:function) that asks it"
            )
        kind = (told.get("properties") or {}).get("output")
        return cls(names[0][0], types[0], tuple(shapes[0][1:]), names[1][0], kind if kind in OUTPUTS else None, told)

    def check(self, shape: tuple[int, ...]) -> None:
        """ValueError for images (C, H, W) that the model does not take."""
        if any(size > 0 and size != got for size, got in zip(self.shape, shape, strict=True)):
            raise ValueError(
                f"expected images {self.shape}, as the model takes them, but got {tuple(shape)}; choose other images, "
                "or let them be resized by --size"
            )


def check_trust(address: Address, reason: str, given: bool) -> None:
    """EndpointError where a connection failed as the certificate is not trusted; `given`: whether authorities were."""
    if not UNTRUSTED.search(reason):
        return
    hint = "--ca-file has no authority that vouches for it, or it is out of date or of another host"
    if not given:
        hint = "if it is of an authority of your own, pass its certificate by --ca-file"
    raise EndpointError(f"the certificate of {address.place} is not trusted ({reason}); {hint}")


def refused(address: Address, token: str | None, reason: str) -> str:
    """What to say where a token is wrong or missing."""
    if token is None:
        return f"{address} wants a token: set QUERYFOIL_TOKEN or pass --token-file ({reason})"
    return f"{address} refuses this token ({reason})"
