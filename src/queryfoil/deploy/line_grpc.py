"""The line to an endpoint over gRPC: tritonclient."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from queryfoil.deploy.endpoint import Address, BatchError, BusyError, Described, EndpointError, check_trust, refused

AGAIN = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED")
TOO_LARGE = re.compile(r"bytes|larger than max")  # in what is said with RESOURCE_EXHAUSTED, which also means busy
NO_CONNECTION = "failed to connect"


class GRPCLine:
    """Asks a model over gRPC. This machine is not asked through a proxy.

    The client is imported here and not with the module: its messages have the names of KServe's, and a process can
    have either.
    """

    def __init__(self, address: Address, token: str | None, timeout: float, authorities: Path | None = None) -> None:
        from tritonclient import grpc as triton

        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        options += [("grpc.enable_http_proxy", 0)] if address.loopback else []
        self.address, self.token, self.timeout, self.authorities = address, token, timeout, authorities
        self.headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self.triton = triton
        self.client = triton.InferenceServerClient(
            address.place,
            ssl=address.scheme == "grpcs",
            root_certificates=None if authorities is None else str(authorities),
            channel_args=options,
        )

    def describe(self) -> Described:
        """What the server says of the model; gRPC has no place for the kind of scores."""
        found = self._call(self.client.get_model_metadata, self.address.model, self.address.version)
        parts = {
            side: [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in tensors]
            for side, tensors in (("inputs", found.inputs), ("outputs", found.outputs))
        }
        told = {"name": found.name, "versions": list(found.versions), "platform": found.platform, **parts}
        self.described = Described.of(told)
        return self.described

    def ask(self, images: NDArray[Any]) -> NDArray[Any]:
        """Scores (n, K) of images (n, C, H, W) in the model's datatype."""
        given = self.triton.InferInput(self.described.input, list(images.shape), self.described.datatype)
        given.set_data_from_numpy(images)
        wanted = [self.triton.InferRequestedOutput(self.described.output)]
        answer = self._call(self.client.infer, self.address.model, [given], self.address.version, outputs=wanted)
        try:
            scores = answer.as_numpy(self.described.output)
        except (ValueError, TypeError) as error:
            raise EndpointError(f"the answer of {self.address} is not as the protocol has it: {error}") from None
        if scores is None:
            raise EndpointError(f"the answer of {self.address} has no output {self.described.output!r}")
        found: NDArray[Any] = np.asarray(scores)
        return found

    def _call(self, call: Any, *values: Any, **named: Any) -> Any:
        try:
            return call(*values, headers=self.headers, client_timeout=self.timeout, **named)
        except InferenceServerException as error:
            status, reason = (error.status() or "").rpartition(".")[2], error.message() or "no reason given"
        text = f"it answered {status}: {reason}"
        if status == "RESOURCE_EXHAUSTED" and TOO_LARGE.search(reason):
            raise BatchError(f"{self.address}: {text}")
        check_trust(self.address, text, self.authorities is not None)
        if status in AGAIN:
            lost = status == "UNAVAILABLE" and NO_CONNECTION in reason.lower()
            raise BusyError(text, sent=not lost, connected=not lost)
        if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise EndpointError(refused(self.address, self.token, text))
        if status == "INVALID_ARGUMENT":
            raise BatchError(f"{self.address}: {text}")
        raise EndpointError(f"{self.address}: {text}")

    def close(self) -> None:
        """Close the connection."""
        self.client.close()
