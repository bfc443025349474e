"""The report: its texts, its figures, and how it looks in a real browser."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from queryfoil import bench, plan, summary, table
from queryfoil.metrics import Interval
from queryfoil.plan import Plan
from queryfoil.report import cells, drawing, figures, page, sheets
from queryfoil.report.frontier import Point, frontier
from queryfoil.store import Store
from queryfoil.summary import CellResult

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]

TINY = r"""
name = "tiny <plan>"
about = "Letters & signs"
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
attack = "square"
eps = "16/255"
budget = 15
n = 30
[[cell]]
label = "undefended"
[[cell]]
label = "AAA-linear, tau 2 & <more> [/x] a|b $5 \\frac $"
defenses = [{ name = "aaa", tau = 2.0 }]
trace = 1
[[cell]]
label = "noise"
defenses = [{ name = "input_noise", std = 0.05 }]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.toml"
    path.write_text(TINY)
    out = tmp_path_factory.mktemp("report")
    bench.bench(plan.read(path), out)
    page.write(out)
    return out


@pytest.fixture(scope="module")
def collected(folder: Path) -> tuple[Plan, list[CellResult]]:
    return summary.collect(Store(folder))


def measure(source: str, width: int, folder: Path, *flags: str) -> dict[str, float]:
    """Open a page in a frame of this width in headless Chromium and measure it there."""
    assert CHROMIUM is not None
    script = """
      const w = frame.contentWindow, d = w.document, style = w.getComputedStyle(d.body);
      const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number); return (r + g + b) / 765; };
      const shown = [...d.querySelectorAll('h1,h2,h3,th,td,dt,dd,p,figcaption,svg')];
      result.textContent = JSON.stringify({
        width: w.innerWidth, content: d.documentElement.scrollWidth, svgs: d.querySelectorAll('figure svg').length,
        ink: light(style.color), paper: light(style.backgroundColor),
        outside: shown.filter(e => e.getBoundingClientRect().right > w.innerWidth + 1).length,
        smallest: Math.min(...[...d.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)),
      });"""
    wrapper = folder / f"wrapper-{width}.html"
    wrapper.write_text(
        f'<iframe id="frame" width="{width}" height="900" style="border:0" srcdoc="{html.escape(source)}"></iframe>'
        f'<pre id="result"></pre><script>frame.onload = () => {{{script}}};</script>'
    )
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"]
    command += ["--window-size=1400,1000", "--dump-dom", wrapper.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="result">(\{.*?\})</pre>', dom)
    assert found, dom[-2000:]
    return dict(json.loads(html.unescape(found.group(1))))


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("QUERYFOIL_REQUIRE_CHROMIUM"), reason="Chromium is not installed"
)


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_can_be_read_in_a_browser(folder: Path, tmp_path: Path, width: int, scheme: str) -> None:
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    seen = measure((folder / "report.html").read_text(), width, tmp_path, *flags)
    assert seen["width"] == width
    assert seen["content"] <= width, "the page scrolls sideways"
    assert seen["outside"] == 0
    assert seen["svgs"] == 4
    assert seen["smallest"] > 8, "text in a figure is too small"
    assert (seen["ink"] - seen["paper"] > 0.6) if scheme == "dark" else (seen["paper"] - seen["ink"] > 0.6)


@needs_chromium
@pytest.mark.parametrize(("pick", "seen"), [("", [1, 0]), ("choice-1-2", [0, 1]), ("print", [1, 1])])
def test_one_of_two_axes_is_shown_as_picked_and_both_in_print(
    folder: Path, collected: tuple[Plan, list[CellResult]], tmp_path: Path, pick: str, seen: list[int]
) -> None:
    found = [
        Point(name, 0.5 + i / 4, 0.1 - i / 40, 1.0, i / 4, Interval(i / 5, i / 3), 2) for i, name in enumerate("ab")
    ]
    rows = json.loads((folder / "summary.json").read_text())
    source = page.html(collected[0], rows, [frontier(found, 9)], None)
    if pick == "print":
        source = source.replace("@media print", "@media screen")
    script = f"""<script>if ({json.dumps(pick)}.startsWith("choice")) document.getElementById("{pick}").click();
      const high = [...document.querySelectorAll(".choice figure svg")].map(e => e.getBoundingClientRect().height);
      const names = [...document.querySelectorAll(".choice label")].map(e => e.checkVisibility() ? e.textContent : "");
      document.body.textContent = "found " + JSON.stringify([high.map(h => +(h > 50)), names]);</script>"""
    (tmp_path / "page.html").write_text(source.replace("</body>", script + "</body>"))
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command.append((tmp_path / "page.html").as_uri())
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    names = ["", ""] if pick == "print" else ["AUROC", "ECE"]
    assert f"found {json.dumps([seen, names], separators=(',', ':'))}" in dom


def test_the_page_is_self_contained_and_runs_no_script(folder: Path) -> None:
    source = (folder / "report.html").read_text()
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)
    assert not re.search(r'(src|href)\s*=\s*"(?!#)', without_namespaces)
    assert "<script" not in source
    assert "@import" not in source
    assert "url(http" not in source


def test_labels_and_names_are_escaped(folder: Path) -> None:
    source = (folder / "report.html").read_text()
    assert "tiny &lt;plan&gt;" in source
    assert "AAA-linear, tau 2 &amp; &lt;more&gt; [/x] a|b $5" in source
    assert "[/x] a\\|b $5" in (folder / "report.md").read_text()
    assert "<more>" not in source


