"""Two runs side by side: matching, paired intervals, what differs, and what is written."""

import dataclasses
import functools
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from queryfoil import attacking, bench, cli, metrics, plan, summary
from queryfoil.compare import command, comparison, measures, page, runs, words
from queryfoil.compare.comparison import compare, differing
from queryfoil.compare.forest import forest
from queryfoil.compare.measures import Measure, mean_interval
from queryfoil.compare.runs import Scores, Subject
from queryfoil.metrics import NEVER
from queryfoil.store import Store

TINY = """
name = "tiny <{name}>"
about = "Two cells"
report_at = [5]
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
attack = "square"
eps = "16/255"
budget = 12
n = {n}
seed = {seed}
[[cell]]
label = "undefended"
[[cell]]
label = "defended & <b>"
defenses = [{defense}]
{more}
"""
WORST = """
name = "worst"
about = "Two attackers of two defenses"
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
attack = "square"
eps = "16/255"
budget = 8
n = 20
[[grid]]
defense = ["None", "tau 2"]
attacker = ["greedy", "drift"]
[axis.defense]
None = {}
"tau 2" = { defenses = [{ name = "aaa", tau = 2.0 }] }
[axis.attacker]
greedy = {}
drift = { accept = "drift" }
[layout]
columns = "defense"
rows = ["attacker"]
at = [8]
worst = true
"""
AAA = '{ name = "aaa", tau = 2.0 }'


def run(folder: Path, name: str, text: str) -> Path:
    (folder / f"{name}.toml").write_text(text)
    out = folder / name
    assert bench.bench(plan.read(folder / f"{name}.toml"), out, share=folder / "shared").left == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    label_only = '{ name = "label_only" }'
    texts = {
        "base": TINY.format(name="base", n=30, seed=0, defense=AAA, more=""),
        "again": TINY.format(name="again", n=30, seed=0, defense=AAA, more=""),
        "seed": TINY.format(name="seed", n=30, seed=1, defense=AAA, more='[[cell]]\nlabel = "third"\nn = 3'),
        "other": TINY.format(name="other", n=20, seed=0, defense=label_only, more=""),
        "worst": WORST,
    }
    for name, text in texts.items():
        run(root, name, text)
    for name, seed in (("attack", 0), ("attack-1", 1)):
        asked = attacking.request(
            model="fashion-resnet", images="fashion-mnist", n=30, attack="square", eps="16/255", budget=12, seed=seed
        )
        attacking.attack(asked, root / name)
    return root


@functools.cache
def between(a: Path, b: Path) -> comparison.Comparison:
    return compare(a, b)


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(cli.app, ["compare", *map(str, arguments)])


def figures(c: comparison.Comparison, label: str) -> dict[str, Measure]:
    return {m.name: m for p in c.pairs if p.a.label == label for m in p.measures}


def subject(fooled_at: list[int], ids: list[int] | None = None, budget: int = 100) -> Subject:
    n = len(fooled_at)
    rows = np.arange(n) if ids is None else np.array(ids)
    return Subject("x", "fashion-mnist", (budget,), budget, {}, rows, rows % 10, np.array([fooled_at]))


def test_the_same_runs_are_said_to_be_the_same_in_one_line(folder: Path) -> None:
    found = between(folder / "base", folder / "again")
    assert found.same
    assert found.counted == []
    result = call(folder / "base", folder / "again")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "The same, image by image: 2 cells, 60 attacked images."
    assert "accuracy left" not in result.output


def test_one_other_image_is_enough_for_another_run(folder: Path) -> None:
    a = runs.read(folder / "base").subjects["undefended"]
    other = a.fooled_at.copy()
    other[0, 7] += 1
    assert not comparison._pair(a, dataclasses.replace(a, fooled_at=other), {}).same
    assert comparison._pair(a, a, {}).same


def test_values_are_those_of_the_reports(folder: Path) -> None:
    found = between(folder / "base", folder / "seed")
    rows = [
        {row["label"]: row for row in summary.rows(*summary.collect(Store(folder / name)))} for name in ("base", "seed")
    ]
    for label in ("undefended", "defended & <b>"):
        shown, (a, b) = figures(found, label), (row[label] for row in rows)
        for name, path in (("accuracy left at 5", "5"), ("accuracy left at 12", "12")):
            assert (shown[name].a, shown[name].b) == (a["accuracy"][path], b["accuracy"][path])
            assert shown[name].difference == pytest.approx(b["accuracy"][path] - a["accuracy"][path])
        assert (shown["clean accuracy"].a, shown["ECE"].b) == (a["clean_accuracy"], b["ece"])
        assert shown["mean queries"].a == a["average_queries"]["12"]
        assert shown["AUROC"].a == a["usefulness"]["auroc"]["value"]


