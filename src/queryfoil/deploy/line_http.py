"""The line to an endpoint over HTTP: httpx carries what tritonclient writes and reads."""

import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from queryfoil.deploy.endpoint import Address, BatchError, BusyError, Described, EndpointError, check_trust, refused

BINARY = "binary_tensor_data"  # extension of the protocol
LENGTH = "Inference-Header-Content-Length"
AGAIN = (408, 429, 502, 503, 504)
"""Statuses after which the same request may be answered."""
REASON = 300  # characters of an endpoint's own words that are shown


class HTTPLine:
    """Asks a model over HTTP, in bytes where the server offers the extension for binary tensors, else in JSON.

    Nothing but the address is asked: redirects are not followed, and this machine is not asked through a proxy.
    """

    def __init__(self, address: Address, token: str | None, timeout: float, authorities: Path | None = None) -> None:
        headers = {"accept-encoding": "identity"} | ({} if token is None else {"authorization": f"Bearer {token}"})
        self.address, self.token, self.authorities = address, token, authorities
        verify = True if authorities is None else ssl.create_default_context(cafile=authorities)
        self.client = httpx.Client(headers=headers, timeout=timeout, trust_env=not address.loopback, verify=verify)
        self.binary = False

    def describe(self) -> Described:
        """What the server says of the model."""
        told = self._json(self._send("GET", str(self.address)))
        server = self._send("GET", self.address.server, optional=True)
        extensions = self._json(server).get("extensions") if server.is_success else None
        self.binary = isinstance(extensions, list) and BINARY in extensions
        self.described = Described.of(told)
        return self.described

    def ask(self, images: NDArray[Any]) -> NDArray[Any]:
        """Scores (n, K) of images (n, C, H, W) in the model's datatype."""
        given = InferInput(self.described.input, list(images.shape), self.described.datatype)
        given.set_data_from_numpy(images, binary_data=self.binary)
        wanted = InferRequestedOutput(self.described.output, binary_data=self.binary)
        body, length = InferenceServerClient.generate_request_body([given], outputs=[wanted])
        headers = {"content-type": "application/octet-stream" if length else "application/json"}
        headers |= {LENGTH: str(length)} if length else {}
        answer = self._send("POST", f"{self.address}/infer", content=body, headers=headers)
        return self._scores(answer)

    def _scores(self, answer: httpx.Response) -> NDArray[Any]:
        size = answer.headers.get(LENGTH)
        try:
            result = InferenceServerClient.parse_response_body(
                answer.content, header_length=None if size is None else int(size)
            )
            scores = result.as_numpy(self.described.output)
        except Exception as error:  # of JSON, shapes, lengths and types, each of its own kind
            raise EndpointError(
                f"the answer of {self.address} is not as the protocol has it: {type(error).__name__}"
            ) from None
        if scores is None:
            raise EndpointError(f"the answer of {self.address} has no output {self.described.output!r}")
        found: NDArray[Any] = np.asarray(scores)
        return found

    def _send(self, method: str, url: str, optional: bool = False, **request: Any) -> httpx.Response:
        """An answer, a success unless it is `optional`."""
        try:
            answer = self.client.request(method, url, **request)
        except httpx.PoolTimeout as error:
            raise BusyError(_named(error), sent=False) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            check_trust(self.address, str(error), self.authorities is not None)
            raise BusyError(_named(error), sent=False, connected=False) from None
        except httpx.TransportError as error:
            raise BusyError(_named(error)) from None
        except httpx.HTTPError as error:
            raise EndpointError(f"{self.address}: {_named(error)}") from None
        if answer.is_success or (optional and answer.status_code not in AGAIN):
            return answer
        return self._failed(answer)

    def _failed(self, answer: httpx.Response) -> httpx.Response:
        status, reason = answer.status_code, f"it answered {answer.status_code}: {_reason(answer)}"
        if status in AGAIN:
            raise BusyError(reason, wait=_seconds(answer.headers.get("retry-after")))
        if status in (401, 403):
            raise EndpointError(refused(self.address, self.token, reason))
        if status in (400, 413):
            raise BatchError(f"{self.address}: {reason}")
        if answer.is_redirect:
            raise EndpointError(f"{self.address} redirects to {answer.headers.get('location')}; give that URL instead")
        raise EndpointError(f"{self.address}: {reason}")

    def _json(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            told = answer.json()
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise EndpointError(f"the answer of {answer.url} is not as the Open Inference Protocol has it")
        return told

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


def _named(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__} {error}".strip()


def _reason(answer: httpx.Response) -> str:
    try:
        found = answer.json()["error"]
    except (ValueError, TypeError, KeyError):
        found = answer.text
    return " ".join(str(found).split())[:REASON] or answer.reason_phrase


def _seconds(header: str | None) -> float:
    """Seconds of a header Retry-After, a number or a date; 0 where it says nothing.

    >>> _seconds("3"), _seconds(None), _seconds("Thu, 01 Jan 1970 00:00:00 GMT")
    (3.0, 0.0, 0.0)
    """
    text = (header or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max((date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
