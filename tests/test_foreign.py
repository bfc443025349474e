"""Other people's attacks: every row they ask about is counted, and our judge ends them."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import queryfoil as qf
from helpers import Declared, Linear, Watch, images, labels_of
from queryfoil.attacks.foreign import Door, Finished, art_classifier, foolbox_model, foreign
from queryfoil.oracle import LabelOracle, Oracle

NEVER = qf.metrics.NEVER
EPS = 16 / 255


@pytest.fixture
def model() -> Linear:
    return Linear()


@pytest.fixture
def x() -> Tensor:
    return images(6)


def random_signs(batch: int) -> Any:
    """A foreign attack that asks about random corners of the ball, some at a time, for ever."""

    def attack(door: Door) -> None:
        generator = torch.Generator().manual_seed(0)
        while True:
            signs = torch.randint(0, 2, (batch, *door.task.images.shape[1:]), generator=generator) * 2 - 1
            door(door.task.images + door.task.eps * signs)

    return attack


def asked(watch: Watch) -> int:
    """Rows that a model was asked about, one at a time."""
    assert all(len(batch) == 1 for batch in watch.batches)
    return len(watch.batches)


@pytest.mark.parametrize("batch", [1, 7])
def test_every_row_is_a_query_and_the_budget_is_exact(model: Linear, x: Tensor, batch: int) -> None:
    labels = labels_of(model, x)
    labels[0] = (labels[0] + 1) % 10  # wrong from the start: costs one query, and is not attacked
    watch = Watch(model)
    result = foreign(random_signs(batch), watch, x, labels, eps=2 / 255, budget=23)
    assert asked(watch) == int(result.queries.sum())
    assert result.fooled_at[0] == result.queries[0] == 1
    assert torch.equal(result.queries, result.fooled_at.clamp(max=23))
    assert (result.fooled_at == NEVER).any()
    assert result.budget == 23


def test_the_size_of_its_batches_changes_no_result(model: Linear, x: Tensor) -> None:
    results = [foreign(random_signs(b), model, x, labels_of(model, x), eps=EPS, budget=12) for b in (1, 5)]
    assert all((r.fooled_at < NEVER).any() for r in results)
    assert torch.equal(results[0].fooled_at, results[1].fooled_at)
    assert torch.equal(results[0].adversarial, results[1].adversarial)


def test_a_success_is_in_the_ball_and_fools_again(model: Linear, x: Tensor) -> None:
    labels = labels_of(model, x)
    result = foreign(random_signs(3), model, x, labels, eps=EPS, budget=200)
    fooled = (result.fooled_at < NEVER).nonzero().squeeze(1)
    assert len(fooled)
    assert ((result.adversarial - x).abs() <= EPS + 1e-6).all()
    assert (labels_of(model, result.adversarial[fooled]) != labels[fooled]).all()


def test_an_image_outside_the_ball_costs_a_query_and_is_no_success(model: Linear, x: Tensor) -> None:
    labels = labels_of(model, x)
    others = x.flip(0)

    def elsewhere(door: Door) -> None:
        assert door(others).argmax(1).ne(door.task.labels).any()

    result = foreign(elsewhere, model, x, labels, eps=EPS, budget=50)
    assert (result.fooled_at == NEVER).all()
    assert (result.queries == 1 + len(x)).all()  # it gave up by itself


def test_foreign_code_that_catches_everything_gets_no_further_answer(model: Linear, x: Tensor) -> None:
    ends: list[type] = []

    def stubborn(door: Door) -> None:
        for _ in range(20):
            try:
                door(door.task.images)
            except BaseException as end:
                ends.append(type(end))

    watch = Watch(model)
    result = foreign(stubborn, watch, x, labels_of(model, x), budget=5)
    assert asked(watch) == int(result.queries.sum()) == 5 * len(x)
    assert set(ends) == {Finished}
    assert not issubclass(Finished, Exception)


def test_its_own_errors_pass(model: Linear, x: Tensor) -> None:
    def broken(door: Door) -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        foreign(broken, model, x, labels_of(model, x))


@pytest.mark.parametrize("output", ["logits", "probs", "log_probs"])
def test_it_sees_what_shows_says(x: Tensor, output: str) -> None:
    model = Declared(Linear(), output)
    seen: dict[str, Tensor] = {}
    for shows in ("logits", "probs", "labels"):

        def look(door: Door, shows: str = shows) -> None:
            seen[shows] = door(door.task.images.expand(3, -1, -1, -1))
            assert not seen[shows].requires_grad

        foreign(look, model, x[:1], labels_of(model, x[:1]), shows=shows)
    expected = Linear()(x[:1])
    torch.testing.assert_close(seen["probs"], expected.softmax(1).expand(3, -1))
    torch.testing.assert_close(seen["logits"].softmax(1), seen["probs"])
    assert seen["labels"].tolist() == [(torch.arange(10) == expected.argmax()).float().tolist()] * 3


def test_a_door_of_labels_has_no_way_to_the_scores(model: Linear, x: Tensor) -> None:
    def look(door: Door) -> None:
        assert not any(isinstance(value, Oracle | LabelOracle) for value in vars(door).values())
        assert not hasattr(door, "scores")

    foreign(look, model, x, labels_of(model, x), shows="labels")


def test_targets(model: Linear, x: Tensor) -> None:
    labels = labels_of(model, x)
    targets = (labels + 1) % 10
    result = foreign(random_signs(1), model, x, labels, eps=80 / 255, budget=100, targets=targets)
    fooled = result.fooled_at < NEVER
    assert fooled.any()
    assert torch.equal(labels_of(model, result.adversarial)[fooled], targets[fooled])


@pytest.mark.parametrize(
    ("asked_about", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"expected finite images \(n, 1, 8, 8\) from the attack, but got \(2, 3, 8, 8\)"),
        (torch.full((1, 1, 8, 8), torch.nan), "expected finite images"),
        (np.zeros((1, 1, 8, 8)), "but got ndarray"),
    ],
)
def test_what_is_no_image_is_refused(model: Linear, x: Tensor, asked_about: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foreign(lambda door: door(asked_about), model, x, labels_of(model, x))


def test_bad_input_raises_before_the_model_is_asked(model: Linear, x: Tensor) -> None:
    watch, labels = Watch(model), labels_of(model, x)
    for changed, message in (
        ({"shows": "label"}, "did you mean 'labels'"),
        ({"eps": -1.0}, "expected eps > 0"),
        ({"budget": 0}, "expected a budget"),
        ({"norm": "l1"}, "unknown norm"),
    ):
        with pytest.raises(ValueError, match=message):
            foreign(random_signs(1), watch, x, labels, **changed)  # type: ignore[arg-type]
    assert watch.batches == []


@pytest.mark.parametrize(("adapter", "package"), [(art_classifier, "art"), (foolbox_model, "foolbox")])
def test_a_missing_package_is_said(
    model: Linear, x: Tensor, monkeypatch: pytest.MonkeyPatch, adapter: Any, package: str
) -> None:
    for name in [package, "art.estimators.classification"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="is not installed: pip install"):
        foreign(adapter, model, x, labels_of(model, x))


def art_attack(name: str) -> tuple[Any, str]:
    """An attack of ART as ours, and what it is to be shown."""
    evasion = pytest.importorskip("art.attacks.evasion")

    def square(door: Door) -> None:
        attack = evasion.SquareAttack(art_classifier(door), eps=EPS, max_iter=100, verbose=False)
        attack.generate(door.task.images.numpy(), np.eye(door.classes)[door.task.labels.numpy()])

    def simba(door: Door) -> None:
        attack = evasion.SimBA(art_classifier(door), attack="px", epsilon=EPS, max_iter=100, verbose=False)
        attack.generate(door.task.images.numpy(), np.eye(door.classes)[door.task.labels.numpy()])

    def hop_skip_jump(door: Door) -> None:
        attack = evasion.HopSkipJump(
            art_classifier(door), norm=np.inf, max_iter=3, max_eval=50, init_eval=10, verbose=False
        )
        attack.generate(door.task.images.numpy())

    return {"square": (square, "logits"), "simba": (simba, "probs"), "hop_skip_jump": (hop_skip_jump, "labels")}[name]


def counted(attack: Any, shows: str, eps: float) -> qf.Result:
    """Run it on a watched model; what the model saw is what the ledger says."""
    model, x = Linear(), images(4)
    watch = Watch(model)
    result = foreign(attack, watch, x, labels_of(model, x), eps=eps, budget=60, shows=shows)
    assert asked(watch) == int(result.queries.sum())
    assert (result.queries <= 60).all()
    assert (result.queries > 1).all()
    assert ((result.adversarial - x).abs() <= eps + 1e-6).all()
    return result


@pytest.mark.parametrize("name", ["square", "simba", "hop_skip_jump"])
@pytest.mark.filterwarnings("ignore")
def test_an_attack_of_art_is_counted(name: str) -> None:
    attack, shows = art_attack(name)
    result = counted(attack, shows, 0.2 if name == "hop_skip_jump" else EPS)
    assert (result.fooled_at < NEVER).any()


@pytest.mark.filterwarnings("ignore")
def test_an_attack_of_foolbox_is_counted() -> None:
    foolbox = pytest.importorskip("foolbox")

    def boundary(door: Door) -> None:
        start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(steps=20)
        attack = foolbox.attacks.BoundaryAttack(start, steps=100, tensorboard=False)
        attack.run(foolbox_model(door), door.task.images, door.task.labels)

    result = counted(boundary, "labels", 0.5)
    assert (result.fooled_at < NEVER).any()