def test_what_differs_and_what_is_only_in_one_is_said(folder: Path) -> None:
    found = between(folder / "base", folder / "seed")
    assert found.everywhere == ("settings: seed 0 / 1",)
    assert found.only_b == ("third",)
    assert found.only_a == ()
    assert not found.same
    other = {p.label: p for p in between(folder / "base", folder / "other").pairs}
    assert other["defended & <b>"].differs == ("settings: n 30 / 20, defenses aaa / label_only",)
    assert other["undefended"].differs == ("settings: n 30 / 20",)
    assert other["undefended"].same  # on the 20 images of both
    assert other["undefended"].images == "n = 20 in both, of 30 in A and 20 in B"
    assert not between(folder / "base", folder / "other").same


def test_facts_are_compared_by_group() -> None:
    a = {"settings": {"eps": "0.0627450980392"}, "code": {"m": "1", "n": "1"}, "fit of aaa": {"tau": "1.23456789"}}
    b = {"settings": {"eps": "0.0313725490196"}, "code": {"m": "2", "o": "1"}, "fit of aaa": {"tau": "1.23456788"}}
    assert differing(a, b) == (
        "settings: eps 0.06275 / 0.03137",
        "code: m",
        "fit of aaa: tau 1.23456789 / 1.23456788",
    )
    assert differing({"attackers": {"x": "", "y": ""}}, {"attackers": {"x": "", "z": ""}}) == (
        "attackers, only in A: y, only in B: z",
    )
    assert differing({"fit": {"borders": "[" * 50}}, {"fit": {"borders": "]" * 50}}) == ("fit: borders",)
    assert differing({"defense aaa": {}}, {"defense aaa": {"beta": "4.0"}}) == ("defense aaa: beta – / 4",)


def test_b_against_a_is_the_mirror_of_a_against_b(folder: Path) -> None:
    there, back = between(folder / "base", folder / "other"), compare(folder / "other", folder / "base")
    assert len(there.counted) > 4
    for p, q in zip(there.pairs, back.pairs, strict=True):
        for m, w in zip(p.measures, q.measures, strict=True):
            assert (m.name, m.a, m.b, m.direction) == (w.name, w.b, w.a, -w.direction)
            np.testing.assert_allclose(
                [m.difference, m.low, m.high], [-w.difference, -w.high, -w.low], rtol=0, atol=1e-12
            )
    assert words.as_json(there) == words.as_json(compare(folder / "base", folder / "other"))  # seeds are fixed


def test_the_paired_interval_is_narrower_than_that_of_two_samples() -> None:
    generator = np.random.default_rng(3)
    hard = generator.random(400) < 0.5  # the same images are hard for both
    a = np.where(hard, 10, NEVER)
    b = np.where(hard & (generator.random(400) < 0.9), 10, NEVER)
    found = {m.name: m for m in measures.under_attack(subject(a.tolist()), subject(b.tolist()), (np.arange(400),) * 2)}
    m = found["accuracy left at 100"]
    left = (b > 100).mean() - (a > 100).mean()
    assert m.difference == pytest.approx(left)
    assert m.low < left < m.high
    widths = [np.subtract(*metrics.wilson(int((v > 100).sum()), 400)[::-1]) for v in (a, b)]
    assert m.high - m.low < 0.6 * np.hypot(*widths)
    assert m.direction == 1


@pytest.mark.parametrize(("fell", "beyond"), [(0, 0), (3, 0), (4, 0), (7, -1), (40, -1)])
def test_a_few_images_that_changed_the_same_way_are_within_noise(fell: int, beyond: int) -> None:
    differences = np.zeros(200)
    differences[5 : 5 + fell] = -1.0
    low, high = mean_interval(differences, 1.0)
    assert low <= differences.mean() <= high
    assert (high < 0) == (beyond == -1)
    assert low < 0
    assert mean_interval(-differences, 1.0) == (-high, -low)


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    generator, inside, times = np.random.default_rng(0), 0, 200
    for _ in range(times):
        difference = generator.choice([-1.0, 0.0, 1.0], 100, p=[0.25, 0.6, 0.15])
        low, high = mean_interval(difference, 1.0)
        inside += low <= -0.1 <= high
    assert 0.9 <= inside / times <= 0.99


