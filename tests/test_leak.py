"""The reading fitted on a surrogate: its regression by hand, its order, and attacks that follow it."""

import pytest
import torch

import queryfoil as qf
from helpers import Linear, Negated, images, labels_of
from queryfoil import attacking, bench, data, losses, models, plan
from queryfoil.attacks import READINGS, build, modules, settings
from queryfoil.attacks.adaptive import Adaptive
from queryfoil.attacks.leak import KNOTS, Leak, features, fit_leak
from queryfoil.report import cells
from queryfoil.run import run
from queryfoil.task import Task


def margins(scores):
    return losses.margin(scores.double(), scores.argmax(1))


def gaussian(n, classes=10, seed=0):
    return 4 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def constant(weight, at=1, distances=1):
    """A leak with one weight that is not 0."""
    numbers = ["0"] * (distances + 2 + 2 * KNOTS)
    numbers[at] = str(weight)
    return Leak(", ".join(numbers))


def ranks_agree(a, b):
    """Spearman's correlation, of values without ties."""
    a, b = (t.argsort().argsort().double() for t in (a, b))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_features_of_a_case_by_hand():
    found = features(torch.tensor([[1.0, 3.0, 0.0]]), 1.0)[0]
    odds = -float(torch.tensor([-2.0, -3.0]).logsumexp(0))
    assert found[:3].tolist() == pytest.approx([2.0, 3.0, odds])
    assert found[3 : 3 + KNOTS].tolist() == [1.0] + [0.0] * (KNOTS - 1)
    assert found[3 + KNOTS :].tolist() == pytest.approx([odds - 1] + [0.0] * (KNOTS - 1))
    assert features(gaussian(3, 1000), 0.5).shape == (3, 9 + 1 + 2 * KNOTS)


def test_features_are_the_same_for_logits_and_their_log_probabilities():
    logits = gaussian(20).double()
    torch.testing.assert_close(features(logits, 0.5), features(logits.log_softmax(1) + 3, 0.5))


def test_ridge_is_that_of_augmented_least_squares():
    raw, shown = gaussian(80, 4), gaussian(80, 4, seed=1)
    leak = fit_leak(raw, shown, ridge=0.1)
    x = features(shown, 0.5)
    some = x.std(0) > 1e-9
    z = (x - x.mean(0))[:, some] / x.std(0)[some]
    y = margins(raw)
    rows = torch.cat([z, (0.1 * len(z)) ** 0.5 * torch.eye(z.shape[1]).double()])
    aims = torch.cat([y - y.mean(), torch.zeros(z.shape[1]).double()])
    expected = z @ torch.linalg.lstsq(rows, aims[:, None]).solution.squeeze(1) + y.mean()
    torch.testing.assert_close(leak.predict(shown), expected, atol=1e-5, rtol=0)


def test_what_does_not_vary_has_no_weight():
    scores = torch.stack([torch.linspace(1, 3, 40), torch.zeros(40), torch.full((40,), -50.0)], 1)
    scores -= scores[:, :1]  # the third distance still varies, with the first; bends beyond 3 do not
    leak = fit_leak(scores, scores)
    assert leak.numbers[4 + 6 :][:18] == [0.0] * 18
    torch.testing.assert_close(leak.predict(scores), margins(scores), atol=0.1, rtol=0)


def test_a_larger_prediction_is_a_larger_margin_and_the_answer_stays():
    leak = constant(1.0)
    for shift in (-30.0, 0.0, 30.0):
        numbers = [str(shift), *map(str, leak.numbers[1:])]
        shown = torch.stack([torch.linspace(0.1, 9, 50), torch.zeros(50)], 1)
        read = Leak(", ".join(numbers))(shown)
        lead = read[:, 0] - read[:, 1]
        assert bool((lead.diff() > 0).all())
        assert bool((lead > 0).all())
    torch.testing.assert_close(leak(torch.tensor([[1.5, 0.0]])), torch.tensor([[2.0, 0.0]]))
    other = leak(torch.tensor([[0.0, 1.5]]))
    assert other.argmax(1).item() == 1


