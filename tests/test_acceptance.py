"""Acceptance rules on made-up losses, and op and bi in attacks."""

import pytest
import torch

import queryfoil as qf
from helpers import Linear, Played, images, labels_of
from queryfoil.attacks import ACCEPTANCE, build, settings
from queryfoil.attacks.acceptance import GREEDY, Bidirectional, Opposite
from queryfoil.attacks.square import Square
from queryfoil.plan import Cell
from queryfoil.task import Task

RISES = torch.tensor([-9.0, -3.01, -3.0, -1.0, 0.0, 1.0, 3.0, 3.01, 9.0])


def decide(rule, rises, memory=None):
    current = torch.full_like(rises, 10)
    memory = rule.start(current) if memory is None else memory
    accepted, memory = rule(current, current + rises, memory)
    return accepted.tolist(), memory


def test_greedy_accepts_a_strict_fall():
    assert decide(GREEDY, RISES)[0] == [True] * 4 + [False] * 5


def test_opposite_accepts_any_rise_and_a_fall_beyond_the_threshold():
    assert decide(Opposite(3.0), RISES)[0] == [True, True, False, False, False, True, True, True, True]
    assert decide(Opposite(0.5), RISES)[0] == [True] * 4 + [False] + [True] * 4


def test_bidirectional_is_greedy_until_a_rise_beyond_the_threshold_and_then_opposite_for_good():
    rule = Bidirectional(3.0)
    accepted, memory = decide(rule, RISES)
    assert accepted == [True] * 4 + [False] * 5  # the turn takes effect at the next query
    assert memory[:, 0].tolist() == [False] * 7 + [True] * 2
    accepted, memory = decide(rule, torch.full_like(RISES, -1.0), memory)
    assert accepted == [True] * 7 + [False] * 2
    assert memory[:, 0].tolist() == [False] * 7 + [True] * 2
    assert decide(rule, torch.full_like(RISES, 1.0), memory)[0] == [False] * 7 + [True] * 2
    assert decide(rule, torch.full_like(RISES, -9.0), memory)[0] == [True] * 9


def test_each_image_has_a_memory_of_its_own():
    for kind in ACCEPTANCE.values():
        memory = kind().start(RISES)
        assert memory.shape[0] == len(RISES)
        for rows in (slice(0, 4), slice(4, 9)):
            part, kept = decide(kind(), RISES[rows], memory[rows])
            whole, all_kept = decide(kind(), RISES, memory)
            assert part == whole[rows]
            assert torch.equal(kept, all_kept[rows])


def test_the_threshold_is_half_the_defenses_tau_where_it_is_known():
    assert build("square", "op").accept == Opposite(3.0)
    assert build("square", "bi", tau=2.3).accept == Bidirectional(1.15)
    assert build("simba", "bi", tau=2.3, threshold=0.5).accept == Bidirectional(0.5)
    assert build("square", tau=2.3).accept == GREEDY


def test_the_rule_and_its_parameters_are_among_the_settings():
    attack = build("square", "bi", threshold=2.0, p_init=0.1)
    assert settings(attack) == {"p_init": 0.1, "horizon": 10000, "accept": "bi", "threshold": 2.0}
    assert settings(build("nes")) == {"probe": 0.01, "lr": 2 / 255, "pairs": 20}


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), float("inf"), True, "3"])
def test_a_threshold_that_is_no_positive_number_raises(threshold):
    for kind in (Opposite, Bidirectional):
        with pytest.raises(ValueError, match=r"expected threshold > 0 and finite.*got"):
            kind(threshold)


@pytest.mark.parametrize("name", ["square", "simba", "signhunter"])
@pytest.mark.parametrize("accept", ["op", "bi"])
def test_a_search_moves_exactly_where_its_rule_accepts(name, accept):
    model = Linear(lead=100)
    x = images(20)
    task = Task.create(x, labels_of(model, x), eps=8 / 255, loss="margin")
    attack = build(name, accept, threshold=0.4)
    played = Played(attack, model, task, 40)
    ties = name == "signhunter"
    moves = 0
    for before, after, sent in zip(played.states, played.states[1:], played.sent[-40:], strict=False):
        shown = task.objective(model(sent))
        accepted, memory = attack.accept(before.loss, shown, before.memory)
        accepted |= ties & (shown == before.loss)
        assert torch.equal(after.loss, torch.where(accepted, shown, before.loss))
        assert torch.equal(after.memory, memory)
        moves += int((accepted & (shown > before.loss)).sum())
    assert moves > 5  # uphill, which greedy never does


def test_opposite_search_undoes_the_curve_that_is_its_own_inverse():
    images_ = qf.data.load("fashion-mnist", "attack")[:40]
    model = qf.models.load("fashion-resnet")
    protected = qf.AAA(model, tau=6.0)
    left = {
        accept: qf.attack(protected, images_.images, images_.labels, eps=16 / 255, budget=150, accept=accept).accuracy()
        for accept in ("greedy", "op")
    }
    assert left["op"] < left["greedy"] - 0.2


def test_a_cell_of_a_plan_takes_a_rule_and_its_threshold():
    about = {"label": "a", "dataset": "fashion-mnist", "model": "fashion-resnet", "eps": 0.1, "budget": 5, "n": 2}
    cell = Cell(attack="square", accept="bi", hyper={"threshold": 1.5}, **about)
    assert cell.build(tau=9.0) == Square(accept=Bidirectional(1.5))
    assert Cell(attack="square", accept="bi", **about).build(tau=9.0) == Square(accept=Bidirectional(4.5))
    with pytest.raises(ValueError, match="threshold > 0"):
        Cell(attack="square", accept="bi", hyper={"threshold": -1.0}, **about)
