"""The code in README and docs runs as it stands, block after block."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from queryfoil import cli, data, models
from queryfoil.attacks import ATTACKS
from queryfoil.defenses import DEFENSES
from queryfoil.models import MODELS
from queryfoil.plan import shipped
from queryfoil.run import run
from queryfoil.task import Task

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def execute(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute(page, tmp_path, monkeypatch)


def test_the_attack_of_the_guide_lowers_the_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = execute(ROOT / "docs/add-an-attack.md", tmp_path, monkeypatch)["PixelFlips"]()
    images = data.load("fashion-mnist", "attack")[:30]
    task = Task.create(images.images, images.labels, images.ids, eps=40 / 255)
    result = run(attack, models.load("fashion-resnet"), task, 200)
    assert result.accuracy(200) < result.accuracy(1)
    assert int(result.queries.max()) == 200


def test_the_defense_of_the_guide_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defense = execute(ROOT / "docs/add-a-defense.md", tmp_path, monkeypatch)["RoundedScores"]
    scores = defense(models.load("fashion-resnet"))(data.load("fashion-mnist", "attack")[:4].images)
    assert torch.equal(scores, torch.round(scores, decimals=1))


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", [*ATTACKS, *DEFENSES, *MODELS, *shipped()])
def test_every_registered_name_is_in_the_readme(name: str) -> None:
    assert f"`{name}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_readme_and_has_help() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"`queryfoil {name}" in readme
        assert (command.callback.__doc__ or "").strip()
