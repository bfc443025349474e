"""What the shipped network, data and plan promise together."""

from pathlib import Path

import pytest
import torch

from queryfoil import AAA, bench, data, disguise, fit, metrics, models, plan, summary
from queryfoil.store import Store
from queryfoil.train.loop import predict

FULL = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    images = data.load("fashion-mnist", "calibration")
    return predict(models.load("fashion-resnet"), images.images), images.labels


@pytest.mark.parametrize("curve", ["linear", "sine"])
def test_fitted_aaa_keeps_the_ece_within_half_a_point(
    calibration: tuple[torch.Tensor, torch.Tensor], curve: str
) -> None:
    found = fit(*calibration, objective="greedy", curve=curve)
    unseen = data.load("fashion-mnist", "test", FULL) if FULL.is_dir() else data.load("fashion-mnist", "attack")
    unseen = unseen[~torch.isin(unseen.ids, data.load("fashion-mnist", "calibration").ids)]
    logits = predict(models.load("fashion-resnet"), unseen.images)
    shown, raw = (metrics.probabilities(z, "logits") for z in (disguise(logits, **found.settings()), logits))
    change, interval = metrics.ece_difference(shown, raw, unseen.labels)
    assert change <= 0.005
    assert interval.low < change < interval.high
    assert interval.high <= (0.005 if len(unseen) == 9000 else 0.02)
    assert (shown.argmax(1) == raw.argmax(1)).all()


@pytest.mark.parametrize("name", ["fashion-resnet", "fashion-resnet-at"])
def test_terraces_keep_the_scores_useful_on_images_that_nothing_was_fitted_on(name: str) -> None:
    network = models.load(name)
    held_out, unseen = (data.load("fashion-mnist", split) for split in ("calibration", "attack"))
    found = fit(predict(network, held_out.images), held_out.labels)
    raw = predict(network, unseen.images)
    shown, undefended = (metrics.probabilities(z, "logits") for z in (disguise(raw, curve="terraces", key=found), raw))
    assert metrics.auroc(shown, unseen.labels) >= metrics.auroc(undefended, unseen.labels) - 0.025
    assert metrics.ece_difference(shown, undefended, unseen.labels)[0] <= 0.005
    assert (shown.argmax(1) == undefended.argmax(1)).all()


@pytest.mark.slow
def test_the_quick_plan_keeps_its_promises(tmp_path: Path) -> None:
    bench.bench(plan.read("quick"), tmp_path)
    rows = {row["label"]: row for row in summary.rows(*summary.collect(Store(tmp_path)))}
    undefended, linear = rows["undefended"], rows["AAA-linear, fitted"]
    assert undefended["accuracy"]["500"] < 0.1
    assert linear["accuracy"]["500"] >= undefended["accuracy"]["500"] + 0.3
    assert linear["labels_changed"] == rows["AAA-sine, fitted"]["labels_changed"] == 0
    assert linear["ece_change"] <= 0.005


def test_a_protected_model_is_a_plug_in(calibration: tuple[torch.Tensor, torch.Tensor]) -> None:
    network = models.load("fashion-resnet")
    protected = AAA.from_fit(network, fit(*calibration, objective="greedy"))
    images = data.load("fashion-mnist", "attack").images[:64]
    with torch.inference_mode():
        assert torch.equal(protected(images).argmax(1), network(images).argmax(1))
        assert not torch.equal(protected(images), network(images))
