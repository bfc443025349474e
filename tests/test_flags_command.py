"""`queryfoil check`, `qf.check`, the section of flags in a report, and their documentation."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import queryfoil as qf
from helpers import Linear, images, labels_of, levels
from queryfoil import bench, cli, files, plan, summary
from queryfoil.defenses import DEFENSES
from queryfoil.flags import FLAGS, prepared, stored, suite
from queryfoil.flags.flag import PAGE, page_of
from queryfoil.report import page
from queryfoil.store import Store

ROOT = Path(__file__).parent.parent
N = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `Linear` in a module, and images in a NumPy file."""
    root = tmp_path_factory.mktemp("mine")
    tests = str(Path(__file__).parent)
    (root / "checked_model.py").write_text(
        f"import sys\nsys.path.append({tests!r})\nfrom helpers import Linear\ndef net(): return Linear()\n"
    )
    x = images(N, low=40, high=215)
    for name, part in (("images", x), ("others", images(N, seed=1)), ("leak", x[:3])):
        np.savez(root / f"{name}.npz", images=levels(part).byte().numpy(), labels=labels_of(Linear(), part).numpy())
    return root


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["check", *(str(a) for a in arguments)])


ARGUMENTS = ("checked_model:net", "--images", "images.npz", "--eps", "32/255", "--n", N, "--budget", 40)


def test_the_command_writes_what_it_prints_and_says_first_what_it_costs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call(*ARGUMENTS, "--defense", "label_only", "--calibration", "others.npz", "--out", out)
    assert result.exit_code == 0, result.output
    attacks = len(suite.suite("linf", True, 10))
    assert f"at most {attacks * N * 40:,} queries" in result.output.splitlines()[0]
    written = json.loads((out / "check.json").read_text())
    found = {flag["id"]: flag for flag in written["flags"]}
    assert [*found] == [*FLAGS]
    assert {id for id, flag in found.items() if flag["status"] == "raised"} >= {"F5", "F9"}
    clear = {"F1", "F2", "F3", "F4", "F10", "F13", "F14", "F15", "F18", "F19"}
    assert {id for id, flag in found.items() if flag["status"] == "clear"} >= clear
    assert found["F11"]["status"] == "not judged"  # there is no margin
    assert written["defense"]["name"] == "label_only"
    html = (out / "check.html").read_text()
    assert f"{sum(f['raised'] for f in found.values())} of 20 flags are raised" in html
    assert not re.search(r'(src|href)\s*=\s*"(?!#)|<script', html)
    for flag in found.values():
        assert flag["missing"] or flag["measured"]
        assert flag["page"] in html
        assert flag["id"] in result.output
    again = call(*ARGUMENTS, "--defense", "label_only", "--calibration", "others.npz", "--out", out)
    assert again.exit_code == 0, again.output
    second = {f["id"]: f for f in json.loads((out / "check.json").read_text())["flags"]}
    assert all(second[id] == found[id] for id in found if id != "F20")  # which takes the time


def test_a_killed_process_leaves_no_page_without_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    for name in prepared.FILES:
        (tmp_path / name).write_text("of an earlier check")
    write = files.write_text
    for kill in range(3):
        left = kill

        def until_killed(path: Path, text: str) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            write(path, text)

        monkeypatch.setattr(files, "write_text", until_killed)
        with pytest.raises(Killed) if kill < 2 else nullcontext():
            prepared._write(tmp_path, "data", "page")
        found = {path.name: path.read_text() for path in tmp_path.iterdir()}
        assert "check.html" not in found or found == {"check.json": "data", "check.html": "page"}
        assert "check.json" in found


