"""The worst case over attacks and seeds, and the frontier."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from queryfoil import table
from queryfoil.report import frontier
from queryfoil.report.worst import behind, worst

NEVER = int(table.fooled_at(pa.table({"fooled_at": pa.array([None], pa.int64())}))[0])


def cell(
    fooled_at: list[int | None],
    seed: int = 0,
    loss: str | None = "margin",
    ids: list[int] | None = None,
    attack: str = "square",
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
    settings = SimpleNamespace(seed=seed, loss=loss, attack=attack, accept="greedy")
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


def test_the_bound_of_a_difference_is_paired_and_one_sided() -> None:
    better, worse = worst([cell([None] * 90 + [5] * 10)]), worst([cell([None] * 85 + [5] * 15)])
    assert better is not None
    assert worse is not None
    change, low = behind(worse, better, 100)
    assert change == pytest.approx(-0.05)
    assert -0.10 < low < -0.05  # unpaired the spread would be twice that
    assert behind(better, better, 100) == (0.0, 0.0)


def test_the_frontier_marks_what_no_other_defense_dominates_and_says_all_figures() -> None:
    columns = {"good": [cell([None] * 8 + [5] * 2)], "bad": [cell([5] * 10)], "blind": [cell([5] * 10, loss=None)]}
    found = frontier.points(columns, 100)
    assert [(p.label, p.left) for p in found] == [("good", 0.8), ("bad", 0.0)]
    assert found[0].auroc == 1.0
    picture = frontier.frontier(found, 100)
    assert "<title>good: 80.0 % left after 100 queries" in picture.svg
    assert "AUROC 100.0 %" in picture.svg
