"""Images and tasks on their way to a worker: bytes for images of 8 bits, and nothing of what they are a part of."""

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Packed(Generic[Thing]):
    """A frozen dataclass of tensors and plain values, as arrays, which Ray shares without a copy."""

    kind: type[Thing]
    values: dict[str, Any]

    def unpack(self, device: str) -> Thing:
        """What was packed, bit for bit, on a device."""
        return self.kind(**{name: _unpacked(value, device) for name, value in self.values.items()})


def pack(thing: Thing) -> Packed[Thing]:
    """Pack a frozen dataclass of tensors and plain values.

    >>> from queryfoil.data import Images
    >>> images = Images(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([3]), torch.tensor([7]))
    >>> packed = pack(images)
    >>> packed.values["images"].dtype, packed.unpack("cpu").images
    (dtype('uint8'), tensor([[[[0., 1.]]]]))
    """
    return Packed(type(thing), {f.name: _packed(getattr(thing, f.name)) for f in fields(thing)})  # type: ignore[arg-type]


def _packed(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.cpu()
    if value.dtype == torch.float32:
        levels = (value * 255).round().clamp(0, 255).to(torch.uint8)
        if torch.equal(levels.float() / 255, value):
            return levels.numpy()
    return value.numpy()


def _unpacked(value: Any, device: str) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(value.copy())  # what Ray shares is read-only
    return (tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor).to(device)
