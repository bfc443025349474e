"""Files of `torch.save` read without running them: tensors are rebuilt, all other objects are inert."""

import pickle
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
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


class _Callable:
    """A function that a pickle may call, and do nothing else with: attributes that it sets are lost."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        pass


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}
"""What tensors are rebuilt with. The storages among them are found by torch itself, before it asks here."""


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors, and puts `_Inert` in the place of all else."""

    def find_class(self, module: str, name: str) -> Any:
        function = ALLOWED.get((module, name))
        return _Inert if function is None else _Callable(function)


def _load_pickle(file: IO[bytes], **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


_INERT = types.SimpleNamespace(Unpickler=_Unpickler, load=_load_pickle, __name__="inert pickle")


def _refuse_programs(path: Path) -> None:
    """ValueError for TorchScript, which torch.load would run whatever the unpickler says."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [name.split("/") for name in archive.namelist()]
        if any("code" in part[:-1] or part[-1] == "constants.pkl" for part in parts):
            raise ValueError(f"expected weights that torch.save wrote at {path}, but it holds a program (TorchScript)")


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, any format: tensors in dicts and lists; all other objects are inert."""
    if not path.is_file():
        raise ValueError(f"expected a file of weights at {path}, but there is none")
    _refuse_programs(path)
    try:
        return torch.load(path, "cpu", pickle_module=_INERT, weights_only=False)
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise ValueError(f"expected a file that torch.save wrote at {path}, but it cannot be read: {error}") from None
