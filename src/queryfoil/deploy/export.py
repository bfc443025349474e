"""One file with a model and its protection, for a server without this library: ONNX, torch.export's pt2, or NumPy."""

import contextlib
import io
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from queryfoil import __version__, files, provenance
from queryfoil.checks import lookup
from queryfoil.defenses.calibration import Fit, check_held_out
from queryfoil.defenses.terrace_fit import TerraceFit
from queryfoil.deploy import as_numpy, as_onnx
from queryfoil.deploy.as_onnx import METADATA, OUTPUT
from queryfoil.deploy.graph import Protected, Protection, Wanted, off_borders
from queryfoil.models.victim import Input, Victim, _Session

BATCHES = (1, 3, 64)
TOLERANCE = 1e-3  # of margins of the file against those of the module
QUANTILES = np.linspace(0, 1, 21)
TRACING = threading.Lock()  # torch traces one model at a time, and what is silenced is silent for all threads


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the module: n rows, some of them too near a border to compare."""

    path: Path
    bytes: int
    n: int
    near: int
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bytes / 1e6:.2f} MB; on {self.n} rows, in batches of {', '.join(map(str, BATCHES))}, "
            f"the labels are those of the module and margins differ by at most {self.largest:.1e} ({self.near} rows "
            "within 1e-4 of a border left out)"
        )


def export(
    network: Victim | None,
    found: Fit | TerraceFit | None,
    path: str | Path,
    *,
    to: str = "onnx",
    shape: tuple[int, int, int] | None = None,
    softmax: bool = False,
    given: str = "logits",
    classes: int | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
) -> Exported:
    """Write a network behind its protection to a file, and check the file against the module.

    network: as `models.victim.victim` gives it, for images (N, *shape), an ONNX file too; None writes the protection
    alone, from scores (N, K) of the kind `given`. found: what `qf.fit` found; None leaves the scores as they are. to:
    "onnx", whose input is `images` and whose output `scores` (`scores` and `shown` for the protection alone), "pt2",
    or, for the protection alone, "numpy", a Python file with a function `protect`. softmax: show probabilities.
    held_out: the logits and labels that were fitted on, whose hash and shown margins are written beside the parameters.

    ValueError where something is missing, cannot be exported, or where the file gives another label, or a margin that
    differs by more than 1e-3; then there is no file.
    """
    path = Path(path)
    write = lookup({"onnx": _onnx, "pt2": _pt2, "numpy": _numpy}, to, "format")
    kind = given if network is None else network.output
    if network is not None and not network.deterministic:
        raise ValueError(
            "expected a network that gives the same image the same scores, but this one draws at random, which a graph "
            "would freeze or lose; export another, or the protection alone"
        )
    if to == "numpy" and network is not None:
        raise ValueError(
            "a NumPy file holds the protection alone, not the network; write it by `queryfoil export scores OUT.py "
            "--fit FIT --to numpy`, or the network too with --to onnx"
        )
    file = None if network is None else _onnx_file(network)
    if file is not None:
        if to != "onnx":
            raise ValueError(f"expected an ONNX network, {file}, to be written as onnx, but got {to}")
        shape = shape or _sides(network)
    protection = Protection(found, kind, "probs" if softmax else kind).eval()
    module: nn.Module = protection if network is None else Protected(network, protection).eval()
    if held_out is not None:
        _check_fitted_on(held_out, found)
    sample = _scores(found, classes, held_out, kind) if network is None else _images(shape)
    module = module.to(sample.device)
    with torch.inference_mode():
        scores = sample if network is None else _asked(network, sample)
        if network is not None:
            _check_steady(network, sample, scores)
        expected = _answers(module, sample)
    about = {
        "version": __version__,
        "defense": {Fit: "aaa", TerraceFit: "terraces"}.get(type(found)),
        "parameters": None if found is None else asdict(found),
        "fit_data": None if held_out is None else provenance.tensors(*held_out),
        "input": "scores" if network is None else "images",
        "input_shape": list(sample.shape[1:]),
        "classes": expected.shape[1],
        "output": protection.shown,
        "shown_margins": None if held_out is None else _shown_margins(held_out[0], found),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with files.replacing(path) as temporary:
        name = "scores" if network is None else "images"
        ask = write(module, name, sample[:2].clone(), json.dumps(about), temporary)
        near, largest = _compare(ask, sample, expected, Protection(None, kind)._log_scores(scores), found, protection)
    return Exported(path, path.stat().st_size, len(sample), near, largest)


def _sides(network: Victim | None) -> tuple[int, int, int] | None:
    """Of the images that an ONNX network takes, as far as its file says so and nothing is resized."""
    ask = None if network is None or network.input.size is not None else network.ask
    sides = tuple(ask.shape[1:]) if isinstance(ask, _Session) else ()
    return (sides[0], sides[1], sides[2]) if sides and all(isinstance(side, int) for side in sides) else None


def _images(shape: tuple[int, int, int] | None) -> Tensor:
    if shape is None:
        raise ValueError("expected the shape of an image, C,H,W, but got none; pass --shape, such as 3,224,224")
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(sum(BATCHES), shape[0], 4, 4, generator=generator)
    x = nn.functional.interpolate(smooth, shape[1:], mode="bilinear") + 0.1 * torch.randn(
        sum(BATCHES), *shape, generator=generator
    )
    return x.clamp(0, 1)


def _scores(
    found: Fit | TerraceFit | None, classes: int | None, held_out: tuple[Tensor, Tensor] | None, kind: str
) -> Tensor:
    if held_out is not None and len(held_out[0]) >= sum(BATCHES):
        z = held_out[0].float()
    else:
        k = classes if found is None else found.classes
        if k is None:
            raise ValueError("expected a number of classes, but got none; pass classes, or a fit")
        z = 3 * torch.randn(sum(BATCHES), k, generator=torch.Generator().manual_seed(0))
    z = z[: sum(BATCHES)]
    return {"logits": z, "log_probs": z.log_softmax(1), "probs": z.softmax(1)}[kind]


def _check_fitted_on(held_out: tuple[Tensor, Tensor], found: Fit | TerraceFit | None) -> None:
    check_held_out(*held_out)
    if found is None:
        raise ValueError("held-out scores say what a protection was fitted on, but there is none; leave one out")
    if (len(held_out[0]), held_out[0].shape[1]) != (found.n, found.classes):
        raise ValueError(
            f"expected the {found.n} held-out rows of {found.classes} classes that the fit was made of, but got "
            f"{len(held_out[0])} of {held_out[0].shape[1]}; pass the file that `queryfoil fit` read"
        )


def _shown_margins(logits: Tensor, found: Fit | TerraceFit | None) -> dict[str, list[float]]:
    """Quantiles of the margins that are shown for the held-out images, in units of logits."""
    with torch.inference_mode():
        top = Protection(found)(logits.float()).double().topk(2, dim=1).values
    return {
        "quantiles": QUANTILES.tolist(),
        "margins": np.quantile((top[:, 0] - top[:, 1]).cpu().numpy(), QUANTILES).tolist(),
    }


def _asked(network: Victim, images: Tensor) -> Tensor:
    """Scores (N, K) of a network; ValueError for one that does not take such images, or gives anything else."""
    try:
        scores: object = network(images)
    except ValueError:
        raise
    except Exception as error:  # whatever a model of somebody else's raises
        raise ValueError(
            f"expected a model that answers images (N, {', '.join(map(str, images.shape[1:]))}), but of "
            f"{len(images)} it raised {type(error).__name__}: {error}; pass the shape of its images by --shape"
        ) from error
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"expected scores as a tensor ({len(images)}, K) from the model, but got {got}")
    return scores


def _check_steady(network: Victim, images: Tensor, scores: Tensor) -> None:
    """ValueError if a network gives other scores than these when asked again, or asked in batches of another size."""
    if _apart(_asked(network, images), scores) > TOLERANCE:
        raise ValueError(
            "expected a network that gives the same image the same scores, but asked twice this one gave others; a "
            "graph would freeze or lose what it draws, so export another, or the protection alone"
        )
    if _apart(_answers(lambda part: _asked(network, part), images), scores) > TOLERANCE:
        raise ValueError(
            "expected a network that answers each image by itself, but in another batch this one gave the same images "
            "other scores, which a server that gathers requests would show; make it treat its rows apart"
        )


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of scores (N, K) that are finite, as a part of the largest, if that is more than 1."""
    if a.shape != b.shape:
        return torch.inf
    finite = a.isfinite() & b.isfinite()
    if not bool(finite.any()):
        return 0.0
    return float((a - b)[finite].abs().amax() / a[finite].abs().amax().clamp_min(1))


