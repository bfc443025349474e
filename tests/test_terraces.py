"""Terraces: what is shown, and where the borders come from."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from queryfoil import metrics
from queryfoil.attacks import build
from queryfoil.defenses.coarse import LabelOnly
from queryfoil.defenses.terrace_fit import TerraceFit, fit
from queryfoil.defenses.terraces import Terraces, terraced
from queryfoil.losses import LOSSES
from queryfoil.oracle import SMALLEST
from queryfoil.run import run
from queryfoil.task import Task

TWO = {"group": (0, 0, 1), "borders": ((1.0, 2.0), ()), "shares": (((0.5,), (0.7,), (0.9,)), ((0.8,),))}


def drawn(n: int = 3000, classes: int = 10, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from their softmax: calibrated, about a quarter wrong."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator)
    return logits, logits.softmax(1).multinomial(1, generator=generator).squeeze(1)


def key(**changed: object) -> TerraceFit:
    rest = {"temperature": 1.0, "n": 100, "exposed": 0.5}
    rest |= dict.fromkeys(("ece_undefended", "ece_cross_fitted", "auroc_undefended", "auroc_cross_fitted"), 0.5)
    return TerraceFit(**{**TWO, **rest, **changed})  # type: ignore[arg-type]


def test_what_is_shown_is_that_of_the_group_and_the_interval_of_the_margin() -> None:
    logits = torch.tensor(
        [[0.9, 0.0, -1], [1.0, 0.0, -1], [-5, 1.9, 0.0], [9.0, 0.0, 0.0], [0.0, 1.0, 1.5], [0.0, 1.0, 9.0]]
    )
    shown = terraced(logits, key()).softmax(1)
    torch.testing.assert_close(shown.amax(1), torch.tensor([0.5, 0.7, 0.7, 0.9, 0.8, 0.8]))
    assert shown.argmax(1).tolist() == [0, 0, 1, 0, 2, 2]
    others = shown.sort(1).values[:, :2]
    torch.testing.assert_close(others[:, 0], others[:, 1])  # nothing of their order, with one place


def test_the_first_places_keep_their_order_and_the_others_are_level() -> None:
    shares = (((0.5, 0.3), (0.6, 0.2)), ((0.8, 0.1),))
    places = key(group=(0, 0, 0, 0, 1), borders=((1.0,), ()), shares=shares)
    shown = terraced(torch.tensor([[0.0, 1.0, 4.0, 2.0, -1.0]]), places).softmax(1)
    torch.testing.assert_close(shown, torch.tensor([[0.2 / 3, 0.2 / 3, 0.6, 0.2, 0.2 / 3]]))


def test_every_loss_of_an_attacker_is_constant_within_a_terrace() -> None:
    logits, _ = drawn(500, 3)
    top2 = logits.topk(2, 1).values
    same = (logits.argmax(1) == 0) & (top2[:, 0] - top2[:, 1] > 2)
    shown = terraced(logits, key())[same]
    labels = torch.zeros(len(shown), dtype=torch.int64)
    assert len(shown) > 50
    for name, loss in LOSSES.items():
        values = loss(shown, labels)
        assert float(values.max() - values.min()) == 0, name


def test_an_attacker_is_as_blind_as_with_labels_where_a_class_has_no_border(
    network: nn.Module, clothes: object
) -> None:
    x = clothes[:40]  # type: ignore[index]
    flat = Terraces(network, group=[0] * 10, borders=[()], shares=[((0.9,),)])
    for accept in ("greedy", "drift", "explore"):
        results = [
            run(build("square", accept, p_init=0.3), model, Task.create(x.images, x.labels, x.ids, eps=16 / 255), 60)
            for model in (flat, LabelOnly(network))
        ]
        assert torch.equal(results[0].fooled_at, results[1].fooled_at), accept


def test_the_fit_keeps_what_it_promises_on_other_draws_of_the_same_kind() -> None:
    found = fit(*drawn(4000, 5), allowed=0.04)
    logits, labels = drawn(20_000, 5, seed=1)
    shown, raw = (metrics.probabilities(z, "logits") for z in (terraced(logits, found), logits))
    assert metrics.auroc(raw, labels) - metrics.auroc(shown, labels) < 0.05
    assert metrics.ece(shown, labels) < 0.02
    assert len(np.unique(shown.max(1).round(6))) <= 5 * 6
    assert (shown.argmax(1) == raw.argmax(1)).all()


def test_the_more_is_allowed_the_fewer_borders_there_are() -> None:
    found = [fit(*drawn(2000, 5), allowed=allowed) for allowed in (0.04, 0.07, 0.12, 1.0)]
    borders = [sum(map(len, f.borders)) for f in found]
    assert borders == sorted(borders, reverse=True)
    assert borders[0] > borders[2]
    assert borders[-1] <= 1
    assert [f.exposed for f in found] == sorted((f.exposed for f in found), reverse=True)


def test_borders_lie_in_the_classes_where_the_errors_are() -> None:
    """Class 0 is never wrong; the others are drawn."""
    logits, labels = drawn(3000, 5)
    logits, labels = torch.cat([torch.full((3000, 1), -30.0), logits], 1), labels + 1
    sure = torch.full((3000, 6), -30.0)
    sure[:, 0] = torch.linspace(-20, 0, 3000)
    found = fit(torch.cat([logits, sure]), torch.cat([labels, torch.zeros(3000, dtype=torch.int64)]), allowed=0.05)
    assert found.borders[0] == ()
    assert sum(map(len, found.borders)) > 0


def test_many_classes_share_groups_by_their_confidence() -> None:
    found = fit(*drawn(3000, 40, scale=4.0), allowed=0.1)
    assert sorted(set(found.group)) == list(range(10))
    assert np.bincount(found.group).tolist() == [4] * 10


def test_levels_do_not_put_another_class_above_the_answer() -> None:
    """Right less often than chance: the level would lie below that of the others."""
    logits, labels = drawn(600, 4, scale=0.3)
    wrong = (logits.argmax(1) + 1) % 4
    mixed = torch.where(torch.arange(600) < 590, wrong, labels)
    found = fit(logits, mixed, allowed=1.0, ranks=2)
    shown = terraced(logits, found)
    assert torch.equal(shown.argmax(1), logits.argmax(1))


def test_a_fit_is_saved_and_read(tmp_path) -> None:
    found = fit(*drawn(1000, 5), allowed=0.1)
    found.save(tmp_path / "fit.json")
    assert TerraceFit.load(tmp_path / "fit.json") == found
    content = json.loads((tmp_path / "fit.json").read_text())
    for change in ({"borders": [[2.0, 1.0]]}, {"group": [0]}, {"new": 1}):
        (tmp_path / "bad.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=r"bad.json is no file written by TerraceFit.save"):
            TerraceFit.load(tmp_path / "bad.json")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 4.0, 40.0])
def test_the_first_places_keep_their_order_however_sure_the_network_is(ranks: int, scale: float) -> None:
    logits, labels = drawn(1000, 8, scale=scale)
    found = fit(logits, labels, ranks=ranks, allowed=0.3)
    for given in (logits, logits.bfloat16()):
        shown = terraced(given, found)
        order, kept = shown.sort(1, descending=True), shown.topk(ranks + 1, 1).values
        assert bool((kept.diff(dim=1) < 0).all())  # each place is told from the next, and the last from the others
        if given is logits:
            assert torch.equal(order.indices[:, :ranks], logits.sort(1, descending=True).indices[:, :ranks])


def test_what_is_not_finite_is_shown_as_nothing() -> None:
    protected = Terraces.from_fit(nn.Flatten(), key())
    shown = protected(torch.tensor([[3.0, 1.0, 0.0], [torch.nan, 0.0, 1.0], [torch.inf, 0.0, 1.0]]))
    assert shown.isnan().all(1).tolist() == [False, True, True]


def test_a_module_made_half_keeps_its_borders_and_levels() -> None:
    """1.0007 is no number of half precision: rounded, the border would lie at 1."""
    near = key(borders=((1.0007, 2.0), ()))
    logits = torch.tensor([[1.0005, 0.0, -1.0], [1.001, 0.0, -1.0]])
    exact = Terraces.from_fit(nn.Flatten(), near)
    halved = Terraces.from_fit(nn.Flatten(), near).half()
    assert halved.borders.dtype == torch.float64
    torch.testing.assert_close(halved(logits), exact(logits), rtol=0, atol=0)


def test_a_protected_module_is_exported_with_any_batch() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    protected = Terraces.from_fit(network, key(shares=(((0.5,), (0.7,), (0.9,)), ((0.8,),))))
    x = torch.randn(5, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(protected.eval(), (x,), dynamic_shapes=({0: batch},), strict=False).module()
    for n in (1, 5):
        torch.testing.assert_close(exported(x[:n]), protected(x[:n]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group": (0, 0.5, 1)}, r"expected a group \(0, 1, ...\) for each"),
        ({"group": (0, 0, 2)}, r"got groups \[0, 2\], 2 lists"),
        ({"borders": (("1", 2.0), ())}, "expected borders > 0 in rising order, but got"),
        ({"shares": ((("a",), (0.7,), (0.9,)), ((0.8,),))}, "expected shares as numbers, but got"),
        ({"shares": (((0.3,), (0.7,), (0.9,)), ((0.8,),))}, r"expected shares that fall.*\(0.35\)"),
        ({"shares": (((0.5,), (0.7,), (1.0,)), ((0.8,),))}, r"expected shares that fall.*\(0\), which is above 0"),
        ({"temperature": None}, "expected temperature > 0 and finite, but got None"),
        ({"n": 10.5}, "expected n as a whole number >= 1, but got 10.5"),
        ({"exposed": "all"}, "expected exposed from 0 to 1, but got 'all'"),
        ({"auroc_undefended": 1.5}, "expected auroc_undefended from 0 to 1, but got 1.5"),
    ],
)
def test_terraces_that_cannot_be_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        key(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"allowed": -0.1}, "expected allowed from 0 to 1, but got -0.1"),
        ({"ranks": 0}, "expected ranks as a whole number >= 1"),
        ({"ranks": 5}, "expected ranks from 1 to 4, as there are 5 classes, but got 5"),
        ({"allowed": 0.0}, r"no terraces keep the AUROC within 0 of the undefended .*; allowed=0\.\d+ is what"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(*drawn(300, 5), **changed)  # type: ignore[arg-type]


def test_a_refusal_says_what_would_do() -> None:
    sample = drawn(1000, 5)
    with pytest.raises(ValueError, match="is what these images would do with") as refused:
        fit(*sample, allowed=0.0)
    enough = float(str(refused.value).split("allowed=")[1].split()[0])
    assert fit(*sample, allowed=enough).classes == 5


def test_answers_that_are_all_right_say_nothing_of_errors() -> None:
    logits, _ = drawn(200, 5)
    with pytest.raises(ValueError, match="expected right and wrong answers"):
        fit(logits, logits.argmax(1))


def test_two_classes_have_terraces_too() -> None:
    found = fit(*drawn(1000, 2, scale=2.0), allowed=0.05, ranks=1)
    logits, _ = drawn(500, 2, seed=1)
    shown = terraced(logits, found)
    assert torch.equal(shown.argmax(1), logits.argmax(1))
    assert float(shown.softmax(1).amax(1).min()) >= 0.5


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected scores of 3 classes, as the terraces were fitted to, but got 4"):
        terraced(torch.zeros(2, 4), key())
    with pytest.raises(ValueError, match="expected scores of 3 classes"):
        Terraces.from_fit(nn.Flatten(), key())(torch.zeros(2, 4))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_first_places_of_a_thousand_classes_fall_strictly_and_all_others_are_level(ranks: int) -> None:
    classes = 1000
    logits, labels = drawn(2000, classes, seed=ranks, scale=4.0)
    found = fit(logits, labels, ranks=ranks, allowed=0.2)
    fresh, _ = drawn(1500, classes, seed=100 + ranks, scale=4.0)
    # as they are, nearly level, sure, and tied
    odd = torch.cat([fresh, 1e-3 * fresh[:200], 30 * fresh[:200], (4 * fresh[:200]).round(), torch.zeros(1, classes)])
    asked = {"logits": odd, "probs": odd.double().softmax(1).float().clamp_min(SMALLEST)}  # as the defense reads them
    ways = [("logits", terraced(odd, found)), ("logits", Terraces.from_fit(nn.Identity(), found)(odd))]
    for kind, shown in [*ways, ("probs", Terraces.from_fit(Probabilities(), found)(odd))]:
        places = asked[kind].sort(dim=1, descending=True, stable=True).indices  # of ties the lower index
        ordered = shown.gather(1, places)
        assert shown.dtype == torch.float32
        assert bool((ordered[:, :ranks].diff(dim=1) < 0).all())
        assert bool((ordered[:, ranks - 1] > ordered[:, ranks]).all())
        assert bool((ordered[:, ranks:] == ordered[:, ranks : ranks + 1]).all())


class Probabilities(nn.Module):
    """What it is given as logits, as probabilities in single precision."""

    output = "probs"

    def forward(self, x: Tensor) -> Tensor:
        return x.double().softmax(1).float()