def test_every_share_stands_with_interval_and_n(folder: Path) -> None:
    for row in json.loads((folder / "summary.json").read_text()):
        entries = cells.entries(row, cells.points([row]))
        assert len(entries) == len(cells.columns([row])) == 5
        for entry in entries:
            assert re.search(r"\d–\d.*n = \d+", entry.detail), entry


def test_the_page_shows_the_numbers_of_the_summary(folder: Path) -> None:
    source, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for row in json.loads((folder / "summary.json").read_text()):
        for value in (row["clean_accuracy"], row["accuracy"]["15"], row["ece"]):
            assert cells.percent(value) in source
            assert cells.percent(value) in text
        assert row["cell"] in source
    assert "do not know the defense" in source
    assert "do not know the defense" in text


def test_the_report_can_be_made_again_without_change(folder: Path) -> None:
    names = ("summary.json", "report.md", "report.html")
    before = [(folder / name).read_bytes() for name in names]
    page.write(folder)
    assert [(folder / name).read_bytes() for name in names] == before


def test_figures_have_captions_and_follow_the_page_colours(collected: tuple[Plan, list[CellResult]]) -> None:
    image = collected[1][1].trace.column("id")[0]
    pictures = figures.all_of(*collected)
    assert [p.title for p in pictures] == [
        "Accuracy over queries",
        f"Losses along an attack: AAA-linear, tau 2 & <more> [/x] a|b $5 \\frac $, image {image}",
        "Scores before and after",
        "Reliability",
    ]
    for picture in pictures:
        assert len(picture.caption) > 80
        assert "currentColor" in picture.svg
        assert drawing.INK not in picture.svg
        assert "<text" in picture.svg


def test_the_trace_shows_a_fall_that_misleads(collected: tuple[Plan, list[CellResult]]) -> None:
    result = collected[1][1]
    trace = result.trace.to_pydict()
    rows = [i for i, path in enumerate(trace["path"]) if path == "defended"]
    shown, true = ([trace[name][i] for i in rows] for name in ("shown_margin", "true_margin"))
    assert trace["query"][rows[0]] == 1
    assert len(rows) == 15
    assert all((a > 0) == (b > 0) for a, b in zip(shown, true, strict=True))
    undefended = [i for i, path in enumerate(trace["path"]) if path == "undefended"]
    assert trace["true_margin"][undefended[0]] == true[0]


def test_percent_has_three_digits_where_it_matters() -> None:
    assert [cells.percent(v) for v in (0.6067, 0.002, 0.0995, 1.0)] == ["60.7 %", "0.20 %", "10.0 %", "100.0 %"]


def test_rows_of_different_budgets_stand_under_their_own_headings(tmp_path: Path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(
        TINY.replace('label = "undefended"', 'label = "undefended"\nbudget = 5')
        .replace('label = "noise"', 'label = "noise"\nbudget = 20\ntargeted = true')
        .replace('about = "Letters & signs"', 'about = "Letters"\nreport_at = [10]')
    )
    bench.bench(plan.read(path), tmp_path / "out")
    rows = page.write(tmp_path / "out")
    at = cells.points(rows)
    assert at == [5, 10, 15, 20]
    headings = [column.heading for column in cells.columns(rows)]
    for row in rows:
        shown = dict(zip(headings, cells.entries(row, at), strict=True))
        for q in at:
            expected = cells.percent(row["accuracy"][str(q)]) if str(q) in row["accuracy"] else "–"
            assert shown[f"accuracy at {q}"].value == expected
        assert shown["ECE"].value == cells.percent(row["ece"])
    assert "after the queries in brackets" in page.headline(rows)
    assert "(20)" in page.headline(rows)


WORST = """
name = "two"
about = "Two attackers"
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
eps = "16/255"
budget = 30
n = 40
[[grid]]
defense = ["None", "DLD"]
attacker = ["greedy", "drift"]
[[grid]]
defense = ["DLD"]
attacker = ["labels"]
[axis.defense]
None = {}
DLD = { defenses = [{ name = "dld" }] }
[axis.attacker]
greedy = { attack = "square" }
drift = { attack = "square", accept = "drift", hyper = { p_init = 0.8 } }
labels = { attack = "rays" }
[layout]
rows = ["attacker"]
users = []
columns = "defense"
worst = true
at = [5, 30]
"""


def test_the_worst_attack_of_each_image_leads_the_page(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(WORST)
    bench.bench(plan.read(tmp_path / "two.toml"), tmp_path / "out")
    page.write(tmp_path / "out")
    found = sheets.sheet(*summary.collect(Store(tmp_path / "out")))
    (line,) = (line for line in found.lines if line.label == sheets.WORST)
    for column in ("None", "DLD"):
        results = [r for r in summary.collect(Store(tmp_path / "out"))[1] if r.cell.place["defense"] == column]
        fooled = [table.fooled_at(r.attacked) for r in results if r.cell.attack == "square"]  # two that see scores
        assert len(fooled) == 2
        assert not np.array_equal(*fooled)
        left = [100 * float(np.mean((fooled[0] > q) & (fooled[1] > q))) for q in (5, 30)]
        shown = [float(part.split(" ±")[0]) for part in line.values[column].ours.split(" / ")]
        assert shown == pytest.approx(left, abs=0.05)
        assert line.values[column].ours.endswith("(2)")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "under the worst attack for each image" in text
        assert "The attacks: greedy; drift." in text
        assert line.values["DLD"].ours in text