def _parts(sample: Tensor) -> Iterator[Tensor]:
    ends = np.cumsum(BATCHES).tolist()
    return (sample[end - n : end] for n, end in zip(BATCHES, ends, strict=True))


def _answers(module: Callable[[Tensor], Tensor], sample: Tensor) -> Tensor:
    return torch.cat([module(part) for part in _parts(sample)])


def _compare(
    ask: Callable[[Tensor], Tensor],
    sample: Tensor,
    expected: Tensor,
    z: Tensor,
    found: Fit | TerraceFit | None,
    protection: Protection,
) -> tuple[int, float]:
    """How many rows are too near a border, and the largest difference of margins of the others; ValueError if it is."""
    got = _answers(ask, sample)
    if got.shape != expected.shape or not bool(got.isfinite().all()):
        raise ValueError(f"the exported file does not give finite scores {tuple(expected.shape)}; nothing was written")
    clear = off_borders(z, found)
    read = Protection(None, protection.shown)._log_scores
    margins = [read(s.double()).topk(2, dim=1).values for s in (got, expected)]
    differ = (margins[0] - margins[1]).diff(dim=1).abs().squeeze(1)
    other = got.argmax(1) != expected.argmax(1)
    if bool(other[clear].any()) or bool((differ[clear] > TOLERANCE).any()):
        raise ValueError(
            f"the exported file differs from the module: {int(other[clear].sum())} of {int(clear.sum())} labels, "
            f"margins by up to {float(differ[clear].max()):.2g}, where {TOLERANCE:g} is allowed; nothing was written"
        )
    return int((~clear).sum()), float(differ[clear].max()) if bool(clear.any()) else 0.0


