"""Flags of a model's answers: each is raised by what it is about, and not by what it is not."""

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import Linear, images, labels_of
from queryfoil import rng
from queryfoil.defenses import DEFENSES
from queryfoil.flags import FLAGS, answers, jumps, labels, overhead, planted, scores, suite
from queryfoil.flags.flag import Flag, page_of
from queryfoil.flags.subject import Subject, between, same, top_lead
from queryfoil.task import Task

N = 40


class Scaled(nn.Module):
    """Scores of a network times a number."""

    def __init__(self, model: nn.Module, by: float) -> None:
        super().__init__()
        self.model, self.by = model, by
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.by * self.model(x)


class Around(nn.Module):
    """A made-up defense: `change` of scores and images, and what it declares."""

    def __init__(self, model: nn.Module, change: Any, **declares: bool) -> None:
        super().__init__()
        self.model, self.change = model, change
        self.__dict__.update(declares)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x), x)


def subject(model: nn.Module, raw: nn.Module | None, n: int = N, eps: float = 32 / 255, norm: str = "linf") -> Subject:
    x = images(n, low=40, high=215)
    labels = labels_of(raw or model, x)
    return Subject(model, raw, Task.create(x, labels, eps=eps, norm=norm))


@pytest.fixture(scope="module")
def linear() -> Linear:
    return Linear()


def defended(name: str, model: nn.Module, **settings: Any) -> nn.Module:
    found: nn.Module = DEFENSES[name](model, **settings)
    return found


def test_label_flips_are_raised_by_who_flips_and_not_by_the_exact_aaa(linear: Linear) -> None:
    unsure = Scaled(Linear(classes=1000), 0.05)
    for model, raw in (
        (defended("reverse_sigmoid", unsure, keep_label=False), unsure),
        (defended("input_noise", linear, std=0.3), linear),
    ):
        flag = labels.label_flips(subject(model, raw))
        assert (flag.status, flag.kind) == ("raised", "property")
        assert flag.figures["flips"] > 0
    flag = labels.label_flips(subject(defended("aaa", linear, tau=2.0), linear))
    assert flag.status == "clear"
    assert flag.figures["flips"] == 0
    assert flag.figures["images"] > N  # and some near the boundary
    assert labels.label_flips(subject(linear, None)).missing == "the undefended model; pass raw="


def test_adam_flips_answers_near_the_boundary() -> None:
    unsure = Scaled(Linear(), 0.02)  # margins far below a step of Adam
    flag = labels.label_flips(subject(defended("aaa", unsure, tau=6.0, solver="adam"), unsure))
    assert flag.raised
    assert flag.figures["flips_from_margin_0"] > 0
    assert flag.figures["flips_from_margin_4"] == 0


def test_flips_are_a_verdict_where_the_defense_declares_that_it_keeps_labels(linear: Linear) -> None:
    flips = Around(linear, lambda z, x: -z, keeps_label=True)
    flag = labels.label_flips(subject(flips, linear))
    assert (flag.status, flag.kind) == ("raised", "verdict")
    assert flag.figures["accuracy"] == 0 < flag.figures["accuracy_undefended"]


def test_images_near_the_boundary_have_a_small_margin_and_are_8_bit(linear: Linear) -> None:
    s = subject(linear, linear)
    x, rows = s.near
    assert len(x) == len(rows) > N / 2
    assert torch.equal((x * 255).round() / 255, x)
    near, far = top_lead(s.true(x, rows)), top_lead(s.true(s.task.images[rows], rows))
    assert float(near.median()) < 0.1 * float(far.median())