def test_a_leak_and_wrong_settings(tmp_path: Path) -> None:
    model, x = Linear(), images(N, low=40, high=215)
    y = labels_of(model, x)
    given: dict[str, Any] = {"raw": model, "eps": 32 / 255, "budget": None}
    leak = {flag.id: flag for flag in qf.check(model, x, y, calibration=x[:3], **given)}["F18"]
    assert leak.raised
    assert leak.figures["both"] == 3
    for arguments, message in (
        ((*ARGUMENTS[:-1], 7, "--out", tmp_path / "new"), "a budget of at least 8 queries"),
        ((*ARGUMENTS[:3], "--norm", "l2", "--out", tmp_path / "new"), "--eps"),
        ((*ARGUMENTS, "--defense", "aaa", "--out", tmp_path / "new"), "set tau"),
        ((*ARGUMENTS, "--out", "."), "it holds other files"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "new").exists()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"budget": 7}, "expected budget as a whole number >= 8"),
        ({"raw": Linear(classes=3)}, "expected raw to have the 10 classes of the model, but it has 3"),
        ({"calibration": x.double()}, "expected images as a float32 tensor"),
        ({"eps": -1.0}, "expected eps > 0"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            qf.check(model, x, y, **{**given, **changed})
    with pytest.raises(ValueError, match="evaluation mode"):
        qf.check(Linear().train(), x, y, **given)


def test_what_cannot_be_judged_says_what_is_missing() -> None:
    model, x = Linear(), images(N, low=40, high=215)
    found = qf.check(model, x, labels_of(model, x), eps=32 / 255, budget=None)
    missing = {flag.id: flag.missing for flag in found if flag.status == "not judged"}
    assert {"F1", "F6", "F7", "F8", "F9", "F10", "F12", "F13", "F14", "F15", "F16", "F17", "F18", "F19", "F20"} == {
        *missing
    }
    assert missing["F1"] == "the undefended model; pass raw="


def test_progress_ends_at_the_total_and_the_records_fit_the_model_s_own_count() -> None:
    model, x = Linear(), images(N, low=40, high=215)
    seen: list[tuple[str, int, int, int]] = []
    found = qf.check(
        model, x, labels_of(model, x), raw=model, eps=32 / 255, budget=20, report=lambda *a: seen.append(a)
    )
    units = [one[1] for one in seen]
    assert units == sorted(units)
    assert seen[-1][1] == seen[-1][2] == len(suite.suite("linf", True, 10)) * N * 20
    accounting = {flag.id: flag for flag in found}["F14"]
    assert accounting.figures["mismatches"] == 0
    assert "that the model saw" in accounting.measured


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 10])
def test_every_short_attack_of_each_norm_runs(norm: str, classes: int) -> None:
    model, x = Linear(classes=classes), images(6, low=40, high=215)
    found = qf.check(model, x, labels_of(model, x), raw=model, norm=norm, eps=64 / 255, budget=12)
    assert {flag.id for flag in found if flag.status != "not judged"} >= {"F8", "F9", "F12", "F14", "F16", "F19"}


TINY = """
name = "tiny"
about = "Two attackers"
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
eps = "16/255"
budget = 20
n = 16
[[grid]]
defense = ["None", "DLD", "scaled"]
attacker = ["greedy", "class sum"]
[axis.defense]
None = {}
DLD = { defenses = [{ name = "dld" }] }
scaled = { defenses = [{ name = "temperature", fit = true }] }
[axis.attacker]
greedy = { attack = "square" }
"class sum" = { attack = "square", hyper = { reading = "logit_sum" } }
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    (out / "tiny.toml").write_text(TINY)
    bench.bench(plan.read(out / "tiny.toml"), out / "out")
    page.write(out / "out")
    return out / "out"


def test_the_report_lists_what_its_results_raise(finished: Path) -> None:
    flags = dict(stored.of_folder(summary.collect(Store(finished))[1]))
    assert [*flags] == ["None", "DLD", "scaled"]
    found = {name: {flag.id: flag for flag in of} for name, of in flags.items()}
    assert found["DLD"]["F9"].raised
    assert found["None"]["F9"].status == "clear"
    assert found["scaled"]["F18"].status == "clear"
    assert found["scaled"]["F18"].figures["calibration"] == 1000
    assert found["DLD"]["F18"].measured == "nothing of this defense was fitted"
    for of in found.values():
        assert of["F14"].status == of["F15"].status == "clear"
        assert of["F15"].figures["images"] > 0
    text, source = (finished / "report.md").read_text(), (finished / "report.html").read_text()
    for name, of in found.items():
        for flag in of.values():
            assert (f"{flag.id} {flag.name} ({flag.kind}): {flag.measured}" in text) == flag.raised, (name, flag.id)
    assert "<h2>Flags</h2>" in source
    assert found["DLD"]["F9"].page in source
    assert "Not judged: F6" in text


def test_a_record_is_the_stored_cell(finished: Path) -> None:
    result = summary.collect(Store(finished))[1][2]
    made = stored.record(result)
    assert (made.label, made.budget, made.eps, made.sees_scores) == ("greedy", 20, 16 / 255, True)
    assert made.standard
    some = qf.data.load("fashion-mnist", "attack")[:16]
    attacked = qf.attack(
        DEFENSES["dld"](qf.models.load("fashion-resnet")), some.images, some.labels, eps=16 / 255, budget=20
    )  # fmt: skip
    assert np.mean(made.fooled) > 0
    assert made.clean is not None
    assert np.array_equal(made.clean, (some.images * 255).round().byte().numpy())
    assert len(made.fooled_at) == len(attacked.fooled_at)


@pytest.mark.parametrize("id", FLAGS)
def test_every_flag_has_its_section(id: str) -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    headings = re.findall(r"^### (.+)$", text, flags=re.MULTILINE)
    slugs = [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings]
    assert page_of(id).partition("#")[2] in slugs
    assert f"{id} {FLAGS[id].name}" in headings
    assert len(headings) == len(FLAGS)
