"""A tau that an attacker states, whatever the defense's is: in plans, on the command line, in Python."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import queryfoil as qf
from helpers import Linear, images, labels_of
from queryfoil import plan
from queryfoil.attacks import build, settings
from test_flags_results import record

PLAN = """
name = "stated"
about = "An attacker who is wrong about tau"
[[cell]]
label = "inverted"
dataset = "fashion-mnist"
model = "fashion-resnet"
defenses = [{ name = "aaa", tau = 6.0 }]
attack = "square"
eps = "16/255"
budget = 9
n = 5
hyper = { reading = "invert_linear" }
"""


def cell(tmp_path: Path, hyper: str) -> plan.Cell:
    (tmp_path / "stated.toml").write_text(PLAN.replace('{ reading = "invert_linear" }', f"{{ {hyper} }}"))
    return plan.read(tmp_path / "stated.toml").cells[0]


def test_a_plan_may_state_the_tau_of_an_attacker_who_knows_the_curve(tmp_path: Path) -> None:
    known = cell(tmp_path, 'reading = "invert_linear"')
    guessed = cell(tmp_path, 'reading = "invert_linear", tau = 5.0')
    assert [settings(one.build(6.0))["tau"] for one in (known, guessed)] == [6.0, 5.0]
    assert guessed.settings()["hyper"] == {"reading": "invert_linear", "tau": 5.0}  # so its results have another name
    assert settings(cell(tmp_path, 'reading = "invert_sine", tau = 5').build(6.0))["tau"] == 5


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ("tau = 5.0", "no part of this attack takes tau, so tau=5.0 would have no effect"),
        ('reading = "scale_free", tau = 5.0', "no part of this attack takes tau"),
        ('reading = "invert_linear", tau = -1.0', "expected tau > 0"),
        ('reading = "invert_linear", tau = "much"', "tau"),
    ],
)
def test_a_tau_that_nothing_takes_or_that_is_none_is_refused(tmp_path: Path, hyper: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cell(tmp_path, hyper)


def test_it_is_that_of_python() -> None:
    model, x = Linear(), images(12, low=40, high=215)
    defended, y = qf.AAA(model, tau=2.0).eval(), labels_of(model, x)
    given = {"eps": 16 / 255, "budget": 30, "reading": "invert_linear"}
    default, same, other = (qf.attack(defended, x, y, **given, **tau) for tau in ({}, {"tau": 2.0}, {"tau": 0.7}))
    assert np.array_equal(default.fooled_at, same.fooled_at)
    assert not np.array_equal(default.fooled_at, other.fooled_at)
    assert build("square", "op", tau=4.0) == plan.build_stated("square", "op", norm="linf", tau=6.0, hyper={"tau": 4.0})


def test_attackers_who_state_another_tau_are_others_to_the_flags() -> None:
    one, two = (record(5, hyper={"reading": "invert_linear", "tau": tau}) for tau in (2.0, 3.0))
    assert one.way == two.way  # each the defense's
    stated = [replace(r, of_defense=("threshold",)) for r in (one, two)]
    assert stated[0].way != stated[1].way
