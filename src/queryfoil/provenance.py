"""What a result depends on, as hashes: code, weights, images, versions."""

import ast
import functools
import hashlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

DIGITS = 16
NOT_DECIDING = (
    "queryfoil.data",
    "queryfoil.defenses.calibration",
    "queryfoil.files",
    "queryfoil.metrics",
    "queryfoil.models.checkpoints",
    "queryfoil.models.zoo",
    "queryfoil.provenance",
)
"""Modules that others import without their code deciding a recorded result: images are hashed themselves, and so is
what `fit` finds, and a network, however it was named and loaded. The files of `queryfoil.metrics` are like it."""


def code(modules: Iterable[str]) -> str:
    """Hash of these modules of the library and all they import from it.

    Comments, docstrings and layout do not count, so that only a change of meaning makes results stale.
    """
    seen: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"expected an importable module, but got {name!r}")
        path = Path(spec.origin)
        seen[name], imported = _read(path, path.stat().st_mtime_ns)
        waiting += imported
    return _hash(f"{name}\n{seen[name]}".encode() for name in sorted(seen))


@functools.cache
def _read(path: Path, changed: int) -> tuple[str, tuple[str, ...]]:
    """What a module's file means, and the modules of the library that it imports; `changed` is when it was written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    meaning = ast.unparse(_without_docstrings(tree))
    return meaning, tuple(_imported(tree))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _imported(tree: ast.Module) -> list[str]:
    """Modules of the library that a module imports; package `__init__` files only list names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("queryfoil"):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                is_module = importlib.util.find_spec(node.module).submodule_search_locations is not None and (  # type: ignore[union-attr]
                    importlib.util.find_spec(name) is not None
                )
                found.append(name if is_module else node.module)
    left_out = ("queryfoil", *NOT_DECIDING)
    return [name for name in found if name not in left_out and not name.startswith("queryfoil.metrics.")]


def network(model: nn.Module) -> dict[str, str]:
    """Hashes of a network: the library's code in it, and how it is built with what weights."""
    modules = {type(module).__module__ for module in model.modules()}
    return {"code": code(name for name in modules if name.startswith("queryfoil.")), "weights": weights(model)}


def weights(model: nn.Module) -> str:
    """Hash of a module: its structure as it prints itself; names, shapes and bytes of parameters and buffers."""
    state = {**model.state_dict(), **dict(model.named_buffers())}  # of buffers, some are no part of the state
    return _hash(
        [
            re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode(),
            *(part for name in sorted(state) for part in (name.encode(), *_bytes(state[name]))),
        ]
    )


def tensors(*values: Tensor) -> str:
    """Hash of tensors: types, shapes and bytes."""
    return _hash(part for value in values for part in _bytes(value))


def content(*paths: Path) -> str:
    """Hash of files: their bytes."""
    return _hash(path.read_bytes() for path in paths)


def versions() -> dict[str, str]:
    """The library's version and commit, and Python, torch, threads and instruction set, which decide last bits."""
    return {
        "queryfoil": version("queryfoil"),
        "commit": _commit(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


@functools.cache
def _commit() -> str:
    """The commit that the library's code is from, with a + if it was changed since; empty where there is no git."""
    here = Path(__file__).parent
    try:
        tracked, changes, commit = (
            subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["ls-files", Path(__file__).name], ["status", "--porcelain", "."], ["rev-parse", "HEAD"])
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (commit + "+" * bool(changes)) if tracked else ""


def _bytes(tensor: Tensor) -> tuple[bytes, bytes]:
    values = tensor.detach().cpu().contiguous()
    return f"{values.dtype}{tuple(values.shape)}".encode(), values.flatten().view(torch.uint8).numpy().tobytes()


def _hash(parts: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "big") + part)
    return sha.hexdigest()[:DIGITS]
