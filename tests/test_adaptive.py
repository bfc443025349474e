"""Attackers who expect a defense: tactics on made-up losses, readings against the defenses they undo, neighbours."""

import math

import pytest
import torch
from torch import nn

import queryfoil as qf
from helpers import Linear, Negated, Plateau, Watch, images, labels_of
from queryfoil.attacks import READINGS, RULES, TACTICS, build, modules, settings
from queryfoil.attacks.acceptance import Opposite
from queryfoil.attacks.adaptive import Adaptive
from queryfoil.attacks.nes import NES
from queryfoil.attacks.op_share import OppositeShare
from queryfoil.attacks.readings import InvertDashed, InvertLinear, LogitSum, ScaleFree
from queryfoil.attacks.square import Square
from queryfoil.attacks.tactics import Annealing, Drift, Explore, Reverse, SwitchDirection
from queryfoil.defenses.dld import dashed
from queryfoil.run import run
from queryfoil.task import Task

NEVER = torch.ones(1)  # a draw that refuses
ALWAYS = torch.zeros(1)


def walk(tactic, rises, chance=NEVER):
    """Which proposals an image accepts, whose loss would rise by so much each time."""
    current = torch.tensor([10.0])
    memory, accepted = tactic.start(current), []
    for rise in rises:
        took, memory = tactic.decide(current, current + rise, memory, chance)
        current = torch.where(took, current + rise, current)
        accepted.append(bool(took))
    return accepted, memory


def test_drift_accepts_ties_and_falls():
    assert walk(Drift(), [0.0, -1.0, 1.0, 0.0])[0] == [True, True, False, True]


@pytest.mark.parametrize("patience", [1, 5, 23])
def test_reverse_accepts_exactly_every_proposal_after_its_patience_where_nothing_changes(patience):
    accepted, _ = walk(Reverse(patience), [0.0] * 100)
    assert [i for i, took in enumerate(accepted) if took] == list(range(patience, 100, patience + 1))


def test_reverse_turns_round_and_starts_to_count_anew():
    accepted, memory = walk(Reverse(1), [1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0])
    # refused, forced; now climbing: up, refused, up, refused, forced; now falling: down
    assert accepted == [False, True, True, False, True, False, True, True]
    assert memory.tolist() == [[0, 0]]


