"""The code in README and docs runs as it stands, block after block."""

import importlib
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import queryfoil as qf
from queryfoil import bench, cli, data, models, plan
from queryfoil.attacks import ATTACKS
from queryfoil.defenses import DEFENSES
from queryfoil.models import MODELS
from queryfoil.models.checkpoints import PUBLISHED
from queryfoil.plan import shipped
from queryfoil.train import recipe
from queryfoil.train.objectives import AnyObjective

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
    text = (ROOT / "docs/add-an-attack.md").read_text(encoding="utf-8")
    (tmp_path / "pixel_flips.py").write_text(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ATTACKS, "pixel_flips", importlib.import_module("pixel_flips").PixelFlips)
    images = data.load("fashion-mnist", "attack")[:30]
    model = models.load("fashion-resnet")
    result = qf.attack(model, images.images, images.labels, "pixel_flips", eps=40 / 255, budget=200)
    assert result.accuracy(200) < result.accuracy(1)
    assert int(result.queries.max()) == 200
    (tmp_path / "own.toml").write_text(
        """
        name = "own"
        about = "The attack of the guide"
        [[cell]]
        label = "own"
        dataset = "fashion-mnist"
        model = "fashion-resnet"
        attack = "pixel_flips"
        eps = "40/255"
        budget = 3
        n = 4
        """
    )
    assert bench.bench(plan.read(tmp_path / "own.toml"), tmp_path / "out").left == 0
    other = qf.attack(model, images.images, images.labels, "pixel_flips", eps=40 / 255, budget=200, accept="op")
    assert other.accuracy(200) >= result.accuracy(200)
    with pytest.raises(ValueError, match="PixelFlips supports norm linf, but got 'l2'"):
        qf.attack(model, images.images, images.labels, "pixel_flips", norm="l2")


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_network_is_in_its_page(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs/published-checkpoints.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_is_in_the_table_of_defenses(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs/choose-a-defense.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_data_set_has_its_section(name: str) -> None:
    assert f"\n## {name}\n" in (ROOT / "docs/data-sets.md").read_text(encoding="utf-8")


def test_the_recipe_of_the_guide_is_the_shipped_one(tmp_path: Path) -> None:
    text = (ROOT / "docs/train-a-network.md").read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)[0])
    assert recipe.read(str(tmp_path / "own.toml")) == recipe.read("fashion-resnet-at")


@pytest.mark.parametrize("objective", get_args(get_args(AnyObjective)[0]))
def test_every_objective_and_its_settings_are_in_the_guide(objective: Any) -> None:
    text = (ROOT / "docs/train-a-network.md").read_text(encoding="utf-8")
    assert f"`{objective.model_fields['method'].default}`" in text
    assert all(f"`{name}`" in text for name in objective.model_fields if name != "method")


def test_the_plan_of_the_guide_to_the_paper_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)[0])
    assert [cell.place["tau"] for cell in plan.read(tmp_path / "own.toml").cells] == ["2", "6", "2", "6"]


@pytest.mark.parametrize(
    "name", [name for name in shipped() if plan.read(name).scale and not name.startswith("figure")]
)
def test_every_table_of_the_paper_is_in_its_guide(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
