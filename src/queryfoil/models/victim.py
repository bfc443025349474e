"""Any model, by a text: a shipped or published one, a function in a module, or a file."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from queryfoil import provenance
from queryfoil.checks import lookup
from queryfoil.data import Images
from queryfoil.models import checkpoints
from queryfoil.models.programs import from_program, in_batches
from queryfoil.models.zoo import MODELS, load, on_device
from queryfoil.oracle import Model, ModelError, answers, check_mode

OUTPUTS = {"logits": "of any size", "log_probs": "their exponentials sum to 1", "probs": "sum to 1"}


PROGRAMS = (".pt", ".pth", ".ts", ".pt2")
"""How the names of files with TorchScript or an exported program end."""


@dataclass(frozen=True)
class Input:
    """What a model wants done to images in [0, 1] before it sees them: nothing, if all is None.

    `size` resizes to size x size pixels, bilinearly (with antialiasing where it shrinks). Then `mean` is subtracted
    and divided by `std`: one number, or one a channel.

    >>> Input(mean=(0.5,), std=(0.25,))(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError(f"expected mean and std together, of one length, but got {self.mean} and {self.std}")
        if self.std is not None and not (self.std and all(value > 0 for value in self.std)):
            raise ValueError(f"expected std > 0 on the [0, 1] scale, but got {self.std}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"expected a size of at least 1 pixel, but got {self.size}")

    def __call__(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) as the model wants them."""
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = nn.functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        if self.mean is not None and self.std is not None:
            if len(self.mean) not in (1, x.shape[1]):
                raise ValueError(
                    f"expected mean and std of 1 or {x.shape[1]} numbers, as the images have {x.shape[1]} channels, "
                    f"but got {len(self.mean)}"
                )
            x = (x - x.new_tensor(self.mean).view(-1, 1, 1)) / x.new_tensor(self.std).view(-1, 1, 1)
        return x


class Victim(nn.Module):
    """A model of any kind as a module: `ask` maps images (n, C, H, W) to scores (n, K).

    `input` is what it wants done to the images. `output` says what the scores are; None: as `ask` declares by its own
    attribute `output`, else logits. `identity` has hashes of what decides the answers, by what they cover; it is empty
    where nothing is known.
    """

    def __init__(
        self, ask: Model, output: str | None = None, identity: dict[str, str] | None = None, input: Input | None = None
    ) -> None:
        super().__init__()
        check_mode(ask)
        declared = getattr(ask, "output", None)
        if output is not None and declared is not None and output != declared:
            raise ValueError(
                f"expected output {declared!r}, as the model declares it, but got {output!r}; leave it out"
            )
        self.output: str = output or declared or "logits"
        lookup(OUTPUTS, self.output, "output")
        self.ask, self.identity, self.input = ask, identity or {}, input or Input()
        self.deterministic = bool(getattr(ask, "deterministic", True))
        self.rowwise = bool(getattr(ask, "rowwise", True))
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, K)."""
        return self.ask(self.input(x))


def check_spec(spec: str, input: Input) -> None:
    """ValueError for what `victim` would refuse unseen: a name that is none, or an input for a shipped model."""
    name, equals, _ = spec.partition("=")
    if equals:
        lookup(checkpoints.PUBLISHED, name, "published network")
    elif ":" in spec or Path(spec).suffix in (".onnx", *PROGRAMS):
        return
    else:
        try:
            lookup(MODELS, spec, "model")
        except ValueError as error:
            files = ", ".join((".onnx", *PROGRAMS))
            raise ValueError(
                f"{error} (module:function, a path that ends in {files}, or NAME=PATH of a published one, work too)"
            ) from None
    if input != Input():
        raise ValueError(f"{spec} has its normalization inside; leave out mean, std and size")


def victim(spec: str, device: str = "cpu", output: str | None = None, input: Input | None = None) -> Victim:
    """The model that `spec` names; ValueError that says what is missing.

    `spec` is a name of `MODELS`; or NAME=PATH, where NAME is one of `checkpoints.PUBLISHED` and PATH its file; or
    `module:function`, a function without arguments in a module (installed,
    or in the current folder) that returns a callable from images (n, C, H, W), float32 in [0, 1], to scores
    (n, K), such as an nn.Module in evaluation mode; or a path that ends in .onnx, or in .pt, .pth, .ts or .pt2 for
    TorchScript or an exported program, told apart by what is inside. Those are programs: load none that you would
    not run. `output` is "logits", "log_probs" or "probs"; `input` what the model wants done to images in [0, 1].

    >>> victim("fashion-resnet")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    input = input or Input()
    check_spec(spec, input)
    read = {".onnx": _from_onnx} | dict.fromkeys(PROGRAMS, _from_program)
    source = read.get(Path(spec).suffix, _from_function if ":" in spec else _shipped)
    source = _published if "=" in spec else source
    model, identity = source(spec, device)
    return Victim(model, output, identity, input)


Found = tuple[Model, dict[str, str]]
"""A model, and its identity."""


def _shipped(name: str, device: str) -> Found:
    model = load(name, device)
    return model, provenance.network(model)


def _published(spec: str, device: str) -> Found:
    name, _, path = spec.partition("=")
    model = checkpoints.load(name, path, device)
    return model, provenance.network(model)


def _from_program(spec: str, device: str) -> Found:
    model = from_program(Path(spec), device)
    return model, {"file": provenance.content(Path(spec))}


def _from_function(spec: str, device: str) -> Found:
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
    return model, identity


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


def _from_onnx(spec: str, device: str) -> Found:
    path = Path(spec)
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
    return _Session(session, path), {"ONNX file": provenance.content(*parts)}


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
        return in_batches(self._run, x.cpu(), batch).to(x.device)

    def _run(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: x.numpy()})[0])


def classes_of(model: Model, images: Images, seed: int) -> int:
    """How many classes the model has; ValueError if it does not answer such images."""
    try:
        scores = answers(model, images.images, images.ids, torch.zeros_like(images.ids), seed)
    except ModelError as error:
        raise ValueError(f"expected a model that answers such images, but {error}") from error
    return scores.shape[1]
