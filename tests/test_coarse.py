"""Coarse scores: rounded, a few, the label alone."""

import pytest
import torch
from torch import nn

from helpers import Declared
from queryfoil import losses
from queryfoil.defenses.coarse import HighConfidence, LabelOnly, RoundedScores, TopK
from queryfoil.oracle import answers


class Probs(nn.Flatten):
    """Answers with what it sees, which are probabilities."""

    output = "probs"


def of(kind, rows, **settings):
    """What is shown of rows of probabilities."""
    return kind(Probs().eval(), **settings)(torch.tensor(rows, dtype=torch.float64))


def logits(classes, scale=3.0, n=300):
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tight(z):
    """Logits with a second class next to the top one."""
    top = z.argmax(1, keepdim=True)
    near = torch.nextafter(z.gather(1, top), torch.full_like(z[:, :1], -torch.inf))
    return z.scatter(1, (top + 1) % z.shape[1], near)


# rounded


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("decimals", [1, 3, 6])
@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 30.0])
def test_rounded_rows_are_whole_units_that_sum_to_one_with_the_top_class_above(classes, decimals, scale):
    for z in (logits(classes, scale, 100), tight(logits(classes, scale, 100))):
        shown = RoundedScores(nn.Identity(), decimals=decimals)(z.float()).double()
        units = (shown * 10**decimals).round()
        torch.testing.assert_close(shown, units / 10**decimals, atol=1e-7, rtol=0)
        assert bool((units >= 0).all())
        assert units.sum(1).unique().tolist() == [10**decimals]
        top = z.float().argmax(1, keepdim=True)
        lead = units.gather(1, top) - units.scatter(1, top, -1).amax(1, keepdim=True)
        assert bool((lead >= 1).all())
        moved = (units - z.float().double().softmax(1) * 10**decimals).abs()
        assert float(moved.max()) < 2  # a unit by the remainders, another for the lead
        assert float((moved >= 1).sum(1).max()) <= 2


def test_rounding_keeps_the_order_of_the_other_classes():
    z = logits(10).float()
    shown = RoundedScores(nn.Identity(), decimals=2)(z)
    ordered = shown.gather(1, z.argsort(1, descending=True))
    level = ordered[:, :-1] - ordered[:, 1:]
    assert float(level.min()) > -1.01e-2  # one that gave its unit to the top class
    clear = (ordered[:, 0] - ordered[:, 1]) > 2.5e-2
    assert float(level[clear].min()) >= -1e-6


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ([0.5, 0.5], [0.6, 0.4]),
        ([0.26, 0.26, 0.24, 0.24], [0.4, 0.2, 0.2, 0.2]),  # the second gave a unit
        ([0.55, 0.45], [0.6, 0.4]),
        ([0.96, 0.04], [1.0, 0.0]),
        ([0.04, 0.96], [0.0, 1.0]),
        ([0.14, 0.14, 0.72], [0.2, 0.1, 0.7]),
        ([0.35, 0.325, 0.325], [0.4, 0.3, 0.3]),
    ],
)
def test_rounded_rows_by_hand(row, shown):
    torch.testing.assert_close(of(RoundedScores, [row], decimals=1), torch.tensor([shown]).double(), atol=1e-6, rtol=0)


def test_a_label_that_softmax_cannot_see_is_kept():
    z = torch.tensor([[0.0, 1e-30, 0.0], [0.0, 0.0, 1e-30]])
    shown = RoundedScores(nn.Identity())(z)
    torch.testing.assert_close(shown, torch.tensor([[0.333, 0.334, 0.333], [0.333, 0.333, 0.334]]))


def test_rounding_as_in_art_ties_labels_and_sums_to_other_than_one():
    rows = [[0.3334, 0.3333, 0.3333], [0.49951, 0.50049, 0.0], [0.0004, 0.9992, 0.0004]]
    shown = of(RoundedScores, rows, keep_label=False)
    torch.testing.assert_close(
        shown, torch.tensor([[0.333, 0.333, 0.333], [0.5, 0.5, 0], [0, 0.999, 0]], dtype=torch.float64)
    )
    assert shown.argmax(1).tolist() == [0, 0, 1]  # the second is another label
    assert of(RoundedScores, rows).argmax(1).tolist() == [0, 1, 1]


# a few


def test_the_top_k_are_normalized_or_kept():
    row = [[0.1, 0.4, 0.2, 0.3]]
    torch.testing.assert_close(of(TopK, row, k=2), torch.tensor([[0, 4 / 7, 0, 3 / 7]]).double())
    torch.testing.assert_close(of(TopK, row, k=2, rest="equal"), torch.tensor([[0.15, 0.4, 0.15, 0.3]]).double())
    torch.testing.assert_close(of(TopK, row, k=4), torch.tensor(row).double())
    torch.testing.assert_close(of(TopK, row, k=9, rest="equal"), torch.tensor(row).double())