@pytest.mark.parametrize("patience", [1, 5])
def test_switch_direction_accepts_nothing_where_nothing_changes_and_turns_every_time(patience):
    tactic = SwitchDirection(patience)
    directions = []
    for length in range(1, 30):
        accepted, memory = walk(tactic, [0.0] * length)
        assert not any(accepted)
        directions.append(int(memory[0, 1]))
    assert directions == [length // (patience + 1) % 2 for length in range(1, 30)]


def test_switch_direction_judges_the_proposal_that_turns_it_in_the_new_direction():
    assert walk(SwitchDirection(1), [1.0, 1.0])[0] == [False, True]
    assert walk(SwitchDirection(1), [1.0, 0.0])[0] == [False, False]
    assert walk(SwitchDirection(1), [1.0, 1.0, 1.0, -1.0, -1.0, -1.0])[0] == [False, True, True, False, True, True]


def test_annealing_accepts_ties_and_a_rise_by_its_probability():
    tactic = Annealing(heat=2.0, cooling=0.5)
    assert walk(tactic, [0.0] * 50)[0] == [True] * 50
    for rise, step in ((1.0, 0), (1.0, 2), (3.0, 1)):
        edge = math.exp(-rise / (2.0 * 0.5**step))
        for chance, took in ((edge - 1e-6, True), (edge + 1e-6, False)):
            memory = walk(tactic, [0.0] * step, NEVER)[1]
            current = torch.tensor([10.0])
            decided, _ = tactic.decide(current, current + rise, memory, torch.tensor([chance]).double())
            assert bool(decided) == took


def test_annealing_heats_again_after_more_refusals_than_its_patience():
    tactic = Annealing(heat=2.0, cooling=0.5, patience=3)
    temperatures = [float(walk(tactic, [1.0] * n)[1][0, 0]) for n in range(6)]
    assert temperatures == [2.0, 1.0, 0.5, 0.25, 2.0, 1.0]
    assert Annealing(heat=0.5, relative=True).start(torch.tensor([-4.0, 2.0]))[:, 0].tolist() == [2.0, 1.0]


def test_explore_accepts_a_fall_and_else_its_share():
    assert walk(Explore(0.5), [-1.0, 1.0, 0.0], torch.tensor([0.5]))[0] == [True, False, False]
    assert walk(Explore(0.5), [-1.0, 1.0, 0.0], torch.tensor([0.49]))[0] == [True, True, True]


def test_the_opposite_search_by_share_does_not_depend_on_the_scale_of_the_scores():
    class Scaled(nn.Module):
        def __init__(self, model, by):
            super().__init__()
            self.model, self.by = model, by
            self.eval()

        def forward(self, x):
            return self.by * self.model(x)

    model, x = Linear(), images(20)
    task = Task.create(x, labels_of(model, x), eps=16 / 255)
    found = {
        (name, by): run(build("square", name, **hyper), Scaled(model, by), task, 40).adversarial
        for name, hyper in (("op_share", {"share": 0.3}), ("op", {"threshold": 0.3}))
        for by in (1.0, 1 / 64)
    }
    assert torch.equal(found["op_share", 1.0], found["op_share", 1 / 64])
    assert not torch.equal(found["op", 1.0], found["op", 1 / 64])


def test_the_opposite_search_by_share_is_op_at_the_threshold_of_each_image():
    losses, rule = torch.tensor([4.0, -4.0, 10.0]), OppositeShare(0.25)
    memory = rule.start(losses)
    for step in (-3.0, -1.01, -1.0, -0.99, 0.0, 0.5):
        accepted, kept = rule.decide(losses, losses + step, memory, torch.zeros(3))
        for i, threshold in enumerate((1.0, 1.0, 2.5)):
            one = losses[i : i + 1]
            expected, _ = Opposite(threshold)(one, one + step, one)
            assert accepted[i] == expected[0]
        assert kept is memory
    with pytest.raises(ValueError, match="expected share > 0"):
        OppositeShare(0.0)
    with pytest.raises(ValueError, match="square does not take these hyper-parameters: threshold"):
        build("square", "op_share", threshold=1.0)
    assert settings(build("square", "op_share", share=0.2))["share"] == 0.2


@pytest.mark.parametrize("name", TACTICS)
def test_each_image_has_a_memory_of_its_own(name):
    tactic, losses = TACTICS[name](), torch.linspace(-3, 3, 7)
    chance = torch.linspace(0, 0.9, 7)
    whole = tactic.decide(losses, losses.flip(0), tactic.start(losses), chance)
    for i in range(7):
        one = slice(i, i + 1)
        part = tactic.decide(losses[one], losses.flip(0)[one], tactic.start(losses[one]), chance[one])
        assert torch.equal(part[0], whole[0][one])
        assert torch.equal(part[1], whole[1][one])


def margins(scores):
    return scores.topk(2, 1).values.diff(dim=1).abs().squeeze(1)


@pytest.mark.parametrize(("shown", "true"), [(5.0, 1.0), (2.0, 4.0), (11.9, 6.1)])
def test_the_linear_curve_is_its_own_inverse(shown, true):
    scores = torch.tensor([[0.0, shown, -1.0]])
    assert float(margins(InvertLinear(6.0)(scores))) == pytest.approx(true, abs=1e-5)


def test_linear_inversion_knows_alpha():
    assert float(margins(InvertLinear(6.0, 0.5)(torch.tensor([[4.0, 0.0]])))) == pytest.approx(1.0, abs=1e-5)


def test_linear_inversion_undoes_the_exact_solver_without_calibration():
    logits = 4 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    shown = qf.disguise(logits, tau=3.0, beta=0.0)
    some = (margins(logits) / 3).frac().sub(0.5).abs() < 0.49  # not within rounding of a border
    read = InvertLinear(3.0)(shown)
    torch.testing.assert_close(margins(read)[some], margins(logits)[some], atol=1e-3, rtol=0)
    assert torch.equal(read.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("h", [0.3, 0.5])
def test_dashed_inversion_undoes_dld(h):
    logits = 4 * torch.randn(500, 10, generator=torch.Generator().manual_seed(0)).double()
    read = InvertDashed(6.0, h)(dashed(logits, low_slope=h))
    torch.testing.assert_close(margins(read), margins(logits), atol=1e-4, rtol=0)


def test_a_random_factor_and_a_shift_are_gone_from_a_scale_free_reading():
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(ScaleFree()(logits * 7.3 + 2), ScaleFree()(logits), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="at least 3 classes"):
        ScaleFree()(logits[:, :2])


def test_the_sum_of_centred_logits_shows_the_margin_behind_dld():
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)).double()
    logits = 3 * (logits - logits.mean(1, keepdim=True))
    torch.testing.assert_close(LogitSum()(dashed(logits, canonical=False)), logits)


def test_a_reading_makes_an_attack_what_it_was_without_the_defense():
    model = Linear()
    x = images(30)
    task = Task.create(x, labels_of(model, x), eps=8 / 255)
    plain = run(Square(), model, task, 60)
    misled = run(Square(), Negated(model), task, 60)
    read = run(build("square", reading="invert_linear", tau=12.0), Negated(model), task, 60)
    assert plain.accuracy() < misled.accuracy()
    assert read.accuracy() == plain.accuracy()