def test_a_leak_reads_the_margin_of_another_network_behind_the_defense_of_the_paper():
    images = data.load("fashion-mnist", "calibration").images
    with torch.no_grad():
        surrogate, victim = (models.load(name)(images) for name in ("fashion-resnext", "fashion-resnet"))
    shown = qf.disguise(victim[500:], solver="adam")
    leak = fit_leak(surrogate[:500], qf.disguise(surrogate[:500], solver="adam"))
    true = margins(victim[500:])
    assert ranks_agree(margins(shown), true) < 0.7
    assert ranks_agree(leak.predict(shown), true) > 0.95


def test_an_attack_with_it_is_not_misled_and_does_not_depend_on_the_batch():
    model, x = Linear(), images(40)
    with torch.no_grad():
        known = model(images(400, seed=1))
    leak = fit_leak(known, qf.disguise(known, tau=12.0, beta=0.0))
    task = Task.create(x, labels_of(model, x), torch.arange(40) * 3 + 5, eps=8 / 255)
    attack = build("square", reading="leak", weights=leak.weights, spacing=leak.spacing)
    assert attack == Adaptive(build("square"), reading=leak)
    misled, read = (run(a, Negated(model), task, 60) for a in (build("square"), attack))
    assert read.accuracy() + 0.2 < misled.accuracy()
    led = build("square", "drift", reading="leak", weights=leak.weights, neighbours=2, radius=0.02)
    for chosen in (attack, led):
        some = task.rows(slice(0, 12))
        whole = run(chosen, Negated(model), some, 30)
        parts = [run(chosen, Negated(model), some.rows(rows), 30) for rows in torch.arange(12).split(5)]
        for field in ("fooled_at", "queries", "adversarial"):
            assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field


def test_it_stands_in_a_plan_and_its_weights_are_part_of_the_attacks_settings(tmp_path):
    weights = fit_leak(gaussian(60), gaussian(60, seed=1)).weights
    (tmp_path / "own.toml").write_text(
        f"""
        name = "own"
        about = "An attacker with a surrogate"
        [[cell]]
        label = "leak"
        dataset = "fashion-mnist"
        model = "fashion-resnet"
        attack = "square"
        accept = "drift"
        eps = "16/255"
        budget = 3
        n = 4
        hyper = {{ reading = "leak", weights = "{weights}" }}
        """
    )
    own = plan.read(tmp_path / "own.toml")
    assert bench.bench(own, tmp_path / "out").left == 0
    attack = own.cells[0].build()
    found = settings(attack)
    assert (found["reading"], found["weights"], found["spacing"]) == ("leak", weights, 0.5)
    assert modules(attack) == {f"queryfoil.attacks.{name}" for name in ("square", "adaptive", "tactics", "leak")}


def test_it_is_told_by_its_start_where_a_line_has_no_place_for_all_weights(tmp_path):
    weights = fit_leak(gaussian(60), gaussian(60, seed=1)).weights
    asked = attacking.request(
        model="fashion-resnet",
        images="fashion-mnist",
        n=4,
        attack="square",
        eps="16/255",
        budget=3,
        hyper=attacking.hyper(["reading=leak", f"weights={weights}"]),
    )
    _, (row,) = attacking.attack(asked, tmp_path)
    assert row["hyper"]["weights"] == weights
    assert f"weights {weights[:20]}… ({len(weights)} characters)" in cells.attack_setting(row)
    assert READINGS["leak"] is Leak


@pytest.mark.parametrize(
    "weights", ["", "1, 2", "a, b", ", ".join(["0"] * 49), ", ".join(["0"] * 60), "nan" + ", 0" * 50]
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="expected weights of leak as 51 to 59 finite numbers"):
        build("square", reading="leak", weights=weights)


def test_bad_scores_and_settings_are_refused():
    with pytest.raises(ValueError, match="expected 2 classes, for which leak was fitted, but got 3"):
        constant(1.0)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="expected at least 10 classes"):
        constant(1.0, distances=9)(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="of the same images"):
        fit_leak(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="expected finite scores, but shown has"):
        fit_leak(torch.zeros(3, 2), torch.full((3, 2), torch.inf))
    with pytest.raises(ValueError, match="expected ridge > 0"):
        fit_leak(torch.zeros(3, 2), torch.zeros(3, 2), ridge=0.0)
    with pytest.raises(ValueError, match="expected spacing > 0"):
        Leak(constant(1.0).weights, spacing=0)
