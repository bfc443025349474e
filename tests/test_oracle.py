"""The oracle quantizes, counts and judges. Most models here answer with the pixels themselves."""

import pytest
import torch
from torch import nn

import queryfoil as qf
from helpers import Declared, Linear, Watch, images, labels_of, levels
from queryfoil.metrics import NEVER
from queryfoil.oracle import LabelOracle, ModelError, Oracle, answers, quantize
from queryfoil.task import Task

pytestmark = pytest.mark.filterwarnings("ignore:the images are no multiples")

EPS = 51 / 255


def pixels(*rows):
    """Images (N, 1, 1, K) whose values are these scores behind `nn.Flatten`."""
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


def oracle(model, *rows, budget=5, labels=None, eps=EPS, observe=None, micro_batch=128, **goal):
    x = pixels(*rows)
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else torch.tensor(labels)
    task = Task.create(x, labels, eps=eps, **goal)
    return Oracle(model, task, budget, micro_batch, observe)


def flat():
    return Watch(nn.Flatten())


# quantization


def test_quantize_floors_to_levels_and_clips():
    x = torch.tensor([-0.3, 0.0, 0.9 / 255, 1.0 / 255, 127.99 / 255, 254.9 / 255, 1.0, 1.7])
    assert levels(quantize(x)).tolist() == [0, 0, 0, 1, 127, 254, 255, 255]


def test_a_byte_plus_or_minus_whole_levels_in_float32_is_exactly_that_byte():
    byte = torch.arange(256)[:, None]
    x = byte.float() / 255
    for sign in (1, -1):
        expected = (byte + sign * torch.arange(256)).clamp(0, 255)
        as_numbers = torch.cat([x + sign * (k / 255) for k in range(256)], 1)  # the attacks' way: eps is a float
        as_tensors = x + sign * (torch.arange(256).float() / 255)
        assert torch.equal(levels(quantize(as_numbers)), expected)
        assert torch.equal(levels(quantize(as_tensors)), expected)


def test_quantize_leaves_its_argument_alone():
    x = torch.tensor([0.5])
    quantize(x)
    assert x.item() == 0.5


# counting


def test_the_clean_image_is_query_1_and_the_budget_is_hard():
    model = flat()
    ask = oracle(model, [0.8, 0.2], [0.6, 0.2], budget=3)
    for spent in (1, 2, 3, 3, 3):
        assert ask(ask.task.images).shape == (2, 2)
        assert ask.queries.tolist() == [spent, spent]
        assert ask.spent == 2 * spent
    assert len(model.batches) == 3
    assert not bool(ask.live.any())
    assert ask.fooled_at.tolist() == [NEVER, NEVER]


def test_a_budget_of_one_is_the_clean_image():
    model = flat()
    ask = oracle(model, [0.8, 0.2], [0.2, 0.8], budget=1)
    ask(ask.task.images)
    ask(ask.task.images)
    assert len(model.batches) == 1
    assert ask.queries.tolist() == [1, 1]
    assert ask.fooled_at.tolist() == [NEVER, 1]


def test_a_finished_row_costs_nothing_and_keeps_its_last_scores():
    model = flat()
    ask = oracle(model, [0.6, 0.4], [0.8, 0.2], [0.8, 0.2])
    ask(ask.task.images)
    fooling = pixels([0.4, 0.6], [0.6, 0.2], [1.0, 0.2])
    first = ask(fooling).clone()
    again = ask(ask.task.images)
    assert again.shape == (3, 2)
    assert torch.equal(again[0], first[0])
    torch.testing.assert_close(again[1:], torch.tensor([[0.8, 0.2], [0.8, 0.2]]))
    assert torch.equal(model.batches[2], quantize(ask.task.images[1:]))
    assert ask.queries.tolist() == [2, 3, 3]
    assert ask.fooled_at.tolist() == [2, NEVER, NEVER]
    assert ask.spent == 8
    assert ask.settled == 5 + 3 + 3


def test_rows_that_are_left_out_cost_nothing_and_keep_their_scores():
    model = flat()
    ask = oracle(model, [0.6, 0.4], [0.8, 0.2], [0.7, 0.2], budget=3)
    clean = ask(ask.task.images).clone()
    moved = pixels([0.6, 0.2], [0.8, 0.0], [0.8, 0.2])
    some = ask(moved, torch.tensor([True, False, True]))
    assert torch.equal(some[1], clean[1])
    assert torch.equal(model.batches[1], quantize(moved[[0, 2]]))
    assert ask.queries.tolist() == [2, 1, 2]
    ask(moved, torch.tensor([False, False, True]))
    assert ask.queries.tolist() == [2, 1, 3]
    ask(moved, torch.tensor([False, False, True]))  # its budget is spent
    ask(moved, torch.tensor([False, False, False]))
    assert len(model.batches) == 3
    assert ask.queries.tolist() == [2, 1, 3]


