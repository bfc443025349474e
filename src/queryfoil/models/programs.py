"""Networks with their code in a file: TorchScript, and programs of torch.export.

Loading such a file can run what is in it: load none that you would not run.
"""

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from queryfoil.models.zoo import on_device


def from_program(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    """The network in a file; what is inside decides how it is read, not its name. ValueError for anything else."""
    kind = _kind(path)
    try:
        loaded = _load_script(path) if kind == "TorchScript" else torch.export.load(path)
    except Exception as error:  # torch's own kinds have no base of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"expected {kind} that this torch can load, but got {path}: {reason}") from None
    return on_device(loaded, device) if isinstance(loaded, nn.Module) else _Exported(loaded, path, device)


def _load_script(path: Path) -> nn.Module:
    with warnings.catch_warnings():  # torch would rather have exported programs, but these files are there
        warnings.simplefilter("ignore", DeprecationWarning)
        network: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return network


def _kind(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"expected TorchScript or an exported program at {path}, but there is no file")
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    inside = {name.partition("/")[2] for name in names} | set(names)  # torch puts all in one folder of the archive
    if any(name.startswith("code/") for name in inside):
        return "TorchScript"
    if any(name.startswith(("models/", "serialized_exported_program")) for name in inside):
        return "an exported program"
    raise ValueError(
        f"expected TorchScript or an exported program, but {path} is neither; a file of torch.save holds weights, or a "
        "pickled module, without the code of the network: pass module:function for a function that builds the network "
        "and loads the weights, or save it with torch.export.save or torch.jit.save"
    )


class _Exported:
    """A program of torch.export as a callable on tensors; any batch, whatever batch it was exported with."""

    def __init__(self, program: torch.export.ExportedProgram, path: Path, device: str) -> None:
        images = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
        if len(images) != 1 or len(program.graph_signature.user_outputs) != 1:
            raise ValueError(f"expected one input, images (N, C, H, W), and one output in {path}, but got others")
        if training := [node.name for node in program.graph.nodes if _trains(node)]:
            raise ValueError(f"expected {path} to be exported after model.eval(), but {training[0]} is training")
        self.path, self.shape = path, images[0].meta["val"].shape
        on_device(nn.Module(), device)  # ValueError for a device that is not there
        self.run: Any = move_to_device_pass(program, device).module()

    def __call__(self, x: Tensor) -> Tensor:
        wanted, batch = self.shape[1:], self.shape[0] if isinstance(self.shape[0], int) else len(x)
        if len(self.shape) != 4 or any(isinstance(w, int) and w != g for w, g in zip(wanted, x.shape[1:], strict=True)):
            raise ValueError(f"expected images {tuple(self.shape)} for {self.path}, but got {tuple(x.shape)}")
        return in_batches(self.run, x, batch)


def _trains(node: torch.fx.Node) -> bool:
    """Whether an operation, such as dropout, was exported in training mode."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return given.get("train") is True or given.get("training") is True


def in_batches(run: Callable[[Tensor], Tensor], x: Tensor, batch: int) -> Tensor:
    """Scores of images in batches of exactly this size, the last one filled up with zeros.

    >>> in_batches(lambda x: x.flatten(1), torch.ones(3, 1, 1, 2), batch=2).shape
    torch.Size([3, 2])
    """
    scores = []
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        padded = torch.cat([part, part.new_zeros(batch - len(part), *part.shape[1:])])
        scores.append(run(padded)[: len(part)])
    return torch.cat(scores)
