"""Undoing AAA-sine: roots against a grid and by hand, the choice among them, and attacks that follow them."""

import pytest
import torch
from torch import nn

import queryfoil as qf
from helpers import Linear, images, labels_of
from queryfoil import bench, plan
from queryfoil.attacks import READINGS, build, modules, settings
from queryfoil.attacks.adaptive import Adaptive
from queryfoil.attacks.sine import Door, InvertSine, Tracked, peak, sine_roots
from queryfoil.defenses.disguise import target_margin
from queryfoil.losses import LOSSES
from queryfoil.oracle import Oracle
from queryfoil.run import run
from queryfoil.task import Task


@pytest.mark.parametrize(("shown", "raw"), [(0.3627, 4.0), (4.6373, 1.0), (9.0, 9.0), (6.0, 6.0), (6.539, 6.1)])
def test_the_raw_margin_is_one_of_the_roots(shown, raw):
    roots = sine_roots(torch.tensor([shown]))[0]
    assert float((roots - raw).abs().nan_to_num(9).min()) < 1e-3


@pytest.mark.parametrize(("tau", "alpha"), [(6.0, 0.7), (2.0, 0.4), (1.0, 0.1)])
def test_roots_are_all_crossings_of_the_curve_and_nothing_else(tau, alpha):
    raw = torch.linspace(0.001, 3 * tau - 0.001, 30_001, dtype=torch.float64)
    curve = target_margin(raw, "sine", tau, alpha)
    shown = torch.rand(60, generator=torch.Generator().manual_seed(0)).double() * 3 * tau
    roots = sine_roots(shown, tau, alpha)
    for margin, found in zip(shown, roots, strict=True):
        crossings = int(((curve[:-1] > margin) != (curve[1:] > margin)).sum())
        there = found[~found.isnan()]
        assert len(there) == crossings
        assert torch.equal(there, there.sort().values)
        torch.testing.assert_close(target_margin(there, "sine", tau, alpha), margin.expand(len(there)))
    if alpha > 0.16:
        assert {len(found[~found.isnan()]) for found in roots} == {1, 3}


def test_a_curve_whose_intervals_overlap_is_refused():
    InvertSine(alpha=0.72)
    with pytest.raises(ValueError, match=r"alpha of at most 0\.73"):
        InvertSine(alpha=0.75)
    with pytest.raises(ValueError, match="expected tau > 0"):
        InvertSine(tau=0)
    with pytest.raises(ValueError, match="unknown first root 'up'"):
        InvertSine(first="up")
    with pytest.raises(ValueError, match="sees labels alone"):
        build("rays", reading="invert_sine")
    with pytest.raises(ValueError, match="learns from all images at once"):
        build("querynet", reading="invert_sine")


def test_the_first_root_is_the_one_that_was_asked_for():
    margins = torch.tensor([4.6373, 6.0])
    low, middle, high = (InvertSine(first=first).start(margins) for first in ("low", "middle", "high"))
    torch.testing.assert_close(torch.stack([low, middle, high]), sine_roots(margins)[[0, 1], :].T.nan_to_num(6.0))


def test_the_nearest_root_is_followed():
    reading, last = InvertSine(), torch.tensor([0.0, 2.4, 4.2, 9.0]).double()
    followed = reading.follow(torch.full((4,), 4.6373), last)
    torch.testing.assert_close(followed, sine_roots(torch.tensor([4.6373]))[0][[0, 1, 2, 2]])


class Shown(nn.Module):
    """Two classes; what AAA-sine shows of a raw margin of a tenth of the first pixel's level, and its sign, from 60."""

    def forward(self, x):
        signed = ((x[:, 0, 0, 0] * 255).round() - 60) / 10
        lead = target_margin(signed.abs(), "sine", 6.0, 0.7) * signed.sign()
        return torch.stack([lead, torch.zeros_like(lead)], 1)


def door_at(level, root, targets=None):
    """A door before two images of one grey level, with the last root (2,) that was read of them."""
    start = torch.full((2, 1, 2, 2), level / 255)
    task = Task.create(start, torch.zeros(2).long(), targets=targets, eps=1.0)
    oracle = Oracle(Shown().eval(), task, 1000)
    return Door(oracle, InvertSine(), torch.tensor(root).double(), oracle(start).argmax(1))


def test_a_door_follows_a_path_within_a_piece_and_keeps_rows_that_were_not_asked():
    door = door_at(161, [10.1, 10.1])
    for level in range(161, 138, -3):  # raw margins 10.1 to 8, where the curve falls; what is shown rises
        x = torch.full((2, 1, 2, 2), level / 255)
        read = door(x, torch.tensor([True, False]))
        assert float(read[0, 0]) == pytest.approx((level - 60) / 10, abs=1e-3)
        assert float(read[1, 0]) == pytest.approx(10.1, abs=1e-3)
        assert torch.equal(door.top, torch.tensor([0, 0]))
    assert door.oracle.queries.tolist() == [9, 1]


def test_a_path_through_a_turning_point_is_taken_for_one_that_turns_back():
    door = door_at(180, [12.0, 12.0])
    read = [float(door(torch.full((2, 1, 2, 2), level / 255))[0, 0]) for level in (170, 164, 161, 155)]
    assert read[:2] == pytest.approx([11.0, 10.4], abs=1e-3)
    assert 10.4 < read[2] + 0.1 < read[3]  # raw margins 10.1 and 9.5


def test_where_another_class_leads_the_root_next_to_the_boundary_is_taken():
    door = door_at(106, [4.6, 4.6], targets=torch.full((2,), 1))
    assert bool(door.live.all())
    read = door(torch.full((2, 1, 2, 2), 50 / 255))  # raw margin 1 of the other class; roots 1.00, 2.49, 5.75
    torch.testing.assert_close(read[:, 1] - read[:, 0], torch.ones(2), atol=1e-3, rtol=0)


