"""Any model, by a text: a shipped or published one, a function in a module, or a file."""

import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil import provenance
from queryfoil.checks import lookup
from queryfoil.models import checkpoints
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


def victim(spec: str, device: str = "cpu", output: str | None = None, prepare: "Prepare | None" = None) -> Victim:
    """The model that `spec` names; ValueError that says what is missing.

    `spec` is one of:

    - a name of `MODELS`;
    - `NAME=PATH`, where NAME is one of `checkpoints.PUBLISHED` and PATH its file;
    - `module:function`, a function without arguments in a module (installed, or in the current folder) that
      returns a callable from images (n, C, H, W), float32 in [0, 1], to scores (n, K), such as an nn.Module in
      evaluation mode;
    - a file of a whole model: .onnx, .pt2 (torch.export) or .pt, .pth, .ts (TorchScript). The latter two are programs:
      load none that you would not run.

    `output` is "logits", "log_probs" or "probs". `prepare` says what a model of yours expects where that is not
    images in [0, 1] of the size they have.

    >>> victim("fashion-resnet")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    name, equals, path = spec.partition("=")
    if prepare is not None and (equals or spec in MODELS):
        raise ValueError(f"{spec} has its size and normalization inside, so setting them would be wrong; leave it out")
    found = _found(spec, name, path, device, output)
    if prepare is None:
        return found
    prepared = Victim(nn.Sequential(prepare, found), found.output, {**found.identity, "input": repr(prepare)})
    prepared.deterministic, prepared.rowwise = found.deterministic, found.rowwise
    return prepared


def _found(spec: str, name: str, path: str, device: str, output: str | None) -> Victim:
    if path:
        model = checkpoints.load(name, path, device)
        return Victim(model, output, provenance.network(model))
    if spec.endswith(".onnx"):
        return _from_onnx(Path(spec), device, output)
    if spec.endswith(PROGRAMS):
        return _from_program(Path(spec), device, output)
    if ":" in spec:
        return _from_function(spec, device, output)
    try:
        lookup(MODELS, spec, "model")
    except ValueError as error:
        hint = "NAME=PATH, module:function, and paths of .onnx, .pt2 or .pt files work too"
        raise ValueError(f"{error} ({hint})") from None
    model = load(spec, device)
    return Victim(model, output, provenance.network(model))


class Prepare(nn.Module):
    """What a model expects of images in [0, 1]: another size (bilinear, antialiased), (x - mean) / std.

    >>> Prepare(size=None, mean=(0.5,), std=(0.25,))(torch.ones(1, 1, 2, 2)).max()
    tensor(2.)
    """

    def __init__(self, size: int | None, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < s < math.inf for s in std):
            raise ValueError(f"expected a mean and a std > 0 for each channel, but got {tuple(mean)} and {tuple(std)}")
        if size is not None and size < 1:
            raise ValueError(f"expected a size of at least 1 pixel, but got {size}")
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) as the model expects them."""
        if self.mean and len(self.mean) != x.shape[1]:
            raise ValueError(f"expected images of {len(self.mean)} channels, as the mean has, but got {x.shape[1]}")
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.mean or (0.0,), self.std or (1.0,)))
        return (x - mean) / std

    def extra_repr(self) -> str:
        return f"size={self.size}, mean={self.mean}, std={self.std}"


PROGRAMS = (".pt2", ".pt", ".pth", ".ts")


def _from_program(path: Path, device: str, output: str | None) -> Victim:
    if not path.is_file():
        raise ValueError(f"expected a model file at {path}, but there is none")
    on_device(torch.zeros(1), device)
    try:
        if path.suffix == ".pt2":
            model = torch.export.load(path).module()
        else:
            with warnings.catch_warnings():  # that torch would rather have torch.export
                warnings.simplefilter("ignore", DeprecationWarning)
                model = torch.jit.load(path, "cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # of many kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"expected a whole model in {path}, by torch.export.save (.pt2) or torch.jit.save, but it cannot be loaded "
            f"({reason}); a file of weights alone needs its network: NAME=PATH for a published one, or a "
            "module:function that builds it"
        ) from None
    model.to(device)
    for module in model.modules():
        module.training = False  # a program of torch.export refuses eval(), and knows no mode
    return Victim(model, output, {"program": provenance.content(path)})


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
        identity |= provenance.network(model)
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