def test_batch_dependence(linear: Linear) -> None:
    mean = Around(linear, lambda z, x: z - z.mean(0))
    for model, kind in ((mean, "verdict"), (Around(linear, mean.change, rowwise=False), "property")):
        flag = answers.batch_dependence(subject(model, linear))
        assert (flag.status, flag.kind) == ("raised", kind)
        assert flag.figures["differing"] == flag.figures["images"] == answers.SOME
    for model in (linear, defended("aaa", linear, tau=2.0), defended("input_noise", linear), defended("rls", linear)):
        assert answers.batch_dependence(subject(model, linear)).status == "clear"
    order = Around(linear, lambda z, x: z + torch.arange(len(z))[:, None] * torch.eye(10)[0])
    assert answers.batch_dependence(subject(order, linear)).raised

    def brightest(z: Tensor, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return z + (mean == mean.max())[:, None] * (len(z) == answers.SOME) * torch.eye(10)[0]

    one = Around(linear, brightest)
    assert answers.batch_dependence(subject(one, linear)).status == "clear"  # of one image, as where rounding jumps


def test_dent_with_its_own_loss_depends_on_the_batch(network: nn.Module, clothes: Any) -> None:
    model = defended("dent", network, loss="shot", steps=1)
    some = Subject(model, network, Task.create(clothes.images[:8], clothes.labels[:8], eps=16 / 255))
    flag = answers.batch_dependence(some)
    assert (flag.status, flag.kind) == ("raised", "property")
    assert jumps.jumps(some).missing == "an answer that does not depend on the batch (see F2)"


def test_chance(linear: Linear) -> None:
    noisy = subject(defended("input_noise", linear, std=0.1), linear)
    flag = answers.chance(noisy)
    assert (flag.status, flag.kind) == ("raised", "property")
    assert flag.figures["margin_deviation"] > 0
    assert answers.chance(subject(defended("aaa", linear, tau=2.0), linear)).status == "clear"
    generator = torch.Generator().manual_seed(0)
    secretly = Around(linear, lambda z, x: z + torch.randn(z.shape, generator=generator))
    flag = answers.chance(subject(secretly, linear))
    assert (flag.status, flag.kind) == ("raised", "verdict")
    assert answers.state(subject(secretly, linear)).status == "not judged"
    assert answers.batch_dependence(subject(secretly, linear)).status == "not judged"
    assert jumps.jumps(subject(secretly, linear)).status == "not judged"


class Remembers(nn.Module):
    """Changes its answer to what it has seen before: any image often, or a near-duplicate (of one brightness) often."""

    def __init__(self, model: nn.Module, after: int, near: bool) -> None:
        super().__init__()
        self.model, self.after, self.near = model, after, near
        self.seen: dict[str, int] = {}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = self.model(x).clone()
        for row, image in zip(z, x, strict=True):
            coarse = (image * 4).round().to(torch.uint8).numpy().tobytes() if self.near else b""
            key = hashlib.sha256(coarse).hexdigest()
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] > self.after:
                row += torch.arange(len(row))
        return z


