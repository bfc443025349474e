"""Flags of recorded attacks: made-up tables that must raise each, and others that must not."""

from typing import Any

import numpy as np
import pytest

from queryfoil.flags import counting, pages, results
from queryfoil.flags.check import of_results
from queryfoil.flags.record import Record
from queryfoil.metrics import NEVER

N = 100
BUDGET = 100


def record(fooled: list[int] | int, label: str = "square", n: int = N, **changed: Any) -> Record:
    """An attack that fools the first images at these queries (or as many, at query 2, ..., 51), and no other."""
    budget = changed.get("budget", BUDGET)
    at = [2 + i % 50 for i in range(fooled)] if isinstance(fooled, int) else fooled
    fooled_at = np.array(at + [NEVER] * (n - len(at)), dtype=np.int64)
    given: dict[str, Any] = {
        "label": label, "model": "net", "defense": "d", "dataset": "images", "attack": "square", "hyper": {},
        "accept": "greedy", "loss": "margin", "norm": "linf", "eps": 0.1, "targeted": False, "seed": 0,
        "budget": budget,
        "ids": np.arange(n), "queries": np.minimum(fooled_at, budget), "fooled_at": fooled_at,
    }  # fmt: skip
    return Record(**{**given, **changed})


def blind(fooled: list[int] | int, **changed: Any) -> Record:
    return record(fooled, "blind", attack="blind_square", loss=None, **changed)


def test_scores_no_better_than_labels() -> None:
    assert results.scores_useless([record(50), blind(50)]).raised
    assert results.scores_useless([record(40), blind(50)]).raised
    assert results.scores_useless([record(50), blind(49)]).raised  # less a point
    assert results.scores_useless([record(50), blind(48)]).status == "clear"
    assert results.scores_useless([record(50), record(60, accept="op"), blind(50)]).status == "clear"  # the best counts
    assert results.scores_useless([record(4), blind(4)]).status == "not judged"  # neither fools 5 %
    assert results.scores_useless([record(5), blind(5)]).raised
    assert results.scores_useless([record(50)]).status == "not judged"
    assert results.scores_useless([blind(50)]).status == "not judged"