def test_images_are_matched_by_id_and_label() -> None:
    a, b = subject([5, 50, NEVER], [3, 1, 2]), subject([NEVER, 7, 9], [2, 3, 8])
    rows = measures.common(a, b)
    assert a.ids[rows[0]].tolist() == b.ids[rows[1]].tolist() == [2, 3]
    found = {m.name: m for m in measures.under_attack(a, b, rows)}
    assert (found["mean queries"].a, found["mean queries"].b, found["mean queries"].n) == (52.5, 53.5, 2)
    relabelled = dataclasses.replace(b, labels=np.array([2, 4, 8]))
    assert a.ids[measures.common(a, relabelled)[0]].tolist() == [2]


def test_queries_and_points_go_to_the_smaller_budget() -> None:
    a, b = subject([1, 40, NEVER], budget=100), subject([3, 60, NEVER], budget=50)
    found = {m.name: m for m in measures.under_attack(a, b, (np.arange(3),) * 2)}
    assert [name for name in found if name.startswith("accuracy left")] == ["accuracy left at 50"]
    assert (found["mean queries"].a, found["mean queries"].b) == (45.0, 50.0)  # of the two that both answer correctly
    none = {m.name: m for m in measures.under_attack(subject([1, 1]), subject([1, 5]), (np.arange(2),) * 2)}
    assert np.isnan(none["mean queries"].a)
    assert words.difference(none["mean queries"]) == words.value(none["mean queries"], np.nan) == "–"


def test_figures_of_scores_are_paired_over_unseen_images() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 300)
    sure = np.where(generator.random(300) < 0.85, labels, 1 - labels)
    confidence = 0.55 + 0.4 * generator.random(300) * (sure == labels)
    probs = np.where(sure[:, None] == [0, 1], confidence[:, None], 1 - confidence[:, None])
    flat = np.where(probs > 0.5, 0.7, 0.3)  # a confidence that tells nothing
    a, b = (Scores("key", np.arange(300), labels, p) for p in (probs, flat))
    ece, auroc = measures.of_scores(a, b)
    assert (ece.a, ece.b) == (metrics.ece(probs, labels), metrics.ece(flat, labels))
    assert auroc.b == 0.5
    assert auroc.direction == -1
    assert auroc.low <= auroc.difference <= auroc.high
    assert all(m.equal and not m.counts for m in measures.of_scores(a, a))
    right = Scores("key", np.arange(300), probs.argmax(1), probs)  # no wrong answer: no AUROC
    assert np.isnan(measures.of_scores(right, right)[1].a)


def test_worst_cases_are_compared_and_scores_only_once(folder: Path) -> None:
    found = compare(folder / "worst", folder / "worst", ["None, worst of all=tau 2, worst of all"])
    (pair,) = found.pairs
    assert pair.a.worst
    cells = runs.read(folder / "worst").subjects
    each = [cells[label].fooled_at[0] for label in cells if label.startswith("None") and not cells[label].worst]
    assert len(each) == 2
    assert figures(found, pair.a.label)["accuracy left at 8"].a == (np.minimum(*each) > 8).mean()
    assert found.only_a == found.only_b == ()
    whole = compare(folder / "worst", folder / "worst")
    assert whole.same
    assert [p.scores_of is None for p in whole.pairs] == [True, True, False, False, False, False]
    assert words.verdict(whole) == "The same, image by image: 4 cells and 2 worst cases, 80 attacked images."


def test_attacks_of_ones_own_are_compared_whatever_their_labels(folder: Path) -> None:
    found = compare(folder / "attack", folder / "attack-1")
    (pair,) = found.pairs
    assert pair.differs == ("settings: seed 0 / 1",)
    assert [m.name for m in pair.measures][-1] == "median queries"  # an attack has no unseen images
    assert compare(folder / "attack", folder / "attack").same
    mixed = compare(folder / "base", folder / "attack", ["undefended=fashion-resnet"])
    assert mixed.pairs[0].same  # the same attack on the same images