def test_state(linear: Linear) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += len(x)
            return linear(x) + 1e-2 * (self.calls // 50) * torch.eye(10)[0]

    flag = answers.state(subject(Counts(), linear))
    assert flag.raised
    assert flag.figures["after_others"] > 0
    near = answers.state(subject(Remembers(linear, after=60, near=True), linear))
    assert near.raised
    assert near.figures["after_near_duplicates"] > 0
    assert near.figures["after_others"] == 0
    for model in (linear, defended("input_noise", linear, std=0.1)):
        assert answers.state(subject(model, linear)).status == "clear"


def test_degenerate_scores(linear: Linear) -> None:
    flag = scores.degenerate_scores(subject(defended("label_only", linear), linear))
    assert flag.raised
    assert flag.figures["distinct"] == flag.figures["tied"] == 1
    assert flag.figures["zero_steps"] > 0.5
    sixteenths = Scaled(linear, 7 / 8)  # some ties between whole numbers are no plateaus
    assert scores.degenerate_scores(subject(sixteenths, linear)).figures["distinct"] > N / 2
    plateaus = Around(linear, lambda z, x: (z / 100).round() * 100)
    flag = scores.degenerate_scores(subject(plateaus, linear))
    assert flag.raised
    assert flag.figures["zero_steps"] > scores.ZEROS
    weight = torch.randn(64, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # no whole numbers
    smooth = Around(linear, lambda z, x: z + x.flatten(1).double() @ weight)
    assert scores.degenerate_scores(subject(smooth, linear)).status == "clear"


def test_trend(linear: Linear) -> None:
    def lead(z: Tensor, margin: Any) -> Tensor:
        best = z.topk(2, 1)
        m = best.values[:, 0] - best.values[:, 1]
        return z.scatter(1, best.indices[:, :1], (best.values[:, 1] + margin(m))[:, None])

    backwards = scores.trend(
        subject(Around(linear, lambda z, x: lead(z, lambda m: 200 / (1 + m))), linear, eps=8 / 255)
    )
    assert backwards.raised
    assert backwards.figures["margin"] < -0.7
    assert "opposite direction" in backwards.measured

    def hidden(z: Tensor, x: Tensor) -> Tensor:
        best = z.topk(2, 1).values
        return 3 * torch.eye(10)[z.argmax(1)] + (best[:, :1] - best[:, 1:])

    leaked = scores.trend(subject(Around(linear, hidden), linear, eps=8 / 255))
    assert leaked.raised
    assert abs(leaked.figures["margin"]) < 0.3
    assert leaked.figures["strongest_feature"] > 0.8
    flag = scores.trend(subject(linear, linear))
    assert flag.status == "clear"
    assert flag.figures["margin"] == pytest.approx(1, abs=0.01)
    constant = Around(linear, lambda z, x: z - z + torch.eye(10)[0])
    assert "8 images" in scores.trend(subject(linear, constant)).missing
    assert scores.trend(subject(linear, None)).status == "not judged"


def test_jumps(linear: Linear) -> None:
    flag = jumps.jumps(subject(defended("aaa", linear, tau=2.0, beta=0.0), linear))
    assert flag.raised
    assert flag.figures["tau_if_linear"] == pytest.approx(2, rel=0.05)
    assert jumps.jumps(subject(defended("dld", linear, tau=2.0), linear)).raised
    unknown = jumps.jumps(subject(defended("aaa", linear, tau=2.0, beta=0.0), None))
    assert unknown.figures["tau_if_linear"] == pytest.approx(2, rel=0.05)
    for model in (linear, Scaled(linear, 3), defended("temperature", linear)):
        assert jumps.jumps(subject(model, linear)).status == "clear"
    assert jumps.jumps(subject(linear, None)).status == "clear"


def test_each_point_of_a_trend_has_a_draw_of_its_own(linear: Linear) -> None:
    loud = scores.trend(subject(defended("output_noise", linear, std=1000.0), linear))
    assert abs(loud.figures["margin"]) < 0.2
    quiet = scores.trend(subject(defended("output_noise", linear, std=1.0), linear))
    assert 0.2 < quiet.figures["margin"] < 0.99
    scaled = scores.trend(subject(defended("rls", linear), linear))  # whose factor hides the margin, but no ratio
    assert scaled.figures["margin"] < 0.7
    assert "the margin over the distance to the third (scale-free) has the strongest" in scaled.measured


def test_images_near_the_boundary_and_first_steps_are_asked_as_queries_of_their_own(linear: Linear) -> None:
    asked: list[tuple[int, int]] = []

    def heard(z: Tensor, x: Tensor) -> Tensor:
        drawn = rng._rows.get()
        if drawn is not None:
            asked.extend(zip(drawn[1].tolist(), drawn[2].tolist(), strict=True))
        return z

    for judge in (labels.label_flips, scores.degenerate_scores, answers.chance):
        for raw in (linear, None):
            if judge is labels.label_flips and raw is None:
                continue
            asked.clear()
            judge(subject(Around(linear, heard), raw))
            assert len(set(asked)) == len(asked) > N, judge


def test_no_jump_is_told_of_margins_that_are_not_there(linear: Linear) -> None:
    for name, settings in (("label_only", {}), ("top_k", {"k": 1})):
        for raw in (linear, None):
            flag = jumps.jumps(subject(defended(name, linear, **settings), raw))
            assert flag.status == "not judged"
            assert "but one are shown with a probability of 0" in flag.missing
    unsure = Scaled(linear, 0.3)  # of which the second class is shown now and then
    for name, settings in (("top_k", {"k": 2}), ("high_confidence", {"threshold": 0.15})):
        for raw in (unsure, None):
            flag = jumps.jumps(subject(defended(name, unsure, **settings), raw))
            assert flag.status == "clear", flag.measured
            hidden = name == "high_confidence"
            assert (flag.figures["steps_without_a_margin"] > 0) == ("steps left out" in flag.measured) == hidden


def test_jumps_of_a_margin_that_is_there_are_told_though_it_is_not_everywhere(linear: Linear) -> None:
    unsure = Scaled(linear, 0.3)
    shown = defended("high_confidence", defended("aaa", unsure, tau=0.1, beta=0.0), threshold=0.15)
    for raw in (unsure, None):
        flag = jumps.jumps(subject(shown, raw))
        assert flag.raised, flag.measured
        assert flag.figures["tau_if_linear"] == pytest.approx(0.1, rel=0.1)
        assert 0 < flag.figures["steps_without_a_margin"] < flag.figures["steps"]


def test_jumps_are_not_told_of_what_draws_anew(linear: Linear) -> None:
    for name in ("input_noise", "output_noise", "rls"):
        assert "see F3" in jumps.jumps(subject(defended(name, linear), linear)).missing

    def near(z: Tensor, x: Tensor) -> Tensor:
        # only where two classes are close: most images themselves repeat
        return z + (top_lead(z) < 0.1)[:, None] * rng.noise_like(z)

    some = subject(Around(linear, near, deterministic=False), linear)
    clear = top_lead(linear(some.task.images)) > 0.1
    again = some.shown(some.task.images, query=5)
    assert bool(clear.any())
    assert bool(same(some.clean, again)[clear].all())
    assert "see F3" in jumps.jumps(some).missing


class Timed(nn.Module):
    """A model that takes a time of its own on a made-up clock."""

    def __init__(self, model: nn.Module, clock: list[float], seconds: Any) -> None:
        super().__init__()
        self.model, self.clock, self.seconds = model, clock, seconds
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += self.seconds(x)
        return self.model(x)


@pytest.mark.parametrize(
    ("seconds", "raised", "more"),
    [
        (lambda x: 1.0, False, 1.0),
        (lambda x: 1.05, False, 1.05),
        (lambda x: 1.2, True, 1.2),
        (lambda x: 1.0 if len(x) > 1 or x.mean() < 0.5 else 1.6, True, None),
    ],
)
def test_overhead(linear: Linear, seconds: Any, raised: bool, more: float | None) -> None:
    clock = [0.0]
    raw, model = Timed(linear, clock, lambda x: 1.0), Timed(linear, clock, seconds)
    flag = overhead.overhead(subject(model, raw), lambda: clock[0] / 100)
    assert flag.raised == raised
    if more is None:
        assert flag.figures["uneven"] == pytest.approx(1.6)
        assert flag.figures["ratio_batch_128"] == pytest.approx(1)
    else:
        assert flag.figures["ratio_batch_1"] == pytest.approx(more)
        assert flag.figures["ratio_batch_128"] == pytest.approx(more)


SHORTS = [suite.GREEDY, suite.Short("op", accept="op", hyper={"threshold": 3.0})]


def test_a_planted_example_is_found_behind_nothing_and_missed_behind_labels_alone(linear: Linear) -> None:
    clear = planted.planted_example(subject(linear, linear), SHORTS, 300)
    assert clear.status == "clear"
    assert clear.figures["together"] == clear.figures["undefended"] == 1
    raised = planted.planted_example(subject(defended("label_only", linear), linear), SHORTS, 300)
    assert raised.raised
    assert raised.figures["together"] < planted.FOUND
    assert raised.figures["images"] >= planted.LEAST
    inside = defended("label_only", defended("rfd", nn.Sequential(linear), layers="0"))
    assert planted.planted_example(subject(inside, inside.model.model), SHORTS, 300).status == "not judged"
    assert "without the defense" in planted.planted_example(subject(linear, linear), SHORTS, 2).missing


def test_a_planted_example_is_one_and_lies_in_the_ball(linear: Linear) -> None:
    for norm, eps in (("linf", 32 / 255), ("l2", 1.0)):
        task = subject(linear, linear, eps=eps, norm=norm).task
        victim, end, kept = planted.plant(task, linear)
        own = task.rows(kept)
        assert len(kept) > N / 2
        assert bool(own.contains(end).all())
        assert bool((own.margin(victim(end)) < 0).all())
        clean = own.margin(linear(own.images))
        assert torch.allclose(own.margin(victim(own.images)), clean, atol=1e-4)
        assert torch.allclose(own.margin(victim(end)), -clean, atol=1e-3)  # twice the way to the boundary
        assert torch.allclose(victim(end).sum(1), linear(own.images).sum(1), atol=1e-2)


def test_the_defense_is_put_around_another_network_and_left_as_it_was(linear: Linear) -> None:
    other = Scaled(linear, 2)
    model = defended("label_only", defended("aaa", linear, tau=2.0))
    moved = planted.around(model, linear, other)
    assert moved.model.model is other
    assert model.model.model is linear
    assert moved.model.tau == 2
    assert planted.around(Around(linear, None), linear, other) is None


def test_rounding_is_no_difference_and_more_is() -> None:
    a = torch.tensor([[100.0, 0.0], [1.0, 0.0]])
    assert same(a, a + torch.tensor([[5e-3, 0.0], [5e-3, 0.0]])).tolist() == [True, False]


def test_points_between_images_are_8_bit() -> None:
    a, b = images(3), images(3, seed=1)
    x = between(a, b, torch.full((3, 1, 1, 1), 0.37))
    assert torch.equal((x * 255).round() / 255, x)


def test_every_flag_says_what_it_is() -> None:
    assert [*FLAGS] == [f"F{i}" for i in range(1, 21)]
    assert {about.kind for about in FLAGS.values()} == {"verdict", "property"}
    flag = labels.label_flips(subject(Linear(), Linear()))
    assert isinstance(flag, Flag)
    assert flag.page == page_of("F1") == "docs/flags.md#f1-label-flips"
    assert flag.as_json()["status"] == "clear"


def test_draws_of_pairs_depend_on_ids_alone(linear: Linear) -> None:
    a, b = subject(linear, linear).pairs
    assert bool((a != b).all())
    task = subject(linear, linear).task
    expected = rng.integers(task.seed, task.ids, 0, 1 << 26, N).squeeze(1)
    assert torch.equal(b, expected[a])
