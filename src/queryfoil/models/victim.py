"""Models of yours: a shipped name, a function in a module, or an ONNX file."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from queryfoil import provenance
from queryfoil.checks import lookup
from queryfoil.models.zoo import MODELS, load, on_device
from queryfoil.oracle import Model, check_mode

OUTPUTS = {"logits": "of any size", "log_probs": "their exponentials sum to 1", "probs": "sum to 1"}


class Victim(nn.Module):
    """A model of any kind as a module: `ask` maps images (n, C, H, W) to scores (n, K).

    `output` says what the scores are; None: as `ask` declares by its own attribute `output`, else logits.
    `identity` has hashes of what decides the answers, by what they cover; it is empty where nothing is known.
    """

    def __init__(self, ask: Model, output: str | None = None, identity: dict[str, str] | None = None) -> None:
        super().__init__()
        check_mode(ask)
        declared = getattr(ask, "output", None)
        if output is not None and declared is not None and output != declared:
            raise ValueError(
                f"expected output {declared!r}, as the model declares it, but got {output!r}; leave it out"
            )
        self.output: str = output or declared or "logits"
        lookup(OUTPUTS, self.output, "output")
        self.ask, self.identity = ask, identity or {}
        self.deterministic = bool(getattr(ask, "deterministic", True))
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, K)."""
        return self.ask(x)


def victim(spec: str, device: str = "cpu", output: str | None = None) -> Victim:
    """The model that `spec` names; ValueError that says what is missing.

    `spec` is a name of `MODELS`; or `module:function`, a function without arguments in a module (installed,
    or in the current folder) that returns a callable from images (n, C, H, W), float32 in [0, 1], to scores
    (n, K), such as an nn.Module in evaluation mode; or a path that ends in .onnx. `output` is "logits", "log_probs" or
    "probs".

    >>> victim("fashion-resnet")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    if spec.endswith(".onnx"):
        return _from_onnx(Path(spec), device, output)
    if ":" in spec:
        return _from_function(spec, device, output)
    try:
        builder = lookup(MODELS, spec, "model")
    except ValueError as error:
        raise ValueError(f"{error} (module:function, or a path that ends in .onnx, work too)") from None
    model = load(spec, device)
    identity = {"code": provenance.code([builder.__module__]), "weights": provenance.weights(model)}
    return Victim(model, output, identity)


def _from_function(spec: str, device: str, output: str | None) -> Victim:
    name, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in (*name.split("."), attribute)):
        raise ValueError(f"expected module:function, such as shop.models:classifier, but got {spec!r}")
    with _importable_from_here():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, and misses another one
            raise ValueError(f"expected a module {name!r} in this folder or installed, but there is none") from None
        functions = {key: value for key, value in vars(module).items() if inspect.isroutine(value)}
        function: Any = getattr(module, attribute, None) or lookup(functions, attribute, f"function of {name}")
        if not callable(function) or isinstance(function, nn.Module) or not _takes_nothing(function):
            raise ValueError(f"expected {spec} to be a function without arguments that gives the model, but it is none")
        model = function()
    if not callable(model):
        raise ValueError(f"expected {spec} to return a callable from images to scores, but got {type(model).__name__}")
    source = getattr(module, "__file__", None)
    identity = {"source": provenance.content(Path(source))} if source else {}
    if isinstance(model, nn.Module):
        identity["weights"] = provenance.weights(model)
        model = on_device(model, device)
    return Victim(model, output, identity)


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Look for modules in the current folder too."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _takes_nothing(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _from_onnx(path: Path, device: str, output: str | None) -> Victim:
    if not path.is_file():
        raise ValueError(f"expected an ONNX file at {path}, but there is none")
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ValueError("ONNX files need onnxruntime: pip install 'queryfoil[export]'") from None
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    provider = lookup(wanted, torch.device(device).type, "device for ONNX files")
    lookup(dict.fromkeys(onnxruntime.get_available_providers()), provider, "provider of this onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's own kinds have no base of their own
        reason = str(error).splitlines()[0]
        raise ValueError(f"expected an ONNX file that onnxruntime can load, but got {path}: {reason}") from None
    # large weights lie beside, in NAME.onnx.data
    parts = sorted(p for p in path.parent.iterdir() if p.name.startswith(path.name) and p.is_file())
    return Victim(_Session(session, path), output, {"ONNX file": provenance.content(*parts)})


class _Session:
    """A session of ONNX Runtime as a callable on tensors; any batch, whatever batch the file is fixed to."""

    def __init__(self, session: Any, path: Path) -> None:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(
                f"expected one input and one output in {path}, but got inputs {', '.join(i.name for i in inputs)} and "
                f"outputs {', '.join(o.name for o in outputs)}"
            )
        if inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            raise ValueError(
                f"expected images (N, C, H, W) as tensor(float) as the input of {path}, but got {inputs[0].type} "
                f"{tuple(inputs[0].shape)}"
            )
        self.session, self.path, self.name, self.shape = session, path, inputs[0].name, inputs[0].shape

    def __call__(self, x: Tensor) -> Tensor:
        if any(isinstance(size, int) and size != got for size, got in zip(self.shape[1:], x.shape[1:], strict=True)):
            raise ValueError(f"expected images {tuple(self.shape)} for {self.path}, but got {tuple(x.shape)}")
        batch = self.shape[0] if isinstance(self.shape[0], int) else len(x)
        scores = []
        for start in range(0, len(x), batch):
            part = x[start : start + batch].cpu()
            padded = torch.cat([part, part.new_zeros(batch - len(part), *part.shape[1:])])
            scores.append(torch.from_numpy(self.session.run(None, {self.name: padded.numpy()})[0])[: len(part)])
        return torch.cat(scores).to(x.device)