@pytest.mark.parametrize("name", ["square", "simba", "signhunter"])
@pytest.mark.parametrize("accept", TACTICS)
def test_tactics_lead_each_random_search_and_do_not_depend_on_the_batch(name, accept):
    model = Linear()
    x = images(20)
    task = Task.create(x, labels_of(model, x), ids=torch.arange(20) * 3 + 5, eps=8 / 255)
    attack = build(name, accept)
    whole = run(attack, model, task, 40)
    parts = [run(attack, model, task.rows(rows), 40) for rows in torch.arange(20).split(7)]
    for field in ("fooled_at", "queries", "adversarial"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field
    greedy = run(build(name), model, task, 40)
    assert not torch.equal(greedy.adversarial, whole.adversarial) or accept in ("drift", "reverse", "switch_dir")


def test_exploring_on_a_plateau_moves_as_often_as_it_says():
    task = Task.create(images(200), torch.zeros(200).long(), eps=8 / 255)
    led = Adaptive(Square(), tactic=Explore(0.3))._led(task, 4).accept
    loss = torch.zeros(200)
    accepted, _ = led(loss, loss, led.start(loss))
    assert 0.2 < float(accepted.float().mean()) < 0.4
    again, _ = Adaptive(Square(), tactic=Explore(0.3))._led(task, 5).accept(loss, loss, led.start(loss))
    assert not torch.equal(accepted, again)


@pytest.mark.parametrize("attack", [Square(), NES(pairs=3)])
def test_every_neighbour_is_a_query_inside_the_ball(attack):
    sent = []
    task = Task.create(images(4), torch.zeros(4).long(), eps=8 / 255)
    watched = Watch(Plateau())
    how = Adaptive(attack, neighbours=3, radius=0.01)
    result = run(how, watched, task, 20, observe=lambda ids, number, x, scores: sent.append((ids, x)))
    assert result.queries.tolist() == [20] * 4
    assert sum(map(len, watched.batches)) == 80
    for ids, x in sent:
        assert bool(((x - task.images[ids]).abs() <= task.eps + 1e-6).all())
    ids, x = sent[4]
    assert not torch.equal(x, sent[5][1])


class Spiky(nn.Module):
    """Two classes; class 0 leads by 4, and by 1 more on average where the first pixel is odd."""

    def forward(self, x):
        odd = ((x[:, 0, 0, 0] * 255).round() % 2).float()
        return torch.stack([4 + odd, torch.zeros_like(odd)], 1)


def test_the_answers_to_the_neighbours_are_averaged():
    from queryfoil.attacks.adaptive import Door
    from queryfoil.oracle import Oracle

    task = Task.create(images(64, low=100, high=100), torch.zeros(64).long(), eps=8 / 255)
    oracle = Oracle(Spiky().eval(), task, 100)
    oracle(task.images)
    door = Door(oracle, Adaptive(Square(), neighbours=9, radius=0.02))
    door(task.images)
    assert oracle.queries.tolist() == [10] * 64
    assert set(((door.scores[:, 0] - 4) * 9).round().long().tolist()) <= set(range(9))
    assert 0.2 < float(door.scores[:, 0].mean() - 4) < 0.7


@pytest.mark.parametrize("attack", ["square", "nes"])
def test_repeats_ask_about_the_same_image_again(attack):
    sent = []
    task = Task.create(images(4), torch.zeros(4).long(), eps=8 / 255)
    how = build(attack, repeats=3)
    result = run(how, Plateau(), task, 12, observe=lambda ids, number, x, scores: sent.append(x))
    assert result.queries.tolist() == [12] * 4
    assert all(torch.equal(sent[i], sent[i + 1]) for i in (0, 1, 3, 4, 6, 7, 9, 10))
    assert not torch.equal(sent[2], sent[3])
    assert settings(how) == settings(build(attack)) | {"repeats": 3}


def test_bad_combinations_are_refused():
    with pytest.raises(ValueError, match="repeats and neighbours average in two ways"):
        build("square", repeats=3, neighbours=3, radius=0.1)
    with pytest.raises(ValueError, match="expected repeats as a whole number >= 2"):
        build("square", repeats=1)
    with pytest.raises(ValueError, match="neighbours > 1 and radius > 0 go together"):
        build("square", neighbours=3)
    with pytest.raises(ValueError, match="has no acceptance rule"):
        build("nes", "reverse")
    with pytest.raises(ValueError, match="sees labels alone"):
        build("rays", reading="scale_free")
    with pytest.raises(ValueError, match="learns from all images at once"):
        build("querynet", reading="scale_free")
    with pytest.raises(ValueError, match="unknown reading"):
        build("square", reading="invert")
    with pytest.raises(ValueError, match="unknown acceptance rule 'revers'"):
        build("square", "revers")
    with pytest.raises(ValueError, match="patience"):
        build("square", "reverse", patience=0)
    with pytest.raises(ValueError, match="does not take these hyper-parameters: rho"):
        build("square", "reverse", rho=0.3)


def test_settings_and_modules_name_all_parts():
    attack = build("simba", "anneal", heat=3.0, reading="invert_dashed", tau=4.0, neighbours=2, radius=0.1)
    found = settings(attack)
    assert found["accept"] == "anneal"
    assert (found["heat"], found["reading"], found["tau"], found["neighbours"]) == (3.0, "invert_dashed", 4.0, 2)
    names = ("simba", "adaptive", "tactics", "readings")
    assert modules(attack) == {f"queryfoil.attacks.{name}" for name in names}
    assert modules(build("square", "op")) == {"queryfoil.attacks.square"}
    assert set(RULES) == {"greedy", "op", "bi", *TACTICS}
    assert {kind.name for kind in READINGS.values()} == set(READINGS)
