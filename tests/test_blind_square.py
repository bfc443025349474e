"""BlindSquare: Square's own images, whatever the answers are."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from helpers import Linear, Plateau, Played, images, labels_of
from queryfoil.attacks.blind_square import BlindSquare
from queryfoil.attacks.square import Square
from queryfoil.run import run
from queryfoil.task import Task

both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@dataclass(frozen=True)
class Everything:
    """Accepts all proposals."""

    name: ClassVar[str] = "everything"

    def start(self, losses):
        return losses.new_zeros(len(losses), 0)

    def __call__(self, current, proposed, memory):
        return torch.ones_like(current, dtype=torch.bool), memory


def task_of(norm, n=5):
    x = images(n, (3, 8, 8))
    return Task.create(x, torch.zeros(n, dtype=torch.int64), norm=norm, eps={"linf": 16 / 255, "l2": 1.5}[norm], seed=4)


@both_norms
@pytest.mark.parametrize(
    ("blind", "seeing"),
    [
        (BlindSquare("always", p_init=0.3, horizon=50), Square(p_init=0.3, horizon=50, accept=Everything())),
        (BlindSquare("never", p_init=0.3, horizon=50), Square(p_init=0.3, horizon=50)),  # equal scores never fall
    ],
    ids=["always", "never"],
)
def test_it_sends_what_square_does_that_accepts_everything_or_nothing(norm, blind, seeing):
    one, other = (Played(attack, Plateau(), task_of(norm), steps=30) for attack in (blind, seeing))
    assert len(one.sent) == 31
    assert all(torch.equal(x, y) for x, y in zip(one.sent, other.sent, strict=True))


@both_norms
@pytest.mark.parametrize("moves", ["always", "never"])
def test_no_answer_changes_what_it_sends(norm, moves):
    task = task_of(norm)
    sent = [Played(BlindSquare(moves), model, task, 8).sent for model in (Plateau(), Linear((3, 8, 8), lead=100))]
    assert all(torch.equal(x, y) for x, y in zip(*sent, strict=True))


def test_without_moves_each_image_is_one_window_away_from_the_stripes():
    played = Played(BlindSquare("never"), Plateau(), task_of("linf"), steps=20)
    start = played.sent[0]
    changed = torch.stack([(x != start).any(1).flatten(1).sum(1) for x in played.sent[1:]])
    assert int(changed.min()) >= 1
    assert int(changed.max()) <= 4  # a side of 2 is the largest
    walk = Played(BlindSquare("always"), Plateau(), task_of("linf"), steps=20)
    assert int((walk.sent[-1] != start).any(1).flatten(1).sum(1).min()) > 4


def test_it_stops_at_the_first_image_that_fools_and_aims_as_well_as_it_can_see():
    model = Linear()
    x = images(30)
    labels = labels_of(model, x)
    targets = model(x).topk(2).indices[:, 1].detach()
    for goal in (None, targets):
        result = run(BlindSquare(), model, Task.create(x, labels, targets=goal, eps=16 / 255), 100)
        fooled = result.fooled_at < 100
        shown = labels_of(model, result.adversarial)
        assert 5 <= int(fooled.sum()) < 30
        assert bool((shown != labels if goal is None else shown == goal)[fooled].all())
        assert torch.equal(result.queries, result.fooled_at.clamp(max=100))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"moves": "alway"}, "unknown moves 'alway': expected one of always, never; did you mean 'always'"),
        ({"moves": True}, "unknown moves True"),
        ({"p_init": 0}, r"expected p_init in \(0, 1\], but got 0"),
        ({"horizon": 0.5}, "expected horizon as a whole number >= 1, but got 0.5"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        BlindSquare(**chosen)
