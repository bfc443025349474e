"""QueryNet move by move: what it learns from, what its surrogates propose and choose, when Square goes on alone."""

import pytest
import torch

from helpers import Linear, Watch, images, labels_of
from queryfoil.attacks import build as build_attack
from queryfoil.attacks import querynet, surrogate
from queryfoil.attacks.querynet import QueryNet, along_the_gradient, choose, evaluate
from queryfoil.attacks.square import Square
from queryfoil.oracle import Oracle, quantize
from queryfoil.run import run
from queryfoil.task import Task, length

QUICK = QueryNet(steps=2, batch=8, width=4)
EPS = {"linf": 8 / 255, "l2": 0.25}
both_norms = pytest.mark.parametrize("norm", EPS)


def task_of(model, x, norm="linf", **other):
    return Task.create(x, labels_of(model, x), norm=norm, **{"eps": EPS[norm], **other})


class Played:
    """QueryNet, step by step: the states, and the rows asked, images sent and answers of each query."""

    def __init__(self, attack, model, task, steps, budget=10**6):
        self.task, self.sent, self.states = task, [], []
        oracle = Oracle(
            model, task, budget, observe=lambda ids, queries, sent, scores: self.sent.append((sent, scores))
        )
        oracle(task.images)
        self.right = oracle.live.clone()
        self.states.append(attack.init(task, oracle))
        for t in range(steps):
            self.states.append(attack.step(task, oracle, self.states[-1], t))
        assert len(self.sent) == 2 + steps  # one query for each live image a round


class Brightness:
    """Scores whose margin for label 0 is looked up by the brightness of the image."""

    def __init__(self, table):
        self.table = torch.tensor(table)

    def __call__(self, x):
        lead = self.table[(x.flatten(1)[:, 0] * 255).round().long()]
        return torch.stack([lead, torch.zeros_like(lead)], 1)


@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize(
    ("weights", "best"),
    [
        ((1.0, 1.0, 0.0), [1, 1]),  # means 2, 1, 3
        ((1.0, 0.0, 0.0), [0, 0]),  # first alone: 0, 2, 5
        ((0.1, 1.0, 0.0), [2, 2]),  # second, nearly alone: 4, 0.2, 0.1 and more
        ((1.0, 1.0, 9.0), [1, 1]),  # Square's own weight says nothing about a proposal
    ],
)
def test_the_lowest_weighted_mean_of_the_surrogates_margins_is_chosen(weights, best, batch):
    task = Task.create(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))
    candidates = (torch.arange(3.0) / 255).view(3, 1, 1, 1, 1).expand(3, 2, 1, 8, 8)
    networks = [Brightness([0.0, 2.0, 5.0]), Brightness([4.0, 0.0, -1.0])]
    assert choose(task, candidates, networks, torch.tensor(weights), batch).tolist() == best