def test_labels_are_all_that_the_door_for_labels_shows():
    model = flat()
    ask = oracle(model, [0.6, 0.4], [0.8, 0.2])
    ask(ask.task.images)
    door = LabelOracle(ask)
    shown = door(pixels([0.4, 0.6], [0.6, 0.2]))
    assert shown.dtype == torch.int64
    assert shown.tolist() == [1, 0]
    assert door.live.tolist() == [False, True]
    assert door(pixels([0, 0], [0.2, 0.9]), torch.tensor([True, False])).tolist() == [1, 0]
    assert ask.queries.tolist() == [2, 2]
    assert not [name for name in dir(door) if not name.startswith("_") and name != "live"]
    for value in vars(door).values():
        assert not isinstance(value, Oracle | torch.Tensor)


def test_other_shapes_than_the_tasks_raise():
    ask = oracle(flat(), [0.8, 0.2], [0.6, 0.2])
    with pytest.raises(ValueError, match=r"expected images \(2, 1, 1, 2\).*got \(1, 1, 1, 2\)"):
        ask(ask.task.images[:1])


def test_dropping_rows_changes_no_number_of_the_others():
    rows = ([0.6, 0.4], [0.2, 0.8], [0.8, 0.6], [0.9, 0.1])
    queries = [pixels(*rows), pixels([0.4, 0.6], [0, 0], [0.8, 0.6], [0.9, 0.1])]
    last = pixels([0, 0], [0, 0], [0.6, 0.8], [0.9, 0.1])
    whole, smaller = oracle(flat(), *rows), oracle(flat(), *rows)
    for ask in (whole, smaller):
        for x in queries:
            ask(x)
    kept = torch.tensor([2, 3])
    assert torch.equal(smaller.keep(kept).images, pixels(*rows)[kept])
    assert torch.equal(smaller(last[kept]), whole(last)[kept])
    for field in ("queries", "fooled_at", "adversarial"):
        assert torch.equal(getattr(smaller, field), getattr(whole, field))
    assert whole.fooled_at.tolist() == [2, 1, 3, NEVER]


def test_observe_sees_every_query_as_the_model_did():
    seen, model = [], flat()
    ask = oracle(model, [0.6, 0.4], [0.8, 0.2], ids=torch.tensor([7, 3]), observe=lambda *query: seen.append(query))
    for x in (ask.task.images, pixels([0.4, 0.6], [0.7, 0.3]), pixels([0.4, 0.6], [0.71, 0.29])):
        ask(x)
    assert [(ids.tolist(), numbers.tolist()) for ids, numbers, _, _ in seen] == [
        ([7, 3], [1, 1]),
        ([7, 3], [2, 2]),
        ([3], [3]),
    ]
    for (_, _, sent, scores), batch in zip(seen, model.batches, strict=True):
        assert torch.equal(sent, batch[: len(sent)])
        assert torch.equal(scores, sent.flatten(1))


# judging


def test_a_success_is_the_first_fooling_query_inside_the_ball():
    ask = oracle(flat(), [0.6, 0.4])
    for x in ([0.6, 0.4], [0.55, 0.45], [0.45, 0.55], [0.4, 0.6]):
        ask(pixels(x))
    assert ask.fooled_at.tolist() == [3]
    assert ask.queries.tolist() == [3]
    assert levels(ask.adversarial).flatten().tolist() == [114, 140]  # floored: what the model saw


def test_a_fooling_query_outside_the_ball_counts_but_never_wins():
    ask = oracle(flat(), [0.6, 0.4])
    for x in ([0.6, 0.4], [0.35, 0.65], [0.0, 1.0], [-1.0, 2.0], [0.6, 0.601]):
        ask(pixels(x))
    assert ask.fooled_at.tolist() == [NEVER]
    assert ask.queries.tolist() == [5]
    assert torch.equal(ask.adversarial, ask.task.images)


def test_the_l2_ball_is_judged_by_length():
    ask = oracle(flat(), [0.6, 0.4], norm="l2", eps=0.2)
    for x in ([0.6, 0.4], [0.45, 0.55], [0.46, 0.54]):  # lengths 0, 0.21, 0.198
        ask(pixels(x))
    assert ask.fooled_at.tolist() == [3]


def test_the_ball_is_judged_on_what_was_proposed_and_clipping_forgives_nothing():
    ask = oracle(flat(), [0.9, 1.0], labels=[1], eps=26 / 255)
    ask(ask.task.images)
    ask(pixels([1.2, 1.0]))  # seen as [1, 1], a tie in the ball, but proposed outside of it
    assert ask.fooled_at.tolist() == [NEVER]
    ask(pixels([1.0, 1.0]))
    assert ask.fooled_at.tolist() == [3]