def test_labels_are_compared_where_something_is_left() -> None:
    """At the budget both have fooled all; at 20 queries scores are far ahead."""
    fast, slow = [2 + i // 5 for i in range(N)], [2 + i // 2 for i in range(N)]
    flag = results.scores_useless([record(fast), blind(slow)])
    assert flag.status == "clear"
    assert flag.figures["queries"] < 25
    assert results.scores_useless([record(slow), blind(fast)]).raised


def test_attacks_of_other_settings_are_not_compared() -> None:
    for other in ({"eps": 0.2}, {"norm": "l2"}, {"seed": 1}, {"targeted": True}):
        assert results.scores_useless([record(50), blind(50, **other)]).status == "not judged"
        assert results.adaptive_beats_standard([record(10), record(90, accept="op", **other)]).status == "not judged"


def test_more_queries_do_not_help() -> None:
    early = [2 + i % 20 for i in range(50)]
    assert results.stuck([record(early)]).raised
    assert results.stuck([record([*early, 80])]).status == "clear"  # gains a point
    assert results.stuck([record([2 + i % 20 for i in range(81)])]).status == "clear"  # few are left
    going_on = record([2 + i for i in range(70)], accept="op")
    assert results.stuck([record(early), going_on]).status == "clear"  # another attack goes on
    assert results.stuck([record(3, budget=4)]).status == "not judged"


def test_controls_in_other_settings_do_not_speak_for_the_defense() -> None:
    """Greedy alone is stuck at another eps; in the setting with both attacks, the other goes on."""
    early, going_on = [2 + i % 20 for i in range(50)], [2 + i for i in range(70)]
    mine = [record(early), record(going_on, accept="op"), record(early, eps=0.2), record(early, seed=1)]
    assert results.stuck(mine).status == "clear"
    assert results.stuck([*mine, record(early, accept="op", eps=0.2)]).raised


def test_larger_eps_does_not_help() -> None:
    assert results.larger_eps([record(50), record(50, eps=0.2)]).raised
    assert results.larger_eps([record(50), record(60, eps=0.2)]).status == "clear"
    assert results.larger_eps([record(100), record(100, eps=0.2)]).status == "clear"  # nothing to gain
    assert results.larger_eps([record(50), record(90, eps=1.0)]).raised  # without bound, ten are left
    assert results.larger_eps([record(50), record(98, eps=1.0)]).status == "clear"  # two may be chance
    assert results.larger_eps([record(50)]).status == "not judged"
    assert results.larger_eps([record(50), record(90, eps=0.2, accept="op")]).status == "not judged"


def test_a_ball_in_l2_has_no_bound_where_it_holds_every_image() -> None:
    clean = np.zeros((N, 1, 8, 8), np.uint8)
    assert record(1, norm="l2", eps=8.0, clean=clean).unbounded
    assert not record(1, norm="l2", eps=7.9, clean=clean).unbounded
    assert not record(1, norm="l2", eps=8.0).unbounded
    assert record(1, eps=1.0).unbounded


def test_another_attack_beats_the_standard_one() -> None:
    assert results.adaptive_beats_standard([record(50), record(60, accept="op")]).raised
    assert (
        results.adaptive_beats_standard([record(50), record(55, accept="op")]).status == "clear"
    )  # not more than five
    others = [NEVER] * 50 + [5] * 10
    flag = results.adaptive_beats_standard([record(50), record(others, accept="op")])
    assert flag.raised  # weaker alone, but of other images
    assert (flag.figures["standard"], flag.figures["worst"]) == (0.5, pytest.approx(0.4))
    assert results.adaptive_beats_standard([record(50, accept="op"), record(90, accept="drift")]).status == "not judged"
    reading = record(90, hyper={"reading": "logit_sum"})
    assert results.adaptive_beats_standard([record(50), reading]).raised  # greedy, but no standard attack
    assert results.adaptive_beats_standard([record(50)]).status == "not judged"


def test_seeds_disagree() -> None:
    assert results.seed_spread([record(50), record(70, seed=1)]).raised  # 20 points of 4.9 each
    assert results.seed_spread([record(50), record(60, seed=1), record(55, seed=2)]).status == "clear"
    assert results.seed_spread([record(50), record(70, seed=1, accept="op")]).status == "not judged"
    assert results.seed_spread([record(50)]).status == "not judged"


def test_lucky_success() -> None:
    share = np.full(N, np.nan)
    share[:10] = 0.4
    noisy = record(10, deterministic=False, confirmed=share)
    assert counting.lucky_success([noisy]).raised
    assert counting.lucky_success([record(10, confirmed=share + 0.2)]).status == "clear"
    assert counting.lucky_success([record(10, confirmed=share + 0.2), noisy]).raised  # the lowest counts
    few = np.full(N, np.nan)
    few[:2] = 0.0
    assert counting.lucky_success([record(2, deterministic=False, confirmed=few)]).status == "not judged"
    assert counting.lucky_success([record(50)]).status == "clear"  # declares that it is deterministic
    assert counting.lucky_success([record(50, deterministic=False)]).status == "not judged"
    assert counting.lucky_success([]).status == "not judged"


def test_budget_accounting() -> None:
    good = record(50)
    assert counting.budget_accounting([good]).status == "clear"
    none = np.zeros(N, dtype=np.int64)
    exact = record(50, ledger=(good.queries, none), asked=int(good.queries.sum()))
    assert counting.budget_accounting([exact]).status == "clear"
    for wrong in (
        {"queries": good.queries + 1},
        {"queries": np.where(np.arange(N) == 7, 3, good.queries)},
        {"ids": np.zeros(N, dtype=np.int64)},
        {"ledger": (good.queries + (np.arange(N) == 3), none), "asked": int(good.queries.sum())},
        {"ledger": (good.queries, none), "asked": int(good.queries.sum()) + 5},
    ):
        assert counting.budget_accounting([record(50, **wrong)]).raised, wrong
    repeats = {"ledger": (good.queries, good.queries // 5), "asked": int(good.queries.sum())}
    assert counting.budget_accounting([record(50, **repeats)]).raised
    assert counting.budget_accounting([record(50, deterministic=False, **repeats)]).status == "clear"
    assert counting.budget_accounting([]).status == "not judged"


def test_invalid_images() -> None:
    clean = np.full((N, 1, 4, 4), 100, np.uint8)
    inside, outside = clean + np.uint8(25), clean + np.uint8(26)  # 0.1 is 25.5 levels
    assert counting.invalid_images([record(5, clean=clean, adversarial=inside)]).status == "clear"
    assert counting.invalid_images([record(5, clean=clean, adversarial=outside)]).raised
    far = inside.copy()
    far[50] = 0  # not a success: nobody's adversarial image
    assert counting.invalid_images([record(5, clean=clean, adversarial=far)]).status == "clear"
    l2 = {"norm": "l2", "clean": clean, "adversarial": outside}
    assert counting.invalid_images([record(5, eps=0.4, **l2)]).status == "clear"
    assert counting.invalid_images([record(5, eps=0.395, **l2)]).status == "clear"  # up to a level a value is rounding
    assert counting.invalid_images(
        [record(5, eps=0.3, norm="l2", clean=clean, adversarial=clean + np.uint8(40))]
    ).raised
    saved = np.arange(N) != 2
    assert counting.invalid_images([record(5, clean=clean, adversarial=inside, saved=saved)]).raised
    assert counting.invalid_images([record(5)]).status == "not judged"


def test_attack_sanity() -> None:
    wrong = [record([1] * N), record([1] * N, defense="")]
    assert results.attack_sanity(wrong[:1], wrong[1:]).status == "not judged"  # no image is right at first
    assert results.attack_sanity([record(10)], [record(70, defense="")]).raised
    assert results.attack_sanity([record(10)], [record(97, defense="")]).status == "clear"
    assert results.attack_sanity([record(10)], [record(86, defense="")]).status == "clear"  # 90 % may be
    two = [record(10), record(20, accept="op")]
    strong = [record(97, defense=""), record(30, defense="", accept="op")]
    assert results.attack_sanity(two, strong).status == "clear"  # one that works is enough
    assert results.attack_sanity([record(10)], [record(97, defense="", accept="op")]).status == "not judged"
    bi = {"accept": "bi"}  # whose threshold is half of the defense's tau
    mine, plain = record(10, hyper={"threshold": 1.15}, **bi), record(99, defense="", hyper={"threshold": 3.0}, **bi)
    assert results.attack_sanity([mine], [plain]).status == "clear"


def test_tuning_leak() -> None:
    a = np.arange(5 * 16, dtype=np.uint8).reshape(5, 1, 4, 4)
    assert counting.tuning_leak(a, a[4:] + np.uint8(100)).status == "clear"
    flag = counting.tuning_leak(a, a[3:])
    assert flag.raised
    assert flag.figures["both"] == 2


def test_clean_set() -> None:
    wrong = record([1, 1, *[5] * 10])
    assert counting.clean_set([wrong], [record(50, defense="")]).figures["differ"] == 2
    assert counting.clean_set([wrong], [record(50, defense="")]).raised
    assert counting.clean_set([record(40)], [record(50, defense="")]).status == "clear"
    assert counting.clean_set([wrong], []).status == "not judged"


def test_clean_sets_are_compared_in_all_pairs_and_on_what_both_have() -> None:
    none = record(50, defense="")
    fewer = counting.clean_set([record(40, n=90)], [none])
    assert fewer.status == "clear"  # fewer images are no other answers
    assert (fewer.figures["images"], fewer.figures["partly"]) == (90, 1)
    late = record([5] * 5 + [1, 1, 1], seed=1)
    flag = counting.clean_set([record(40), late], [none, record(70, defense="", accept="op")])
    assert flag.raised
    assert (flag.figures["differ"], flag.figures["images"], flag.figures["pairs"]) == (3, N, 4)
    plain = [none, record([1] * 7, defense="", accept="op")]
    assert counting.clean_set([record(40)], plain).figures["differ"] == 7
    for other in ({"dataset": "others"}, {"model": "another"}, {"targeted": True}, {"ids": np.arange(N) + N}):
        assert counting.clean_set([record([1] * 9, **other)], [none]).status == "not judged", other
    ours, theirs = record([1] * 9), record([1] * 9, defense="")
    assert counting.clean_set([record(9, dataset="b"), ours], [theirs]).status == "clear"


def test_no_flag_of_a_model_without_a_defense_speaks_of_one_that_protects() -> None:
    flag = results.scores_useless([record(50, defense=""), blind(50, defense="")])
    assert flag.raised
    assert "defense" not in flag.measured + flag.why


def test_flags_of_images_that_are_all_wrong_are_not_judged() -> None:
    nothing = [record([1] * N), blind([1] * N), record([1] * N, accept="op"), record([1] * N, eps=0.2)]
    found = {flag.id: flag for flag in of_results(nothing, [])}
    assert found["F6"].status == found["F7"].status == found["F8"].status == "not judged"


def test_what_is_raised_is_told_with_what_could_not_be_judged() -> None:
    flags = [("AAA", of_results([record(50), record(70, accept="op")], []))]
    raised = dict(pages.raised(flags))["AAA"]
    assert [flag.id for flag in raised] == ["F9", "F14"][: len(raised)]
    text = "\n".join(pages.section(flags))
    assert "F9 another attack beats the standard one (verdict)" in text
    assert "docs/flags.md#f9-another-attack-beats-the-standard-one" in text
    assert "F16 attack weak without the defense (missing: the same attack on the undefended model)" in text
    assert pages.section([]) == []
    assert "none raised" in "\n".join(pages.section([("nobody", of_results([record(99)], [record(99, defense="")]))]))
