"""`queryfoil scan`: what it prints is what `estimate_tau` finds, behind a defense and without."""

from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import queryfoil as qf
from queryfoil import cli
from queryfoil.attacks.line_scan import Scan, estimate_tau
from queryfoil.scan_command import ends, told


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["scan", *map(str, arguments)])


MODEL = ("fashion-resnet", "--images", "fashion-mnist")


def test_the_period_of_a_protected_model_is_printed_with_its_queries() -> None:
    result = call(*MODEL, "--defense", "aaa", "--defense-set", "tau=3", "--lines", 4)
    assert result.exit_code == 0, result.output
    some = qf.data.load("fashion-mnist", "attack")
    scan = estimate_tau(
        qf.AAA(qf.models.load("fashion-resnet"), tau=3.0).eval(), some.images[ends(some.labels, 4)]
    )  # fmt: skip
    assert scan.tau == pytest.approx(3, rel=0.05)
    assert result.output == f"fashion-resnet behind aaa: {told(scan)}\n"
    assert f"AAA-linear, tau {scan.tau:.4g}" in result.output
    assert f"(4 lines, {scan.queries} queries)" in result.output


def test_nothing_is_found_of_a_model_without_a_defense() -> None:
    result = call(*MODEL, "--lines", 2)
    assert result.exit_code == 0, result.output
    assert "fashion-resnet: no period found" in result.output
    assert "2 lines" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MODEL, "--lines", 1), "expected lines as a whole number >= 2"),
        ((*MODEL, "--defense", "aaa"), "set tau"),
        ((*MODEL, "--lines", 100_000), "expected images for 100000 lines, each between two classes"),
        (("nobody", "--images", "fashion-mnist"), "nobody"),
    ],
)
def test_wrong_settings(arguments: tuple[Any, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_lines_lead_from_one_class_to_another_and_share_no_image() -> None:
    labels = torch.tensor([1, 1, 1, 2, 2, 3, 1, 1])
    rows = ends(labels, 3)
    assert len(set(rows.tolist())) == 6
    assert bool((labels[rows[::2]] != labels[rows[1::2]]).all())
    with pytest.raises(ValueError, match="these 8 have 3 such pairs"):
        ends(labels, 4)


def test_a_sine_is_told_by_its_turning_points() -> None:
    assert "AAA-sine, tau 2, alpha 0.7, from 12 turning points" in told(Scan("sine", 2.0, 0.7, 5, 12, 700))