def test_a_tie_for_the_top_counts_for_the_attacker():
    ask = oracle(flat(), [0.6, 0.4], [0.4, 0.4])
    ask(ask.task.images)
    ask(pixels([0.5, 0.5], [0.4, 0.4]))
    assert ask.fooled_at.tolist() == [2, 1]


@pytest.mark.parametrize("targets", [None, torch.tensor([2, 2, 1])], ids=["untargeted", "targeted"])
def test_wrong_from_the_start_costs_one_query_whatever_the_goal(targets):
    ask = oracle(flat(), [0.4, 0.6, 0.1], [0.1, 0.2, 0.3], [0.9, 0.1, 0.1], targets=targets)
    for _ in range(3):
        ask(ask.task.images)
    assert ask.fooled_at.tolist() == [1, 1, NEVER]
    assert ask.queries.tolist() == [1, 1, 3]


def test_a_targeted_attack_must_reach_its_target():
    ask = oracle(flat(), [0.5, 0.4, 0.4], targets=torch.tensor([2]))
    for x in ([0.5, 0.4, 0.4], [0.4, 0.5, 0.4], [0.4, 0.5, 0.5]):
        ask(pixels(x))
    assert ask.fooled_at.tolist() == [3]  # the second fooled the model, but not into class 2


def test_recorded_images_are_on_the_8_bit_grid():
    x = images(20)
    model = Linear()
    task = Task.create(x, labels_of(model, x))
    ask = Oracle(model, task, 9)
    ask(x)
    for seed in range(8):
        ask(task.project(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))))
    assert 0 < int((ask.fooled_at < NEVER).sum()) < 20
    levels(ask.adversarial)
    reached = task.margin(model(ask.adversarial)) <= 0
    assert torch.equal(reached, ask.fooled_at < NEVER)


# the model's side


def test_the_model_sees_each_row_once_on_the_grid_and_without_gradients():
    model = Watch(Linear(lead=100))
    x = images(5)
    ask = Oracle(model, Task.create(x, labels_of(model.model, x)), budget=4, micro_batch=2)
    for scale in (0, 0.01, 1, 1e6):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        ask(x + scale * noise)
    assert [len(batch) for batch in model.batches] == [2, 2, 1] * 4
    for batch in model.batches:
        levels(batch)
        assert 0 <= float(batch.min()) <= float(batch.max()) <= 1
    assert not any(model.gradients)
    assert not ask.scores.requires_grad


def test_the_size_of_the_micro_batch_changes_no_answer_of_a_noisy_model():
    x, model = images(5), qf.InputNoise(Linear())
    number = torch.tensor([1, 2, 1, 1, 1])
    whole = answers(model, x, torch.arange(5), number)
    assert torch.equal(answers(model, x, torch.arange(5), number, micro_batch=2), whole)
    for i in range(5):
        assert torch.equal(answers(model, x[i : i + 1], torch.tensor([i]), number[i : i + 1]), whole[i : i + 1])


def test_any_callable_is_a_model():
    ask = oracle(lambda x: x.flatten(1) * 2, [0.6, 0.4])
    torch.testing.assert_close(ask(ask.task.images), torch.tensor([[1.2, 0.8]]))


def test_a_model_that_overwrites_its_input_spoils_no_record():
    seen = []
    ask = oracle(
        lambda x: x.mul_(2).flatten(1), [0.6, 0.4], [0.8, 0.2], observe=lambda ids, queries, sent, _: seen.append(sent)
    )
    fooling = pixels([0.4, 0.6], [0.8, 0.2])
    for x in (ask.task.images, fooling):
        ask(x)
    assert ask.fooled_at.tolist() == [2, NEVER]
    assert torch.equal(seen[1], quantize(fooling))
    assert torch.equal(ask.adversarial[0], quantize(fooling)[0])


def test_probabilities_go_through_their_logarithm():
    logits = Linear()
    x = images(6)
    ids = torch.arange(6)
    found = answers(Declared(logits, "probs"), x, ids, ids)
    torch.testing.assert_close(found, logits(x).log_softmax(1).detach())
    as_declared = answers(Declared(logits, "log_probs"), x, ids, ids)
    torch.testing.assert_close(as_declared, logits(x).log_softmax(1).detach())
    assert torch.equal(answers(logits, x, ids, ids), logits(x).detach())


class Answer(nn.Module):
    """Gives the same answer to everything."""

    def __init__(self, *row, output="logits", copies=None, dtype=torch.float32):
        super().__init__()
        self.row, self.output, self.copies = torch.tensor(row, dtype=dtype), output, copies
        self.eval()

    def forward(self, x):
        return self.row.expand(self.copies or len(x), *self.row.shape)


