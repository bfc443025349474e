"""Images from a request, checked before the model sees them; what is refused, and why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from queryfoil.deploy.served import INPUT, About

STATUS = {
    "format": 400,
    "name": 400,
    "datatype": 400,
    "shape": 400,
    "batch": 400,
    "length": 400,
    "finite": 400,
    "range": 400,
    "token": 401,
    "route": 404,
    "method": 405,
    "slow": 408,
    "size": 413,
    "encoding": 415,
    "scores": 422,
    "internal": 500,
    "busy": 503,
    "time": 503,
}
"""Why a request is refused, and the HTTP status that says so. `internal` is a fault of ours, `busy` and `time` are
overload, all others are the client's to mend."""

DATATYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
SHORTEST = 60  # characters of a client's own words that a reason repeats


class RefusedError(ValueError):
    """A request that gets no answer: its `kind`, one of `STATUS`, and a reason for the client.

    >>> RefusedError("size", "expected at most 10 bytes").status
    413
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.status = kind, reason, STATUS[kind]


@dataclass(frozen=True)
class Sent:
    """A tensor as a client sent it: bytes, a list of numbers (flat, or nested by the shape), or an array."""

    name: str
    datatype: str
    shape: Sequence[int]
    values: bytes | list[object] | NDArray[Any]


def images(sent: Sequence[Sent], about: About, max_batch: int) -> NDArray[np.float32]:
    """The images (N, C, H, W) in [0, 1] of a request; RefusedError if they are not as the model takes them.

    FP32 is taken as it is, UINT8 divided by 255.

    >>> from queryfoil.deploy.served import About
    >>> about = About(version="1", defense=None, input="images", input_shape=(1, 1, 2), classes=2, output="probs")
    >>> images([Sent("images", "UINT8", [1, 1, 1, 2], [0, 255])], about, max_batch=4)
    array([[[[0., 1.]]]], dtype=float32)
    >>> images([Sent("images", "FP32", [1, 1, 1, 2], [0, 255])], about, max_batch=4)
    Traceback (most recent call last):
    queryfoil.deploy.tensors.RefusedError: expected images with values in [0, 1], but got values from 0 to 255
    """
    if len(sent) != 1 or sent[0].name != INPUT:
        names = ", ".join(short(one.name) for one in sent[:4]) or "none"
        raise RefusedError("name", f"expected one input, {INPUT!r}, but got {names}{', ...' if len(sent) > 4 else ''}")
    one = sent[0]
    if one.datatype not in DATATYPES:
        raise RefusedError("datatype", f"expected images as FP32 or UINT8, but got {short(one.datatype)}")
    wanted = ", ".join(map(str, about.input_shape))
    if len(one.shape) != 4 or tuple(one.shape[1:]) != about.input_shape or one.shape[0] < 1:
        raise RefusedError("shape", f"expected images of shape (N, {wanted}), N >= 1, but got {short(list(one.shape))}")
    if one.shape[0] > max_batch:
        raise RefusedError("batch", f"expected at most {max_batch} images in a request, but got {one.shape[0]}")
    values = _values(one)
    if one.datatype == "UINT8":
        return values.astype(np.float32) / np.float32(255)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise RefusedError("finite", "expected images of finite values, but got NaN or infinite ones")
    if low < 0 or high > 1:
        raise RefusedError("range", f"expected images with values in [0, 1], but got values from {low:g} to {high:g}")
    return values.astype(np.float32, copy=False)


def _values(one: Sent) -> NDArray[Any]:
    """The numbers of a tensor (N, C, H, W) in its datatype; its shape has been checked."""
    shape, kind = tuple(one.shape), DATATYPES[one.datatype]
    count = math.prod(shape)
    if isinstance(one.values, bytes):
        if len(one.values) != count * kind.itemsize:
            raise RefusedError(
                "length",
                f"expected {count * kind.itemsize} bytes for {one.datatype} of shape {list(shape)}, but got "
                f"{len(one.values)}",
            )
        return np.frombuffer(one.values, kind).reshape(shape)
    values = one.values if isinstance(one.values, np.ndarray) else _numbers(one.values, one.datatype)
    if values.size != count or (values.ndim > 1 and values.shape != shape):
        raise RefusedError(
            "length",
            f"expected {count} values, flat or nested by the shape {list(shape)}, but got {values.size} of shape "
            f"{short(list(values.shape))}",
        )
    return values.reshape(shape).astype(kind, copy=False)


def _numbers(values: list[object], datatype: str) -> NDArray[Any]:
    """A list of numbers, or of lists of them, as an array of that datatype."""
    found = np.array(values, dtype=object)  # numbers stay what they are: neither true nor "0.5" becomes one
    kinds = set(map(type, found.ravel()))
    if not kinds <= ({int} if datatype == "UINT8" else {int, float}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise RefusedError(
            "format",
            f"expected data as {'whole numbers' if datatype == 'UINT8' else 'numbers'}, in a flat list or in lists of "
            f"equal lengths, but got {names}",
        )
    try:
        with np.errstate(over="ignore"):
            exact = found.astype(np.float64)
            if datatype != "UINT8":
                return exact.astype(np.float32)
    except OverflowError:
        raise RefusedError("finite", "expected images of finite values, but got a number beyond all floats") from None
    if found.size and not (exact.min() >= 0 and exact.max() <= 255):
        raise RefusedError("range", f"expected UINT8 values in [0, 255], but got {exact.min():g} to {exact.max():g}")
    return exact.astype(np.uint8)


def short(words: object) -> str:
    """A client's own words, cut to a length that a reason can bear.

    >>> short("x" * 100)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..."
    """
    text = repr(words[:SHORTEST]) if isinstance(words, str) else repr(words)
    return text if len(text) <= SHORTEST else text[:SHORTEST] + "..."