class Sine(nn.Module):
    def __init__(self, model, tau):
        super().__init__()
        self.model, self.tau = model, tau
        self.eval()

    def forward(self, x):
        return qf.disguise(self.model(x), curve="sine", tau=self.tau, beta=0.0)


def test_where_the_curve_falls_the_reading_turns_a_search_that_was_misled():
    model, x = Linear(), images(60)
    margins = model(x).topk(2, 1).values.diff(dim=1).abs().squeeze(1)
    x = x[(margins > 1.8) & (margins < 3.2)]  # of a period of 6, well within the piece where the curve falls
    task = Task.create(x, labels_of(model, x), eps=3 / 255)

    def reached(**how):
        raw = []
        run(build("square", **how), Sine(model, 6.0), task, 60, observe=lambda ids, number, x, s: raw.append((ids, x)))
        return torch.cat([task.rows(ids).margin(model(x)) for ids, x in raw[-10:]]).mean()

    assert reached(reading="invert_sine", tau=6.0) + 0.3 < task.margin(model(x)).mean() < reached() - 0.1


@pytest.mark.parametrize(
    ("name", "how", "targeted"),
    [
        ("square", {}, True),
        ("square", {"accept": "reverse", "patience": 3}, False),
        ("square", {"accept": "drift", "neighbours": 3, "radius": 0.02}, True),
        ("simba", {"accept": "bi", "threshold": 0.1}, False),
        ("signhunter", {"accept": "op", "threshold": 0.1}, False),
        ("nes", {"pairs": 3}, False),
    ],
)
def test_it_does_not_depend_on_the_batch_whatever_it_leads(name, how, targeted):
    model, x = Sine(Linear(), 4.0), images(12)
    labels = labels_of(model, x)
    targets = (labels + 1) % 10 if targeted else None
    attack = build(name, reading="invert_sine", tau=4.0, **how)
    assert isinstance(attack, Tracked)
    loss = "margin" if "threshold" in how else attack.loss
    task = Task.create(x, labels, torch.arange(12) * 3 + 5, targets, eps=8 / 255, loss=loss)
    whole = run(attack, model, task, 30)
    parts = [run(attack, model, task.rows(rows), 30) for rows in torch.arange(12).split(5)]
    for field in ("fooled_at", "queries", "adversarial"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field
    assert int(whole.queries.max()) <= 30


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_reads_the_roots(loss):
    model, x = Sine(Linear(), 4.0), images(20)
    read, plain = (
        qf.attack(model, x, labels_of(model, x), eps=8 / 255, budget=60, loss=loss, **how)
        for how in ({"reading": "invert_sine", "tau": 4.0}, {"p_init": 0.05})
    )
    assert not torch.equal(read.fooled_at, plain.fooled_at)


def test_a_guessed_period_takes_the_place_of_the_models_and_is_refused_where_nothing_takes_it():
    model, x = qf.AAA(Linear(), tau=6.0).eval(), images(20)
    labels = labels_of(model, x)
    known, guessed, right = (
        qf.attack(model, x, labels, eps=8 / 255, budget=40, reading="invert_linear", **how).fooled_at
        for how in ({}, {"tau": 2.5}, {"tau": 6.0})
    )
    assert torch.equal(known, right)
    assert not torch.equal(known, guessed)
    with pytest.raises(ValueError, match="no part of this attack takes tau"):
        qf.attack(model, x, labels, eps=8 / 255, budget=40, tau=2.5)


def test_a_misfit_of_rule_and_loss_is_refused_through_the_wrapper():
    model, x = Sine(Linear(), 4.0), images(2)
    with pytest.raises(ValueError, match="threshold below"):
        run(
            build("simba", "bi", reading="invert_sine", tau=6.0),
            model,
            Task.create(x, torch.zeros(2).long(), loss="probability"),
            9,
        )


def test_it_runs_from_a_plan(tmp_path):
    (tmp_path / "own.toml").write_text(
        """
        name = "own"
        about = "An attacker who knows the sine"
        [defaults]
        dataset = "fashion-mnist"
        model = "fashion-resnet"
        attack = "square"
        eps = "16/255"
        budget = 4
        n = 4
        defenses = [{ name = "aaa", curve = "sine", tau = 2.5 }]
        [[cell]]
        label = "high"
        hyper = { reading = "invert_sine", first = "high" }
        [[cell]]
        label = "around"
        accept = "drift"
        hyper = { reading = "invert_sine", neighbours = 2, radius = 0.02 }
        """
    )
    own = plan.read(tmp_path / "own.toml")
    assert bench.bench(own, tmp_path / "out").left == 0
    with pytest.raises(ValueError, match="unknown first root"):
        own.cells[0].model_copy(update={"hyper": {"reading": "invert_sine", "first": "up"}}).build()


def test_it_is_chosen_by_name_with_the_period_of_the_defense_and_names_all_its_parts():
    assert READINGS["invert_sine"] is InvertSine
    attack = build(
        "square", "reverse", patience=5, reading="invert_sine", tau=4.0, first="low", neighbours=2, radius=0.1
    )
    assert attack == Tracked(attack.attack, InvertSine(4.0, 0.7, "low"))
    assert isinstance(attack.attack, Adaptive)
    found = settings(attack)
    assert (found["accept"], found["reading"], found["tau"], found["neighbours"]) == ("reverse", "invert_sine", 4.0, 2)
    assert modules(attack) == {f"queryfoil.attacks.{name}" for name in ("square", "adaptive", "tactics", "sine")}
    assert isinstance(build("nes", reading="invert_sine").attack, type(build("nes")))
    assert peak(6.0, 0.1) == 0.0