def ask_once(model, labels=(0, 0), **goal):
    ask = oracle(model, [0.6, 0.4], [0.6, 0.4], labels=list(labels), **goal)
    return ask(ask.task.images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zero_probabilities_stay_finite_and_last(dtype):
    scores = ask_once(Answer(1.0, 0.0, 0.0, output="probs", dtype=dtype))
    assert bool(scores.isfinite().all())
    assert float(scores[0, 0]) == 0
    assert float(scores[0, 1]) < -80


def test_probabilities_may_exceed_one_by_rounding():
    one = sum(torch.full((10,), 0.1).unbind())  # a mean over ten sure members of an ensemble
    assert float(one) > 1
    assert float(ask_once(Answer(float(one), 0.0, output="probs"))[0, 0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("row", [(1.2, -0.2), (0.5, 1.5), (3.0, 1.0)])
def test_probabilities_out_of_range_raise(row):
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\].*got"):
        ask_once(Answer(*row, output="probs"))


def test_an_unknown_kind_of_output_raises():
    with pytest.raises(ValueError, match=r"expected a model's output to be logits, log_probs or probs.*got 'prob'"):
        ask_once(Answer(1.0, 0.0, output="prob"))


BAD_SCORES = {
    "NaN": (Answer(1.0, torch.nan), "expected finite scores.*got NaN or infinite"),
    "infinite": (Answer(1.0, -torch.inf), "expected finite scores.*got NaN or infinite"),
    "one class": (Answer(1.0), r"expected scores \(2, K\) with K >= 2.*got \(2, 1\)"),
    "no class axis": (lambda x: x.sum((1, 2, 3)), r"expected scores \(2, K\) with K >= 2.*got \(2,\)"),
    "three axes": (Answer((1.0, 0.0)), r"expected scores \(2, K\) with K >= 2.*got \(2, 1, 2\)"),
    "too many rows": (Answer(1.0, 0.0, copies=3), r"expected scores \(2, K\) with K >= 2.*got \(3, 2\)"),
}


@pytest.mark.parametrize(("model", "message"), BAD_SCORES.values(), ids=BAD_SCORES)
def test_scores_that_make_no_sense_raise(model, message):
    with pytest.raises(ValueError, match=message):
        ask_once(model)


def test_labels_and_targets_beyond_the_classes_raise():
    model = Answer(1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.2.*3 classes.*got 3"):
        ask_once(model, labels=(0, 3))
    with pytest.raises(ValueError, match=r"expected targets in 0\.\.2.*3 classes.*got 9"):
        ask_once(model, targets=torch.tensor([9, 1]))


def test_a_model_in_training_mode_raises():
    with pytest.raises(ValueError, match=r"expected a model in evaluation mode.*call model.eval\(\)"):
        oracle(Linear().train(), [0.6, 0.4])


def test_a_model_in_training_mode_behind_a_defense_raises():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval()
    defended = qf.InputNoise(model)
    model.train()  # a query would move the running mean
    with pytest.raises(ValueError, match=r"expected a model in evaluation mode"):
        oracle(defended, [0.6, 0.4])


@pytest.mark.parametrize("budget", [0, -1, True, 1.5, "10", None])
def test_a_budget_that_is_no_positive_integer_raises(budget):
    with pytest.raises(ValueError, match=r"expected a budget of at least 1.*got"):
        oracle(flat(), [0.6, 0.4], budget=budget)


def test_a_micro_batch_of_one_raises():
    with pytest.raises(ValueError, match=r"expected a micro-batch of at least 2.*got 1"):
        oracle(flat(), [0.6, 0.4], micro_batch=1)


def test_log_probabilities_of_zero_stay_finite():
    class Certain(nn.Module):
        output = "log_probs"

        def forward(self, x):
            return torch.tensor([1.0, 0.0, 0.0]).log().expand(len(x), 3)

    x = images(3)
    ask = Oracle(Certain().eval(), Task.create(x, torch.zeros(3).long()), budget=2)
    assert bool(ask(x).isfinite().all())
    assert float(ask.scores[0, 1]) == pytest.approx(-87.3365, abs=1e-3)


def test_what_a_model_raises_in_the_middle_of_a_run_is_said():
    class Tired(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 2:
                raise RuntimeError("out of memory")
            return Linear(lead=100)(x)

    x = images(3)
    ask = Oracle(Tired().eval(), Task.create(x, torch.zeros(3).long()), budget=9)
    ask(x), ask(x)
    with pytest.raises(ModelError, match=r"the model raised RuntimeError on images \(3, 1, 8, 8\): out of memory"):
        ask(x)