def test_the_command_writes_what_it_prints(folder: Path, tmp_path: Path) -> None:
    result = call(folder / "base", folder / "other", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = between(folder / "base", folder / "other")
    written = json.loads((tmp_path / "out/compare.json").read_text())
    assert written == words.as_json(found)
    assert written["differ"] == len(found.counted)
    assert written["expected_by_chance"] == pytest.approx(0.05 * len(found.counted))
    source, text = ((tmp_path / "out" / f"compare.{kind}").read_text() for kind in ("html", "md"))
    for m in figures(found, "defended & <b>").values():
        assert words.difference(m) in html.unescape(source)
        assert words.difference(m) in text
        assert words.difference(m) in result.output
    assert words.verdict(found) in result.output.replace("\n", "")
    assert "defended &amp; &lt;b&gt;" in source
    assert "<b>" not in source
    assert "about" in words.verdict(found)
    assert "by chance" in text


def test_marks_stand_in_words_and_shapes(folder: Path, tmp_path: Path) -> None:
    higher = Measure("ECE", "share", 0.1, 0.3, 0.2, 0.1, 0.3, 50, False)
    lower, within = higher._replace(low=-0.3, high=-0.1, difference=-0.2), higher._replace(low=-0.1)
    assert [words.mark(m) for m in (higher, lower, within)] == ["▲ higher", "▼ lower", ""]
    assert words.difference(higher) == "+20.00 (+10.00 to +30.00)"
    picture = forest("ECE", [("one & two", higher), ("three", lower), ("four", within)])
    assert "one &amp; two" in picture.svg
    assert picture.svg == forest("ECE", [("one & two", higher), ("three", lower), ("four", within)]).svg
    many = forest("ECE", [(str(i), higher._replace(difference=i / 100)) for i in range(40)])
    assert "Of 40 cells, the 30 with the largest differences" in many.caption
    page.write(between(folder / "base", folder / "other"), tmp_path)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", (tmp_path / "compare.html").read_text())
    assert not re.search(r'(src|href)\s*=\s*"(?!#)', without_namespaces)
    assert "<script" not in without_namespaces


def test_of_many_cells_the_terminal_shows_what_is_beyond_noise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = between(folder / "base", folder / "other")
    shown = [words.mark(m) for p in found.pairs for m in p.measures]
    assert any(shown)
    assert not all(shown)
    command.show(dataclasses.replace(found, pairs=found.pairs * 7))
    output = capsys.readouterr().out
    assert "14 cells: only what is beyond noise is printed; --out writes all" in output
    assert sum("▲ higher" in line or "▼ lower" in line for line in output.splitlines()) == 7 * sum(map(bool, shown))
    assert "= on every image" not in output
    command.show(found)
    assert "only what is beyond noise" not in capsys.readouterr().out


def test_thirds_of_three_seeds_do_not_pass_for_a_difference() -> None:
    assert Measure("accuracy left at 5", "share", 0.1, 0.2, 0.1, 3e-17, 0.2, 30, False).direction == 0


def test_what_cannot_be_compared_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("no result")
    for arguments, message in (
        ((tmp_path, folder / "base"), "has neither plan.json nor attack.json"),
        ((tmp_path / "none", folder / "base"), "there is no folder"),
        ((folder / "base", folder / "worst"), "expected cells of the same label"),
        ((folder / "base", folder / "base", "--pair", "undefended"), "expected a pair as LABEL_A=LABEL_B"),
        ((folder / "base", folder / "base", "--pair", "undefendet=undefended"), "has 'undefended'"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2
        assert message in result.output, result.output


def test_a_run_that_is_not_finished_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "part.toml").write_text(TINY.format(name="part", n=30, seed=5, defense=AAA, more=""))
    bench.bench(plan.read(tmp_path / "part.toml"), tmp_path / "part", time_limit=0)
    with pytest.raises(ValueError, match=r"cells in .* are not finished"):
        compare(folder / "base", tmp_path / "part")
    asked = attacking.request(
        model="fashion-resnet", images="fashion-mnist", n=30, attack="square", eps="16/255", budget=12, seed=5
    )
    attacking.attack(asked, tmp_path / "attack", time_limit=0)
    with pytest.raises(ValueError, match=r"the attack in .* is not finished"):
        compare(tmp_path / "attack", folder / "attack")


def test_other_images_are_no_pair(folder: Path) -> None:
    a = runs.read(folder / "base").subjects["undefended"]
    assert "other images" in comparison._reason(a, dataclasses.replace(a, dataset="cifar10=FOLDER"))
    assert "no image of the same id" in comparison._reason(a, dataclasses.replace(a, ids=a.ids + 10_000))
    assert comparison._reason(a, dataclasses.replace(a, dataset="mine")) == ""
