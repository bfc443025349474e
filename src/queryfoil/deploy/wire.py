"""The Open Inference Protocol over HTTP: a request's bytes to tensors, an answer's scores to bytes.

JSON, and the extension for binary tensors: the header Inference-Header-Content-Length gives the length of the JSON, the
tensors follow it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from queryfoil.deploy.served import OUTPUT, About
from queryfoil.deploy.tensors import RefusedError, Sent, short

JSON_LENGTH = "inference-header-content-length"
MANY = 16  # tensors of a request, and dimensions of one, that are looked at
SPARE = 64  # objects, lists and commas of a request beside those of its data
UNSUPPORTED = ("classification", "shared_memory_region")  # parameters that would change what an answer is


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Input(_Strict):
    name: str
    shape: list[int] = Field(max_length=MANY)
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class _Output(_Strict):
    name: str
    parameters: dict[str, Any] | None = None


class _Request(_Strict):
    id: str | None = Field(default=None, max_length=256)
    inputs: list[_Input] = Field(max_length=MANY)
    outputs: list[_Output] | None = Field(default=None, max_length=MANY)
    parameters: dict[str, Any] | None = None


@dataclass(frozen=True)
class Room:
    """How much JSON may hold, so that a few megabytes of brackets do not become gigabytes of objects."""

    images: int
    numbers: int
    lists: int

    @classmethod
    def of(cls, about: About, max_batch: int) -> "Room":
        """Room for a full batch, nested by its shape."""
        channels, height, _ = about.input_shape
        return cls(max_batch, max_batch * about.values, max_batch * (1 + channels * (1 + height)))

    def check(self, text: bytes) -> None:
        """RefusedError for JSON that holds more, before it is read."""
        if text.count(b",") > self.numbers + SPARE:
            raise RefusedError(
                "batch", f"expected at most {self.images} images in a request, {self.numbers} numbers, but got more"
            )
        if text.count(b"[") > self.lists + SPARE or text.count(b"{") > SPARE:
            raise RefusedError("format", "expected a request with fewer lists and objects")


@dataclass(frozen=True)
class Asked:
    """What a request asks for: its tensors, its id, and whether the scores are to come as bytes."""

    sent: tuple[Sent, ...]
    id: str | None
    binary: bool


def decode(body: bytes, json_length: str | None, room: Room) -> Asked:
    """A request's bytes as what it asks for; RefusedError where they are no such request. Values are not looked at.

    >>> body = b'{"inputs": [{"name": "images", "shape": [1], "datatype": "UINT8", "data": [7]}]}'
    >>> decode(body, None, Room(1, 1, 1)).sent[0].values
    [7]
    """
    length = len(body) if json_length is None else _length(json_length, len(body))
    text = body[:length]
    room.check(text)
    try:
        found = _Request.model_validate(orjson.loads(text))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = short(".".join(map(str, first["loc"])) or "the body")
        raise RefusedError(
            "format", f"expected a request of the Open Inference Protocol, but {where}: {first['msg']}"
        ) from None
    except orjson.JSONDecodeError as error:
        raise RefusedError("format", f"expected the request as JSON, but got: {error}") from None
    sent, position = [], length
    for one in found.inputs:
        values, size = _values(one, body, position, json_length is not None)
        sent.append(Sent(one.name, one.datatype, one.shape, values))
        position += size
    if position != len(body):
        raise RefusedError("length", f"expected {position} bytes, JSON and tensors, but got {len(body)}")
    return Asked(tuple(sent), found.id, _binary(found))


def _length(header: str, most: int) -> int:
    if not (header.isascii() and header.isdigit() and len(header) < 20 and int(header) <= most):
        raise RefusedError(
            "length",
            f"expected {JSON_LENGTH} as the number of bytes of the JSON, at most {most}, but got {short(header)}",
        )
    return int(header)


def _values(one: _Input, body: bytes, position: int, has_length: bool) -> tuple[bytes | list[Any], int]:
    """An input's values, and how many of the bytes behind the JSON they are."""
    parameters = one.parameters or {}
    _check_parameters(parameters)
    if "binary_data_size" not in parameters:
        if one.data is None:
            raise RefusedError(
                "format", f"expected data or binary_data_size for input {short(one.name)}, but got neither"
            )
        return one.data, 0
    size = parameters["binary_data_size"]
    if one.data is not None:
        raise RefusedError("format", f"expected data or binary_data_size for input {short(one.name)}, but got both")
    if not has_length:
        raise RefusedError("length", f"expected the header {JSON_LENGTH} with binary tensors, but got none")
    if type(size) is not int or not 0 <= size <= len(body) - position:
        raise RefusedError(
            "length",
            f"expected binary_data_size as a number of bytes, at most the {len(body) - position} that are left, but "
            f"got {short(size)}",
        )
    return body[position : position + size], size


def _binary(found: _Request) -> bool:
    """Whether the scores are to come as bytes."""
    wanted = bool((found.parameters or {}).get("binary_data_output", False))
    _check_parameters(found.parameters or {})
    check_outputs([one.name for one in found.outputs or []])
    for one in found.outputs or []:
        _check_parameters(one.parameters or {})
        wanted = bool((one.parameters or {}).get("binary_data", False))
    return wanted


def check_outputs(names: list[str]) -> None:
    """RefusedError if a request wants anything but the scores, once."""
    if names not in ([], [OUTPUT]):
        raise RefusedError("name", f"expected no outputs, or one, {OUTPUT!r}, but got {short(', '.join(names))}")


def _check_parameters(parameters: dict[str, Any]) -> None:
    for name in UNSUPPORTED:
        if name in parameters:
            raise RefusedError("format", f"the parameter {name} is not supported; leave it out")


def encode(scores: NDArray[np.float32], model: str, id: str | None, binary: bool) -> tuple[bytes, int | None]:
    """An answer as bytes, and, for one with a binary tensor, how many of them are JSON.

    >>> encode(np.array([[0.25, 0.75]], np.float32), "model", None, False)[0]
    b'{"model_name":"model","outputs":[{"name":"scores","shape":[1,2],"datatype":"FP32","data":[0.25,0.75]}]}'
    """
    output: dict[str, Any] = {"name": OUTPUT, "shape": list(scores.shape), "datatype": "FP32"}
    scores = np.ascontiguousarray(scores, dtype="<f4")
    if binary:
        output["parameters"] = {"binary_data_size": scores.nbytes}
    else:
        output["data"] = scores.ravel()
    answer = {"model_name": model, **({} if id is None else {"id": id}), "outputs": [output]}
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return (text + scores.tobytes(), len(text)) if binary else (text, None)