def test_each_image_gets_the_candidate_that_is_best_for_it():
    task = Task.create(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
    candidates = (torch.arange(2.0) / 255).view(2, 1, 1, 1, 1).expand(2, 2, 1, 8, 8)
    assert choose(task, candidates, [Brightness([1.0, 3.0])], torch.tensor([1.0, 0.0])).tolist() == [0, 1]


def test_a_weight_is_the_share_improved_of_those_for_which_an_attacker_was_chosen():
    choice = torch.tensor([0] * 20 + [1] * 10 + [2] * 9 + [3] * 11)
    improved = torch.tensor([True] * 5 + [False] * 15 + [True] * 7 + [False] * 3 + [True] * 9 + [False] * 11)
    assert evaluate(choice, improved, 4).tolist() == pytest.approx([0.25, 0.7, 0, 0])  # the third had only 9


def test_of_few_images_a_quarter_is_enough_and_attackers_never_chosen_are_no_error():
    choice, improved = torch.tensor([0, 0, 1, 2, 0]), torch.tensor([True, False, True, True, False])
    assert evaluate(choice, improved, 4).tolist() == pytest.approx([1 / 3, 0, 0, 0])  # 1 is less than 5 / 4
    assert evaluate(torch.tensor([1]), torch.tensor([True]), 4).tolist() == [0, 1, 0, 0]


@both_norms
@pytest.mark.parametrize("targeted", [False, True])
def test_a_step_along_the_gradient_is_the_best_move_on_a_linear_model(norm, targeted):
    model, x = Linear(), images(200, low=60, high=190)
    task = task_of(model, x, norm, targets=model(x).detach().topk(3).indices[:, 2] if targeted else None)
    best = Square().start(task)
    with torch.no_grad():
        moved = along_the_gradient(task, best, model_in_floats(model), batch=64)
        before, after = (model_in_floats(model)(y) for y in (best, moved))
    if targeted:  # towards the target
        change = (after.log_softmax(1) - before.log_softmax(1)).gather(1, task.targets[:, None])
        assert float((change > 0).float().mean()) > 0.99
    else:
        change = (after.log_softmax(1) - before.log_softmax(1)).gather(1, task.labels[:, None])
        assert float((change < 0).float().mean()) > 0.99
    assert float((task.margin(after) < task.margin(before)).float().mean()) > 0.9
    size = (moved - x).abs().flatten(1).amin(1) if norm == "linf" else length(moved - x)
    torch.testing.assert_close(size, torch.full((200,), task.eps))  # in L-inf at a corner of the ball


def model_in_floats(model):
    """The linear model without its rounding to bytes, which has no gradient."""
    return lambda x: (255 * x.flatten(1) @ model.weight.detach().T + model.bias.detach()) / 1024


@both_norms
def test_a_step_stays_in_the_ball_and_in_0_to_1_and_a_flat_surrogate_moves_nothing(norm):
    x = images(30, (3, 6, 9))
    x[:10] = (x[:10] > 0.5).float()
    task = Task.create(x, torch.zeros(30, dtype=torch.int64), norm=norm, eps=EPS[norm])
    best = Square().start(task)
    for network in surrogate.build("small", x, 5, 4, seed=0):
        moved = along_the_gradient(task, best, network, batch=7)
        assert bool(task.contains(moved).all())
        assert 0 <= float(moved.min()) < float(moved.max()) <= 1
        assert float((moved != best).flatten(1).any(1).float().mean()) == 1
    flat = along_the_gradient(task, best, lambda y: 0 * y.flatten(1)[:, :5])
    assert bool(task.contains(flat).all())
    if norm == "linf":
        torch.testing.assert_close(flat, best)


@both_norms
def test_it_learns_from_the_clean_images_and_all_it_asked_and_only_those_that_are_live(norm, monkeypatch):
    sizes = []

    def spy(task, candidates, *other):
        sizes.append(tuple(candidates.shape[:2]))
        assert bool(torch.stack([task.contains(x) for x in candidates]).all())
        return choose(task, candidates, *other)

    monkeypatch.setattr(querynet, "choose", spy)
    model, x = Linear(), images(40)
    labels = labels_of(model, x)
    labels[::5] = (labels[::5] + 1) % 10  # wrong from the start
    played = Played(QUICK, model, Task.create(x, labels, norm=norm, eps=EPS[norm]), steps=3)
    assert all(len(state.surrogates) == 3 for state in played.states)
    clean = (played.sent[0][0][played.right], played.sent[0][1][played.right])
    assert len(clean[0]) == 32
    for n, state in enumerate(played.states):
        sent, answers = zip(clean, *played.sent[1 : 2 + n], strict=True)
        assert torch.equal(state.asked.float() / 255, torch.cat(sent))
        assert torch.equal(state.answers, torch.cat(answers))
    asked = [len(sent) for sent, _ in played.sent]
    assert asked[2] > asked[-1]  # some were fooled
    assert sizes == [(4, n) for n in asked[2:]]


def test_the_weights_start_with_one_for_each_surrogate_and_then_are_what_helped(monkeypatch):
    seen = []

    def spy(choice, improved, attackers):
        seen.append((choice, improved))
        return evaluate(choice, improved, attackers)

    monkeypatch.setattr(querynet, "evaluate", spy)
    model = Linear(lead=100)
    played = Played(QUICK, model, task_of(model, images(40)), steps=2)
    assert played.states[0].weights.tolist() == [1, 1, 1, 0]
    for before, after, (choice, improved) in zip(played.states, played.states[1:], seen, strict=False):
        assert torch.equal(improved, after.loss < before.loss)
        assert torch.equal(after.weights, evaluate(choice, improved, 4))
        moved = (after.best != before.best).flatten(1).any(1)
        assert torch.equal(moved, improved)  # kept exactly where the loss fell
    assert 5 < int(seen[0][1].sum()) < 40


@pytest.mark.parametrize("weights", [(0.2, 0.1, 0.3, 0.3), (0.0, 0.0, 0.0, 0.5), (0.0, 0.0, 0.0, 0.0)])
@both_norms
def test_square_goes_on_alone_once_no_surrogate_helps_more(norm, weights, monkeypatch):
    monkeypatch.setattr(querynet, "evaluate", lambda *_: torch.tensor(weights))
    model, trained = Linear(lead=100), []
    monkeypatch.setattr(surrogate, "train", lambda *_: trained.append(1))
    attack = QueryNet(p_init=0.2, horizon=100)
    task = task_of(model, images(12), norm)
    played = Played(attack, model, task, steps=4)
    assert len(trained) == 3  # before the one query
    for t in (1, 2, 3):
        assert played.states[t].surrogates == ()
        assert len(played.states[t].asked) == len(played.states[t].answers) == 0
        proposed = Square(p_init=0.2, horizon=100).propose(task, played.states[t].best, t)
        assert torch.equal(played.sent[t + 2][0], quantize(proposed))


def test_surrogates_stay_while_one_helps_more_than_square(monkeypatch):
    monkeypatch.setattr(querynet, "evaluate", lambda *_: torch.tensor([0.0, 0.11, 0.0, 0.1]))
    model = Linear(lead=100)
    played = Played(QUICK, model, task_of(model, images(6)), steps=3)
    assert len(played.states[-1].surrogates) == 3


@pytest.mark.parametrize("kind", ["small", pytest.param("search", marks=pytest.mark.slow)])
def test_three_rounds_with_each_kind_of_surrogates(kind, monkeypatch):
    monkeypatch.setattr(surrogate, "CELLS", (3, 1, 1))
    model = Linear((3, 5, 6), classes=3, lead=100)
    attack = QueryNet(kind, steps=None if kind == "small" else 1, batch=8, width=4)
    played = Played(attack, model, task_of(model, images(12, (3, 5, 6))), steps=3)
    assert len(played.states[2].surrogates) == 3  # trained before each of three queries
    assert [len(sent) for sent, _ in played.sent] == [12] * 5
    assert bool((played.states[-1].loss <= played.states[0].loss).all())
    assert bool((played.states[-1].loss < played.states[0].loss).any())


@both_norms
@pytest.mark.usefixtures("same_random_states")
def test_two_runs_are_the_same_also_without_gradients_around(norm):
    model = Linear()
    task = task_of(model, images(40), norm)
    first = run(QUICK, model, task, 8)
    with torch.no_grad():
        second = run(QUICK, model, task, 8)
    assert torch.equal(first.fooled_at, second.fooled_at)
    assert torch.equal(first.adversarial, second.adversarial)


@both_norms
def test_it_fools_more_images_of_a_linear_model_than_square(norm):
    model = Linear()
    task = task_of(model, images(40), norm)
    assert run(QueryNet(), model, task, 5).accuracy() <= run(Square(), model, task, 5).accuracy() - 0.1


def test_the_presets_are_the_papers():
    assert build_attack("querynet", preset="cifar10") == QueryNet("search", steps=500, batch=128)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"surrogates": "large"}, "unknown kind of surrogates 'large': expected one of search, small"),
        ({"steps": 0}, "expected steps as a whole number >= 1, but got 0"),
        ({"batch": 0}, "expected batch as a whole number >= 1, but got 0"),
        ({"width": 6}, "expected width as a multiple of 4.*got 6"),
        ({"width": 0}, "expected width as a whole number >= 4, but got 0"),
        ({"p_init": 2.0}, "expected p_init"),
        ({"horizon": 0}, "expected horizon"),
    ],
)
def test_wrong_hyper_parameters_raise(wrong, says):
    with pytest.raises(ValueError, match=says):
        QueryNet(**wrong)


def test_searching_surrogates_refuse_images_that_they_cannot_halve_before_a_query():
    watch = Watch(Linear((1, 4, 4)))
    task = Task.create(images(3, (1, 4, 4)), torch.zeros(3).long(), eps=16 / 255)
    with pytest.raises(
        ValueError, match=r"at least 8 x 8 for surrogates='search'.* got \(4, 4\); take surrogates='small'"
    ):
        run(QueryNet(surrogates="search"), watch, task, 5)
    assert watch.batches == []
