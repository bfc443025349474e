"""AAA's exact solver as an exported file holds it: what `disguise` shows, in fewer operations."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

import queryfoil as qf
from queryfoil.defenses import disguise as aaa
from queryfoil.defenses.calibration import Fit
from queryfoil.deploy.exact import Exact
from queryfoil.deploy.export import export

SETTINGS = {
    "linear": ("linear", 6.0, 1.0, 5.0, 1.0),
    "linear, a step of 0.6, T = 0.3": ("linear", 1.0, 0.6, 5.0, 0.3),
    "linear, clipped": ("linear", 2.0, 1.4, 5.0, 0.7),
    "sine": ("sine", 6.0, 0.7, 5.0, 1.0),
    "sine, T = 3, beta = 50": ("sine", 2.0, 0.7, 50.0, 3.0),
    "linear, beta = 50": ("linear", 3.0, 1.0, 50.0, 1.5),
    "sine, beta = 4": ("sine", 2.0, 0.7, 4.0, 1.0),
}


def fit(settings: tuple[str, float, float, float, float], classes: int) -> Fit:
    return Fit(*settings, "exact", 100, 0.1, classes, 100, 1.0, 0.1, 0.1, 0.1)


def hard(classes: int) -> Tensor:
    """Logits of many spreads, some over orders of magnitude within a row; ties for each place; huge gaps."""
    generator = torch.Generator().manual_seed(classes)
    parts = []
    for scale in (0.1, 1, 3, 10, 30, 1e3):
        z = scale * torch.randn(80, classes, generator=generator)
        z[20:40, : classes // 2] *= 1e-3
        z[40:60, 1:] *= torch.rand(20, classes - 1, generator=generator) ** 8
        z[60:70] = z[60:70].round()
        z[70, :], z[71, :2], z[72, 1:] = 0, 50, -scale
        parts.append(z)
    return torch.cat(parts)


def objective(shown: Tensor, z: Tensor, settings: tuple[str, float, float, float, float]) -> Tensor:
    curve, tau, alpha, beta, temperature = settings
    margins = [-top[:, 1] + top[:, 0] for top in (s.topk(2).values for s in (shown, z))]
    target = aaa.target_margin(margins[1], curve, tau, alpha)
    p = (z / temperature).softmax(1).amax(1)
    return (margins[0] - target).abs() + beta * (shown.softmax(1).amax(1) - p).abs()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_shows_what_disguise_shows(name: str, classes: int, dtype: torch.dtype) -> None:
    settings, z = SETTINGS[name], hard(classes).to(dtype)
    shown, expected = Exact(fit(settings, classes))(z), aaa._exact(z, *settings)
    assert torch.equal(shown.argmax(1), expected.argmax(1))
    margins = [top[:, 0] - top[:, 1] for top in (s.topk(2).values for s in (shown, expected))]
    near = (margins[0] - margins[1]).abs() <= 1e-4 + 1e-6 * margins[1].abs()
    # at a border of the curve, or where two margins are equally good, rounding decides
    value = [objective(s, z, settings) for s in (shown, expected)]
    equal = (value[0] - value[1]).abs() < 1e-4
    border = (z.topk(2).values.diff().squeeze(1) / settings[1]).frac().abs()
    at_border = (border < 1e-5) | (border > 1 - 1e-5)
    assert bool((near | equal | at_border).all())
    assert int(near.sum()) >= len(z) - 3
    assert float((shown.softmax(1) - expected.softmax(1)).abs()[near].max()) < 1e-4


def test_rows_are_independent_keep_their_order_and_show_no_raw_sum() -> None:
    z, exact = hard(10), Exact(fit(SETTINGS["linear"], 10))
    shown = exact(z)
    torch.testing.assert_close(exact(z[5:6]), shown[5:6], rtol=0, atol=0)
    order = z.argsort(1)
    above = z.gather(1, order).diff(dim=1) > 0
    assert bool((shown.gather(1, order).diff(dim=1) >= 0)[above].all())
    assert bool((shown.amax(1) == 0).all())
    assert bool(((shown == 0).sum(1) == 1).all())


def test_what_is_not_finite_is_nan_and_huge_gaps_are_finite() -> None:
    exact = Exact(fit(SETTINGS["sine"], 4))
    bad = torch.tensor([[1.0, torch.nan, 0, 0], [torch.inf, 0, 0, 0], [0, 1, 2, -torch.inf], [0.0, 1, 2, 3]])
    assert exact(bad).isnan().all(1).tolist() == [True, True, True, False]
    assert exact(bad).isnan().any(1).tolist() == [True, True, True, False]
    huge = torch.tensor([[1e10, -1e10, 0.0, 1.0], [1e20, 1e19, -1e20, 0.0], [1e-38, 0.0, 0.0, -1e-38]])
    assert bool(exact(huge).isfinite().all())


def test_the_file_has_few_operations(tmp_path: Path) -> None:
    nodes = {}
    for name in ("linear", "sine, beta = 4"):
        path = export(None, fit(SETTINGS[name], 10), tmp_path / "m.onnx").path
        nodes[name] = len(onnx.load(path).graph.node)
    assert nodes["linear"] <= 135
    assert nodes["sine, beta = 4"] < nodes["linear"]


def test_it_is_what_protect_shows() -> None:
    z, found = 3 * torch.randn(100, 10, generator=torch.Generator().manual_seed(0)), fit(SETTINGS["sine"], 10)
    torch.testing.assert_close(Exact(found)(z), qf.protect(torch.nn.Identity(), found)(z), rtol=1e-4, atol=1e-3)
