"""Objectives of `fit`, and what `protect` makes of them."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import queryfoil as qf
from queryfoil.cli import app
from queryfoil.protect import OBJECTIVES
from test_terraces import drawn


def test_each_objective_gives_its_protection_of_the_same_answers() -> None:
    logits, labels = drawn(1000, 5)
    kinds = {"worst-case": qf.Terraces, "greedy": qf.AAA, "paper": qf.AAA}
    settings = {"worst-case": {"allowed": 0.05}, "greedy": {}, "paper": {}}
    assert OBJECTIVES.keys() == kinds.keys()
    for objective, kind in kinds.items():
        found = qf.fit(logits, labels, objective=objective, **settings[objective])
        protected = qf.protect(torch.nn.Identity(), found)
        assert type(protected) is kind
        if objective != "paper":  # Adam may flip answers near a tie
            assert torch.equal(protected(logits).argmax(1), logits.argmax(1))
    assert (found.tau, found.solver, found.rule) == (6.0, "adam", "lowest")


def test_the_worst_case_is_the_default() -> None:
    logits, labels = drawn(1000, 5)
    assert qf.fit(logits, labels, allowed=0.05) == qf.fit(logits, labels, objective="worst-case", allowed=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "best"}, "unknown objective 'best'"),
        ({"tau": 2.0}, "worst-case does not take tau; it belongs to the objective greedy"),
        ({"objective": "paper", "tau": 2.0}, "paper does not take tau; it belongs to the objective greedy"),
        ({"objective": "greedy", "ranks": 2}, "greedy does not take ranks; it belongs to the objective worst-case"),
        ({"objective": "greedy", "rank": 2}, "greedy does not take rank; it takes curve, tau"),
    ],
)
def test_settings_of_another_objective_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qf.fit(*drawn(200, 5), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_that_are_all_tied_are_refused(objective: str) -> None:
    with pytest.raises(ValueError, match="all rows are tied for the top"):
        qf.fit(torch.zeros(100, 5), torch.zeros(100, dtype=torch.int64), objective=objective)


@pytest.mark.parametrize(
    "settings", [{"objective": "greedy"}, {"objective": "greedy", "curve": "sine"}, {"objective": "paper"}, {}]
)
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_logits_that_are_all_but_tied_are_named_as_what_is_wrong(settings: dict[str, str], offset: float) -> None:
    logits, labels = drawn(500, 5)
    with pytest.raises(ValueError, match=r"expected logits whose best class leads .* none by more than \d") as error:
        qf.fit((logits * 2e-8 + offset), labels, **settings)  # type: ignore[arg-type]
    assert "tau" not in str(error.value)


@pytest.mark.parametrize("objective", ["worst-case", "greedy", "paper"])
@pytest.mark.parametrize("scale", [1e5, 1e6, 1e8, 1e30])
def test_logits_scaled_up_beyond_any_temperature_are_refused(scale: float, objective: str) -> None:
    logits, labels = drawn(500, 5)
    with pytest.raises(ValueError, match=r"temperature of at most 1000, .* half of these 500 lead by at least"):
        qf.fit(logits * scale, labels, objective=objective)


@pytest.mark.parametrize(("objective", "scale"), [("worst-case", 1e-4), ("greedy", 1e-2), ("paper", 1e-3)])
def test_logits_scaled_down_beyond_what_calibrates_are_refused(objective: str, scale: float) -> None:
    model, held_out = qf.models.load("fashion-resnet"), qf.data.load("fashion-mnist", "calibration")
    with torch.inference_mode():
        logits = model(held_out.images)
    qf.fit(logits, held_out.labels, objective=objective)
    with pytest.raises(
        ValueError, match=r"these want a temperature of 0\.0.* be off by \d\d % \(ECE\); .* scaled down"
    ):
        qf.fit(logits * scale, held_out.labels, objective=objective)


@pytest.mark.parametrize("objective", ["worst-case", "greedy", "paper"])
def test_probabilities_in_place_of_logits_are_refused_and_their_logarithms_are_not(objective: str) -> None:
    logits, labels = drawn(500, 5)
    probs = logits.softmax(1)
    for given in (probs, probs.bfloat16(), (100 * probs).round(decimals=1)):
        with pytest.raises(ValueError, match=r"that sum to 1(00)?: probabilities; pass"):
            qf.fit(given, labels, objective=objective)
    settings = {"allowed": 0.1} if objective == "worst-case" else {}
    qf.fit(logits.log_softmax(1), labels, objective=objective, **settings)


def test_a_period_too_small_for_float32_is_told_of_the_logits() -> None:
    logits, labels = drawn(500, 5)
    small = logits * (1e-6 / float(logits.topk(2).values.diff().abs().median()))
    with pytest.raises(ValueError, match="these 500 rows half lead by at most 1e-06"):
        qf.fit(small, labels, objective="greedy")


def tied(share: float, lead: float = 0.0, scale: float = 1.0, n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, a share of whose rows leads by no more than this."""
    logits, labels = drawn(n, 5)
    logits = logits.double()
    best = logits.topk(2, dim=1)
    rows = torch.arange(round(share * n))
    logits[rows, best.indices[rows, 1]] = best.values[rows, 0] - lead
    return scale * logits, labels


