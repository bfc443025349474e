"""Files of `torch.save` read without running them: tensors are rebuilt, all other objects are inert."""

import pickle
import types
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch


class _Inert:
    """Stands for any object that is no tensor: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    def append(self, value: Any) -> None:
        """Nothing."""

    def extend(self, values: Any) -> None:
        """Nothing."""


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors, and puts `_Inert` in the place of all else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
            ("torch", "Size"): torch.Size,
        }
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        return allowed.get((module, name), _Inert)


def _load_pickle(file: IO[bytes], **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


_INERT = types.SimpleNamespace(Unpickler=_Unpickler, load=_load_pickle, __name__="inert pickle")


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, any format: tensors in dicts and lists; all other objects are inert."""
    if not path.is_file():
        raise ValueError(f"expected a file of weights at {path}, but there is none")
    try:
        return torch.load(path, "cpu", pickle_module=_INERT, weights_only=False)
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise ValueError(f"expected a file that torch.save wrote at {path}, but it cannot be read: {error}") from None
