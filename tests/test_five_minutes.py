"""The page "Protect a model in five minutes": its program and its commands run as they stand, in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving import ROOT, Service

TEXT = (ROOT / "docs/five-minutes.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in re.findall(r"^    (?:python|queryfoil|curl) .*$", TEXT, flags=re.MULTILINE)]


def test_the_page_goes_from_a_model_to_an_answer() -> None:
    done = [" ".join(command.split()[:2]) for command in COMMANDS]
    assert done == [
        "python -c", "queryfoil fit", "python -c", "queryfoil check", "queryfoil export", "queryfoil serve", "curl -d",
    ]  # fmt: skip
    seconds = [float(found) for found in re.findall(r"^## .*\(([0-9.]+) s", TEXT, flags=re.MULTILINE)]
    assert len(seconds) == len(COMMANDS)
    assert sum(seconds) < 300
    first_screen = TEXT[: TEXT.index("## 1.")]
    assert "does not stop: attackers who use the label alone" in first_screen


@pytest.mark.slow
def test_every_command_does_what_the_page_shows(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[0])
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    printed = []
    for command in COMMANDS[:-2]:
        program, *arguments = shlex.split(command)
        interpreter = [sys.executable] if program == "python" else [sys.executable, "-m", "queryfoil.cli"]
        ran = subprocess.run(
            [*interpreter, *arguments], cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=500
        )
        assert ran.returncode == 0, ran.stderr
        printed.append(ran.stdout)
    shown = re.sub(r"\s+", " ", TEXT)
    for output in (printed[1], printed[2]):
        assert re.sub(r"\s+", " ", output).strip() in shown
    assert "greedy Square leaves 43.3 %" in re.sub(r"\s+", " ", printed[3])

    service = Service(tmp_path / "protected.onnx", *shlex.split(COMMANDS[-2])[3:])
    try:
        status, _, answer = service.call(service.infer, (tmp_path / "request.json").read_bytes())
    finally:
        service.stop()
    assert status == 200
    probs = np.array(json.loads(answer)["outputs"][0]["data"])
    line = re.findall(r"class (\d+), confidence .* shown ([0-9.]+)", printed[2])[-1]
    assert int(probs.argmax()) == int(line[0])
    assert probs.max() == pytest.approx(float(line[1]), abs=1e-4)
    in_page = json.loads(re.search(r"\{\"model_name.*?\}\]\}", shown).group())  # type: ignore[union-attr]
    assert in_page["outputs"][0]["data"] == pytest.approx(probs.tolist(), abs=1e-5)