def _program(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The module as a graph of torch operations for batches of any size."""
    for strict in (True, False):
        try:
            with TRACING, torch.no_grad(), _quiet():
                return torch.export.export(
                    module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict
                )
        except Exception as error:  # whatever tracing somebody's network raises
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    raise ValueError(
        f"torch.export makes no graph of this model for batches of any size ({reason}); write the protection alone by "
        "`queryfoil export scores OUT --fit FIT`"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the graphs that torch prints and logs where it makes none; its error has the reason."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _onnx(module: nn.Module, name: str, example: Tensor, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    as_onnx.needs()
    file = _onnx_file(module.network) if isinstance(module, Protected) else None
    if not isinstance(module, Protected) or file is None:
        shown = OUTPUT if name != OUTPUT else "shown"
        return as_onnx.write(as_onnx.graph_of(_program(module, example), name, shown), about, path)
    scores, wanted = module.network(example), module.network.input
    parts = [as_onnx.read(file), as_onnx.graph_of(_program(module.protection, scores), OUTPUT, "shown")]
    if isinstance(wanted, Input) and wanted != Input():
        parts.insert(0, as_onnx.graph_of(_program(Wanted(wanted), example), "images", "wanted"))
    return as_onnx.write(as_onnx.chain(parts, tuple(example.shape[1:])), about, path)


def _onnx_file(network: nn.Module) -> Path | None:
    """The ONNX file that a network is, if it is one."""
    ask = network.ask if isinstance(network, Victim) else None
    return ask.path if isinstance(ask, _Session) else None


def _pt2(module: nn.Module, name: str, example: Tensor, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    content = io.BytesIO()
    program = _program(module, example)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source lines and paths of this machine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about weights that share memory
        torch.export.save(program, content, extra_files={f"{METADATA}.json": about})
    path.write_bytes(content.getvalue())
    loaded: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(content.getvalue())).module()
    return loaded


def _numpy(module: nn.Module, name: str, example: Tensor, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    if not isinstance(module, Protection):
        raise TypeError(f"expected a protection, but got {type(module).__name__}")
    return as_numpy.write(module, about, path)
