"""The worst case over attacks and seeds, and the frontier."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import queryfoil as qf
from queryfoil import plan, table
from queryfoil.metrics import Interval
from queryfoil.report import frontier
from queryfoil.report.drawing import STYLE, WIDTH, Picture
from queryfoil.report.frontier import Point
from queryfoil.report.worst import Worst, behind, worst

NEVER = int(table.fooled_at(pa.table({"fooled_at": pa.array([None], pa.int64())}))[0])


def cell(
    fooled_at: list[int | None],
    seed: int = 0,
    loss: str | None = "margin",
    ids: list[int] | None = None,
    attack: str = "square",
    defenses: tuple[str, ...] = ("aaa",),
    audited: bool = False,
    **where: Any,
) -> Any:
    ids = list(range(len(fooled_at))) if ids is None else ids
    attacked = pa.table({"id": ids, "fooled_at": pa.array(fooled_at, pa.int64())})
    confidence = np.array([[0.9, 0.1], [0.6, 0.4]] * 20)
    clean = pa.table(
        {
            "label": [0, 1] * 20,
            "scores": pa.array(np.log(confidence).astype(np.float32).tolist(), table.SCORES),
            "undefended_scores": pa.array(np.log(confidence).astype(np.float32).tolist(), table.SCORES),
        }
    )
    ball = {"dataset": "fashion-mnist", "norm": "linf", "eps": 0.1, "targeted": False}
    layers = tuple(SimpleNamespace(name=name) for name in defenses)
    known = {"attack": attack, "accept": "greedy", "defenses": layers, "audited": audited}
    settings = SimpleNamespace(seed=seed, loss=loss, **known, **{**ball, **where})
    return SimpleNamespace(cell=settings, info={"hyper": {}}, attacked=attacked, clean=clean)


def test_an_image_is_left_only_if_every_attack_leaves_it() -> None:
    found = worst([cell([1, 50, None, None]), cell([1, None, 70, None])])
    assert found is not None
    assert found.first.tolist() == [[1, 50, 70, NEVER]]
    assert found.attackers == 2
    assert [found.left(q) for q in (1, 50, 60, 100)] == [0.75, 0.5, 0.5, 0.25]


def test_attacks_that_see_labels_alone_do_not_count() -> None:
    found = worst([cell([None, None]), cell([5, 5], loss=None)])
    assert found is not None
    assert found.left(10) == 1.0
    assert worst([cell([5, 5], loss=None)]) is None


def test_seeds_are_averaged_and_never_pooled_into_one_worst_case() -> None:
    found = worst([cell([5, None], seed=0), cell([None, 5], seed=1)])
    assert found is not None
    assert found.left(10) == 0.5
    low, high = found.interval(10)
    assert low == high == 0.5  # each image is left by half of the seeds


def test_seeds_with_other_attacks_or_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same attacks for each seed"):
        worst([cell([5]), cell([5]), cell([5], seed=1)])
    with pytest.raises(ValueError, match="others for seed 1 than for 0"):
        worst([cell([5]), cell([5], seed=1, attack="simba")])
    with pytest.raises(ValueError, match="2 sets of images"):
        worst([cell([5]), cell([5], ids=[9])])
    with pytest.raises(ValueError, match=r"in one ball and with one goal, but got .*linf 0\.1 and .*linf 0\.2"):
        worst([cell([5]), cell([5], eps=0.2)])


def test_the_bound_of_a_difference_is_paired_and_one_sided() -> None:
    better, worse = worst([cell([None] * 90 + [5] * 10)]), worst([cell([None] * 85 + [5] * 15)])
    assert better is not None
    assert worse is not None
    change, low = behind(worse, better, 100)
    assert change == pytest.approx(-0.05)
    assert -0.10 < low < -0.05  # unpaired the spread would be twice that
    assert behind(better, better, 100) == (0.0, 0.0)


def of(*cells: Any) -> Worst:
    found = worst(cells)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (cell([5] * 3), "expected two worst cases on the same images, but 1 of 4 and 3 are in one alone"),
        (cell([5] * 4, ids=[0, 1, 2, 9]), "2 of 4 and 4 are in one alone"),
        (cell([5] * 4, eps=0.2), r"linf 0\.1 and fashion-mnist, linf 0\.2"),
        (cell([5] * 4, norm="l2"), r"fashion-mnist, l2 0\.1 and fashion-mnist, linf 0\.1"),
        (cell([5] * 4, dataset="cifar10"), "cifar10"),
        (cell([5] * 4, targeted=True), "targeted"),
        (cell([5] * 4, seed=3), r"a seed in common, but got \(0,\) and \(3,\)"),
    ],
)
def test_worst_cases_that_cannot_be_compared_are_refused(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        behind(of(cell([None] * 4)), of(other), 10)


def test_a_difference_is_of_the_same_images_and_seeds_in_whatever_order() -> None:
    a = of(cell([5, None, None], seed=1), cell([5, 5, None], seed=0))
    b = of(cell([None, 5, 5], seed=0, ids=[2, 1, 0]), cell([5, 5, 5], seed=2, ids=[2, 1, 0]))
    assert behind(a, b, 10) == (0.0, 0.0)  # of seed 0 alone, image by image
    assert behind(of(cell([5, 5, None])), b, 10) == (0.0, 0.0)


COMPARED = """
name = "compared"
about = "A ceiling"
[defaults]
dataset = "fashion-mnist"
model = "fashion-resnet"
attack = "square"
eps = "16/255"
budget = 9
n = 5
[[grid]]
defense = ["none", "labels alone"]
attacker = ["greedy", "drift"]
seed = [0, 1]
[[grid]]
defense = ["labels alone"]
attacker = ["blind"]
seed = [0]
[axis.defense]
none = {}
"labels alone" = { defenses = [{ name = "label_only" }] }
[axis.attacker]
greedy = {}
drift = { accept = "drift" }
blind = { attack = "blind_square", n = 3, eps = "8/255" }
[layout]
rows = ["attacker"]
users = []
columns = "defense"
over = "seed"
worst = true
ceiling = "labels alone"
at = [5]
"""
"""The attacker who sees labels alone is in no worst case, and may have other images."""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("none = {}", "none = { n = 4 }", "none is compared with the ceiling labels alone, on one n, but got 5"),
        ("none = {}", 'none = { eps = "8/255" }', "on one eps"),
        ("none = {}", 'none = { norm = "l2", eps = "16/255" }', "on one norm"),
        ("none = {}", "none = { budget = 8 }", "on one budget, but got 9 .* and 8"),
        ("none = {}", 'none = { dataset = "cifar10" }', "on one dataset"),
        ("none = {}", "none = { targeted = true }", "on one targeted"),
        ("none = {}", 'none = { model = "fashion-wrn" }', "on one model"),
        ("drift = { ", "drift = { n = 4, ", "the worst case of none needs one n, but got 5"),
        ('"drift"]\nseed = [0, 1]', '"drift"]\nseed = [2]', None),
        (
            'defense = ["none", "labels alone"]\nattacker = ["greedy", "drift"]\nseed = [0, 1]',
            'defense = ["none"]\nattacker = ["greedy"]\nseed = [0]\n[[grid]]\n'
            'defense = ["labels alone"]\nattacker = ["greedy"]\nseed = [1, 2]',
            r"they have no seed in common: \[0\] and \[1, 2\]",
        ),
        (
            'attacker = ["blind"]\nseed = [0]',
            'attacker = ["greedy"]\nseed = [2]',
            "the worst case of labels alone needs the same attacks for each seed, but seed 2 has others than 0",
        ),
    ],
)
def test_a_plan_that_compares_what_cannot_be_compared_is_refused_when_it_is_read(
    tmp_path: Path, old: str, new: str, message: str | None
) -> None:
    path = tmp_path / "compared.toml"
    path.write_text(COMPARED)
    assert len(plan.read(path).cells) == 9
    assert old in COMPARED
    path.write_text(COMPARED.replace(old, new))
    if message is None:
        assert plan.read(path).layout is not None
        return
    with pytest.raises(ValueError, match=message):
        plan.read(path)
    path.write_text(COMPARED.replace(old, new).replace('worst = true\nceiling = "labels alone"', ""))
    assert plan.read(path).layout is not None  # nothing is compared


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("none = {}", "none = { budget = 8 }"),
        ('drift = { accept = "drift" }', 'drift = { accept = "drift", budget = 8 }'),
    ],
)
def test_budgets_may_differ_where_no_ceiling_is_as_nothing_is_shown_beyond_the_smallest(
    tmp_path: Path, old: str, new: str
) -> None:
    path = tmp_path / "budgets.toml"
    text = COMPARED.replace('ceiling = "labels alone"', "").replace(old, new).replace("at = [5]", "at = [8]")
    path.write_text(text)
    assert {cell.budget for cell in plan.read(path).cells} == {8, 9}
    path.write_text(text.replace("at = [8]", "at = [9]"))
    with pytest.raises(ValueError, match="expected at <= the budget of every cell, but got 9"):
        plan.read(path)


def test_the_budget_of_an_attack_changes_nothing_within_it() -> None:
    images = torch.randint(256, (8, 1, 6, 6), generator=torch.Generator().manual_seed(0)) / 255
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4)).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(4, 36, generator=torch.Generator().manual_seed(1)))
        labels = network(images).argmax(1)
    for accept in ("greedy", "drift", "reverse"):
        short, long = (
            qf.attack(network, images, labels, "square", eps=13 / 255, budget=budget, accept=accept).fooled_at.numpy()
            for budget in (10, 60)
        )
        assert ((long > 10) & (long <= 60)).any(), accept  # so that the budget matters
        assert np.array_equal(np.minimum(short, 11), np.minimum(long, 11)), accept


def test_the_frontier_says_all_figures_of_each_point() -> None:
    columns = {"good": [cell([None] * 8 + [5] * 2)], "bad": [cell([5] * 10)], "blind": [cell([5] * 10, loss=None)]}
    found = frontier.points(columns, 100)
    assert [(p.label, p.left) for p in found] == [("good", 0.8), ("bad", 0.0)]
    assert found[0].auroc == 1.0
    picture = frontier.frontier(found, 100)
    assert "<title>good: 80.0 % left after 100 queries" in picture.svg
    assert "AUROC 100.0 %" in picture.svg


def test_corners_are_known_by_their_defenses_whatever_they_are_called() -> None:
    stacks: dict[str, tuple[str, ...]] = {
        "undefended": ("aaa",), "A": (), "labels alone": ("label_only", "output_noise"), "B": ("aaa", "label_only"),
    }  # fmt: skip
    columns = {label: [cell([None] * i + [5] * 4, defenses=s)] for i, (label, s) in enumerate(stacks.items())}
    found = frontier.points({**columns, "a service": [cell([None], defenses=(), audited=True)]}, 100)
    assert [p.corner for p in found] == ["", "undefended", "", "labels alone", ""]
    for picture in shown(found):
        for name in ("undefended", "labels alone"):
            assert picture.svg.count(f">{name}</text>") == 2, "one in the legend, one at the point"
        assert "<title>A (undefended): " in picture.svg


def shown(found: list[Point]) -> list[Picture]:
    picture = frontier.frontier(found, 100)
    return [picture, *picture.others]


def drawn(picture: Picture) -> Axes:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, picture.height))
        picture.plot(figure)
        figure.draw_without_rendering()
    return figure.axes[0]


def point(label: str, auroc: float, ece: float, left: float, corner: str = "") -> Point:
    return Point(label, auroc, ece, 1.0, left, Interval(max(left - 0.05, 0), left + 0.05), 9, corner)


FIVE = [
    point("none", 0.94, 0.02, 0.0, "undefended"),
    point("labels", 0.5, 0.07, 0.13, "labels alone"),
    point("near", 0.93, 0.01, 0.04),
    point("beside", 0.88, 0.09, 0.0),
    point("same", 0.8, 0.01, 0.04),
]


def test_the_line_of_each_axis_is_what_no_defense_is_beyond() -> None:
    over_auroc, over_ece = shown(FIVE)
    assert [over_auroc.choice, over_ece.choice] == ["AUROC", "ECE"]
    assert sorted({**over_auroc.files()}) == [
        f"worst-case-and-{name}.{kind}" for name in ("calibration", "usefulness") for kind in ("png", "svg")
    ]
    for picture, corners in (
        (over_auroc, [(50, 13), (50, 4), (93, 4), (93, 0), (94, 0), (94, 0)]),
        (over_ece, [(7, 13), (7, 4), (1, 4), (1, 4), (1, 4), (1, 0)]),
    ):
        axes = drawn(picture)
        (line,) = [line for line in axes.lines if line.get_linestyle() == ":"]
        left = axes.get_xlim()[0]
        assert np.allclose(line.get_xydata(), [(left, 13), *corners])
    assert drawn(over_ece).xaxis_inverted()
    assert "less is better" in drawn(over_ece).get_xlabel()
    assert not drawn(over_auroc).xaxis_inverted()


def test_a_point_without_an_auroc_is_left_out_of_that_figure_alone() -> None:
    found = [*FIVE, point("never wrong", float("nan"), 0.03, 0.2, "undefended")]
    over_auroc, over_ece = map(drawn, shown(found))
    lines = [next(line for line in axes.lines if line.get_linestyle() == ":") for axes in (over_auroc, over_ece)]
    assert [max(line.get_ydata()) for line in lines] == [13, 20]
    assert [len(axes.texts) for axes in (over_auroc, over_ece)] == [2, 3]
    assert not any(drawn(shown(found[-1:])[0]).texts)


def test_no_two_of_40_points_look_alike_and_none_is_cut() -> None:
    found = [point(str(i), 0.5 + i / 100, i / 100, i / 50) for i in range(40)]
    for picture in shown(found):
        axes = drawn(picture)
        marks = [line for line in axes.lines if line.get_gid()]
        assert len({(line.get_color(), line.get_marker()) for line in marks}) == len(marks) == 40
        least, bottom = axes.transData.transform((0, 0))[1], axes.get_window_extent().y0
        assert least - bottom > 3 * axes.get_figure(root=True).dpi / 72  # half a marker


def test_names_cover_no_point_and_stay_within_the_figure() -> None:
    for picture in shown(FIVE):
        axes = drawn(picture)
        figure = axes.get_figure(root=True)
        assert sorted(text.get_text() for text in axes.texts) == ["labels alone", "undefended"]
        for text in axes.texts:
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 + 1
            assert box.y0 > axes.get_window_extent().y0 - 1
            for p in FIVE:
                value = p.auroc if picture.choice == "AUROC" else p.ece
                assert not box.contains(*axes.transData.transform((100 * value, 100 * p.left)))
            x, y = axes.transData.transform(text.xy)
            assert abs(y - (box.y0 + box.y1) / 2) < 20
            assert min(abs(x - box.x0), abs(x - box.x1)) < 15


def test_pictures_of_a_page_share_no_names_that_are_referred_to() -> None:
    names = [set(re.findall(r'(?:url\(|href=")#([^)"]+)', picture.svg)) for picture in shown(FIVE)]
    assert all(names)
    assert not names[0] & names[1]