def test_ties_at_the_kth_place_show_the_lower_index():
    z = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    shown = TopK(nn.Identity(), k=2)(z)
    assert (shown > 0).tolist() == [[True, True, False, False], [True, True, False, False]]
    assert float(shown[0, 1] / shown[0, 0]) == pytest.approx(2.71828, rel=1e-5)
    assert float(shown[1, 0]) > float(shown[1, 1])


def test_one_class_alone_is_the_label_or_its_probability():
    z = logits(10)
    one_hot = torch.nn.functional.one_hot(z.argmax(1), 10).double()
    assert torch.equal(TopK(nn.Identity(), k=1)(z), one_hot)
    assert torch.equal(LabelOnly(nn.Identity())(z), one_hot)
    shown = TopK(nn.Identity(), k=1, rest="equal")(z)
    torch.testing.assert_close(shown.amax(1), z.softmax(1).amax(1))
    torch.testing.assert_close(shown.amin(1), (1 - z.softmax(1).amax(1)) / 9)


def test_two_shown_classes_keep_the_margin():
    z = logits(10)
    top2 = TopK(nn.Identity(), k=2)(z).log().topk(2).values
    raw = z.topk(2).values
    torch.testing.assert_close(top2[:, 0] - top2[:, 1], raw[:, 0] - raw[:, 1], atol=1e-4, rtol=0)


def test_high_confidence_shows_what_reaches_the_threshold_and_the_top_class():
    rows = [[0.6, 0.3, 0.1], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]
    shown = of(HighConfidence, rows)
    torch.testing.assert_close(shown, torch.tensor([[2 / 3, 1 / 3, 0], [0.25, 0.5, 0.25], [0, 0, 1]]).double())
    unsure = [[0.1, 0.2, 0.15, 0.18, 0.19, 0.18]]
    torch.testing.assert_close(of(HighConfidence, unsure), torch.tensor([[0, 1, 0, 0, 0, 0]]).double())
    torch.testing.assert_close(
        of(HighConfidence, unsure, rest="equal"), torch.tensor([[0.16, 0.2, 0.16, 0.16, 0.16, 0.16]]).double()
    )


def test_high_confidence_as_in_art_shows_zeros_and_then_the_first_class():
    shown = of(HighConfidence, [[0.6, 0.3, 0.1], [0.2, 0.24, 0.2]], keep_label=False)
    scale = 0.64  # the second row is normalized before
    torch.testing.assert_close(shown, torch.tensor([[0.6, 0.3, 0], [0.2 / scale, 0.24 / scale, 0.2 / scale]]).double())
    shown = of(HighConfidence, [[0.2, 0.24, 0.2, 0.2, 0.16]], keep_label=False)
    assert not bool(shown.any())
    assert not HighConfidence(nn.Identity(), keep_label=False).keeps_label


# all


@pytest.mark.parametrize(
    "build",
    [
        RoundedScores,
        TopK,
        lambda model: TopK(model, k=2),
        lambda model: TopK(model, k=1, rest="equal"),
        LabelOnly,
        HighConfidence,
        lambda model: HighConfidence(model, rest="equal"),
    ],
    ids=["rounded", "top 5", "top 2", "top 1, equal", "label", "high", "high, equal"],
)
@pytest.mark.parametrize("output", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kept_label_is_a_clear_answer_to_an_oracle(build, output, dtype):
    class Given(nn.Flatten):
        def forward(self, x):
            return {"logits": lambda z: z, "log_probs": lambda z: z.log_softmax(1), "probs": lambda z: z.softmax(1)}[
                output
            ](super().forward(x)).to(dtype)

    inner = Given().eval()
    inner.output = output
    z = torch.cat([*(tight(logits(7, scale, 100).float()) for scale in (0.0, 0.01, 1.0, 100.0)), torch.zeros(1, 7)])
    x = z.view(-1, 1, 1, 7)
    model = build(inner)
    assert model.output == "probs"
    scores = answers(model, x, torch.arange(len(x)), torch.ones(len(x)).long())
    assert bool((losses.margin(scores, inner(x).argmax(1)) > 0).all())


def test_a_model_that_gives_something_else_raises():
    inner = Declared(nn.Identity(), "probs")
    inner.forward = lambda z: z
    with pytest.raises(ValueError, match="expected probabilities in"):
        LabelOnly(inner)(torch.tensor([[2.0, 1.0]]))