@pytest.mark.parametrize(
    ("share", "lead", "scale", "half", "ties"),
    [
        (0.0, 0.0, 1e-5, "1.7e-05", 0),
        (0.0, 0.0, 1e-6, "1.7e-06", 0),
        (0.5, 0.0, 1.0, "0", 500),
        (0.9, 0.0, 1.0, "0", 900),
        (0.9, 1e-9, 1.0, "1e-09", 0),
        (0.99, 1e-9, 1.0, "1e-09", 0),
        (1.0, 1e-5, 1.0, "1e-05", 0),
    ],
)
def test_terraces_refused_for_logits_too_small_are_told_so_first(
    share: float, lead: float, scale: float, half: str, ties: int
) -> None:
    logits, labels = tied(share, lead, scale, n=1000)
    told = rf"^expected logits .* half of these 1000 lead by at most {half} \({ties} are tied .* scaled down\. As these"
    with pytest.raises(ValueError, match=told):
        qf.fit(logits, labels)
    if scale < 1:
        with pytest.raises(ValueError, match=r"would be off by \d\d % \(ECE\); .* scaled down"):
            qf.fit(logits, labels, allowed=1.0)
    else:
        assert not any(qf.fit(logits, labels, allowed=1.0).borders)  # levels of classes take no margin


@pytest.mark.parametrize(("share", "scale"), [(0.97, 1.0), (0.99, 1.0), (0.99, 1e-6), (0.995, 1e-3)])
def test_wrong_answers_that_are_all_tied_are_refused_before_the_fit(share: float, scale: float) -> None:
    logits, labels = tied(share, scale=scale)
    sharp = torch.arange(400) >= round(share * 400)
    logits[sharp] *= 20 * torch.nn.functional.one_hot(logits[sharp].argmax(1), 5)
    with pytest.raises(ValueError, match=rf"but {round(share * 400)} of these 400 rows are tied for the top, and "):
        qf.fit(logits, labels, allowed=1.0)


@pytest.mark.parametrize(("share", "scale"), [(0.5, 1.0), (0.0, 1e-3)])
def test_what_terraces_can_be_fitted_to_is_not_refused(share: float, scale: float) -> None:
    logits, labels = tied(share, scale=scale)
    found = qf.fit(logits, labels, allowed=0.05)
    assert found.auroc_cross_fitted >= found.auroc_undefended - 0.05
    assert sum(map(len, found.borders)) > 3


def test_other_refusals_of_terraces_keep_their_words() -> None:
    logits, labels = drawn(300, 2)
    with pytest.raises(ValueError, match=r"^no terraces keep the AUROC within 0\.001"):
        qf.fit(logits, labels, allowed=0.001)
    with pytest.raises(ValueError, match=r"^expected ranks from 1 to 1,"):
        qf.fit(1e-5 * logits, labels, ranks=2)


def test_the_curve_of_terraces_takes_its_key_and_nothing_else() -> None:
    logits, labels = drawn(1000, 5)
    found = qf.fit(logits, labels, allowed=0.05)
    shown = qf.disguise(logits, curve="terraces", key=found)
    assert torch.equal(shown, qf.protect(torch.nn.Identity(), found)(logits))
    wrong = [{"curve": "terraces"}, {"key": found}, {"curve": "terraces", "key": found, "tau": 2.0}]
    wrong += [{"curve": "terraces", "key": {}}, {"curve": "linear", "key": {}}]
    for settings in wrong:
        with pytest.raises(ValueError, match=r"expected a key|no effect"):
            qf.disguise(logits, **settings)  # type: ignore[arg-type]
    assert torch.equal(qf.disguise(logits, tau=2.0), qf.AAA(torch.nn.Identity(), tau=2.0)(logits))


@pytest.mark.parametrize("found", [None, {}, "fit.json"])
def test_what_is_no_fit_is_refused(found: object) -> None:
    with pytest.raises(ValueError, match="expected what `fit` found"):
        qf.protect(torch.nn.Identity(), found)  # type: ignore[arg-type]


def test_files_of_both_kinds_are_read(tmp_path) -> None:
    logits, labels = drawn(1000, 5)
    for name, settings in (("a", {"allowed": 0.05}), ("b", {"objective": "greedy"})):
        found = qf.fit(logits, labels, **settings)  # type: ignore[arg-type]
        found.save(tmp_path / name)
        assert qf.load_fit(tmp_path / name) == found
    (tmp_path / "c").write_text("[1")
    with pytest.raises(ValueError, match="expected a JSON file that `fit` wrote"):
        qf.load_fit(tmp_path / "c")


def test_the_command_line_fits_and_attacks_with_terraces(tmp_path) -> None:
    from queryfoil import data, models, oracle

    held_out = data.load("fashion-mnist", "calibration")[:500]
    logits = oracle.answers(models.load("fashion-resnet"), held_out.images, held_out.ids, held_out.ids)
    np.savez(tmp_path / "logits.npz", logits=logits.numpy(), labels=held_out.labels.numpy())
    fit = ["fit", str(tmp_path / "logits.npz"), "--out", str(tmp_path / "fit.json")]
    result = CliRunner().invoke(app, [*fit, "--allowed", "0.05"])
    assert result.exit_code == 0, result.output
    assert "borders in" in result.output
    refused = CliRunner().invoke(app, [*fit, "--tau", "2"])
    assert refused.exit_code == 2
    assert "it belongs to the objective greedy" in refused.stderr
    attack = ["attack", "fashion-resnet", "--images", "fashion-mnist", "--n", "5", "--budget", "20", "--out"]
    attack += [str(tmp_path / "out"), "--fit", str(tmp_path / "fit.json"), "--defense"]
    wrong = CliRunner().invoke(app, [*attack, "aaa"])
    assert "was fitted for terraces, but the defense is aaa; set terraces" in wrong.stderr
    result = CliRunner().invoke(app, [*attack, "terraces"])
    assert result.exit_code == 0, result.output
