"""A protection as one Python file that needs NumPy alone."""

import ast
import inspect
import io
import json
import pprint
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from queryfoil.deploy import numpy_aaa, numpy_scores, numpy_terraces
from queryfoil.deploy.graph import Protection

WIDTH = 110
RUN = """
import io, runpy, sys
import numpy as np
sys.modules.update({"torch": None, "queryfoil": None})  # neither can be imported
protect = runpy.run_path(sys.argv[1])["protect"]
shown = io.BytesIO()
np.save(shown, protect(np.load(io.BytesIO(sys.stdin.buffer.read()))))
sys.stdout.buffer.write(shown.getvalue())
"""


def write(protection: Protection, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Write a protection's file, with what `about` (JSON) says of it, and give the way to ask it.

    The code is that of `numpy_aaa` or `numpy_terraces` with what it imports from the library in place, and with the
    fit's parameters as its constants. It is asked in a process of its own, in which torch cannot be imported.
    ValueError without a fit.
    """
    template, constants = _parameters(protection)
    path.write_text(_bundle(template, constants, json.loads(about)), encoding="utf-8")
    return lambda x: _ask(path, x)


def _parameters(protection: Protection) -> tuple[ModuleType, dict[str, Any]]:
    """The module that does what the protection does, and its constants by name."""
    kinds = {"GIVEN": protection.given, "SHOWN": protection.shown}
    if protection.found is None:
        raise ValueError("a NumPy file holds a protection, but there is none; pass a fit")
    template, names = (
        (numpy_aaa, ("classes", "curve", "tau", "alpha", "beta", "temperature"))
        if protection.aaa is not None
        else (numpy_terraces, ("group", "borders", "shares"))
    )
    return template, kinds | {name.upper(): getattr(protection.found, name) for name in names}


def _bundle(template: ModuleType, constants: dict[str, Any], about: dict[str, Any]) -> str:
    """One file: a header, the template's constants with these values, and the functions of template and library."""
    own = about | {"parameters": {k: v for k, v in about["parameters"].items() if k.upper() not in constants}}
    imports, code = _split(template, constants)
    inner_imports, inner = _split(numpy_scores, {})
    header = (
        f'"""Shows the scores of a classifier protected: shown = protect(scores). Needs NumPy alone.\n\n'
        f"Written by `queryfoil export` {about['version']}: {about['defense']}, fitted on data of hash "
        f"{about['fit_data'] or 'unknown'}.\nThe parameters are secrets of the service: keep this file like the fit.\n"
        '"""\n'
    )
    lines = sorted({*imports, *inner_imports}, key=lambda line: ("numpy" in line, line.startswith("from"), line))
    parts = [header, "\n".join(lines), f"ABOUT = {_literal(own, 'ABOUT')}", *inner, *code]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _split(module: ModuleType, constants: dict[str, Any]) -> tuple[list[str], list[str]]:
    """A module's imports from elsewhere, and the rest of its text but for the docstring, with other constants."""
    text = inspect.getsource(module)
    lines = text.splitlines()
    imports: list[str] = []
    edits: dict[int, tuple[int, str]] = {}  # first line to last line and what comes there
    body = ast.parse(text).body
    for node in body:
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        if isinstance(node, ast.Expr):  # the docstring
            edits[first] = (last, "")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("queryfoil")):
                imports.append(ast.unparse(node))
            edits[first] = (last, "")
        elif isinstance(node, ast.Assign):
            names = [name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)]
            if constants.keys() & names:
                edits[first] = (last, "\n".join(f"{name} = {_literal(constants[name], name)}" for name in names))
    for first in sorted(edits, reverse=True):
        last, instead = edits[first]
        lines[first:last] = [instead] if instead else []
    return imports, ["\n".join(lines)]


def _literal(value: Any, name: str) -> str:
    """A value as Python text, broken into lines that are indented to stand after `name = `."""
    lines = pprint.pformat(value, width=WIDTH - len(name), compact=True, sort_dicts=False).splitlines()
    return ("\n" + " " * (len(name) + 3)).join(lines)


def _ask(path: Path, x: Tensor) -> Tensor:
    content = io.BytesIO()
    np.save(content, x.cpu().numpy())
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN, str(path)], input=content.getvalue(), capture_output=True, timeout=120
    )
    if done.returncode:
        raise ValueError(f"the exported file does not run with NumPy alone: {done.stderr.decode().strip()[-500:]}")
    return torch.from_numpy(np.load(io.BytesIO(done.stdout)))
