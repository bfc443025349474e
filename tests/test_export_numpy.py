"""A protection as a Python file: it needs NumPy alone, and shows what the module shows."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from typer.testing import CliRunner

from queryfoil import cli
from queryfoil.defenses import calibration, terrace_fit
from queryfoil.deploy import as_numpy, numpy_aaa, numpy_terraces
from queryfoil.deploy.export import export
from queryfoil.deploy.graph import Protection, off_borders
from queryfoil.models.victim import Victim

Fit = calibration.Fit


def aaa(classes: int, curve: str = "linear", beta: float = 5.0, temperature: float = 1.0) -> Fit:
    alpha = calibration.check_settings(curve, 2.0, None, beta, temperature, "exact", 100, 0.1)
    return Fit(curve, 2.0, alpha, beta, temperature, "exact", 100, 0.1, classes, 100, 1.0, 0.1, 0.1, 0.1)


def terraces(classes: int, ranks: int = 1) -> terrace_fit.TerraceFit:
    group = tuple(i % 3 for i in range(classes))
    first = ((0.6,), (0.8,), (0.97,)) if ranks == 1 else ((0.5, 0.3), (0.8, 0.15), (0.97, 0.02))
    return terrace_fit.TerraceFit(
        group if classes > 2 else (0, 1),
        ((1.0, 2.5), (), (0.75,))[: 3 if classes > 2 else 2],
        (first, first[1:2], first[:2])[: 3 if classes > 2 else 2],
        1.0, 100, 0.5, 0.1, 0.1, 0.9, 0.9,
    )  # fmt: skip


def hard(classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of many margins and spreads; ties for the top, for the second place, and of all."""
    generator = torch.Generator().manual_seed(classes)
    z = torch.cat([s * torch.randn(32, classes, generator=generator, dtype=dtype) for s in (0.1, 1.0, 3.0, 10.0, 30.0)])
    z[0], z[1, :2], z[2], z[3] = 0, 50, z[2].round(), 1e4 * z[3]
    z[32:64, 1:] *= torch.rand(32, classes - 1, generator=generator, dtype=dtype) ** 8
    return z


def code(found: Any, path: Path, **kinds: str) -> dict[str, Any]:
    """The names in a file that is written for a fit, without the check."""
    protection = Protection(found, **kinds)
    about = {"version": "1", "defense": "x", "fit_data": None, "parameters": vars(found)}
    as_numpy.write(protection, json.dumps(about), path)
    return runpy.run_path(str(path))


def margins(shown: NDArray[Any]) -> NDArray[Any]:
    top = np.sort(np.asarray(shown, dtype=np.float64), axis=1)
    return top[:, -1] - top[:, -2]


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize(
    "make",
    [
        lambda k: aaa(k),
        lambda k: aaa(k, "sine", temperature=0.4),
        lambda k: aaa(k, "sine", beta=1.0),
        lambda k: aaa(k, beta=40.0, temperature=2.5),
        terraces,
        lambda k: terraces(k, 2 if k > 2 else 1),
    ],
    ids=["linear", "sine", "sine, beta 1", "linear, beta 40", "terraces", "two places"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_shows_what_the_module_shows(tmp_path: Path, classes: int, make: Any, dtype: torch.dtype) -> None:
    found, z = make(classes), hard(classes, dtype)
    shown = code(found, tmp_path / "p.py")["protect"](z.numpy())
    with torch.inference_mode():
        expected = Protection(found)(z).numpy()
    assert shown.dtype == expected.dtype
    clear = off_borders(z, found).numpy()
    assert clear.sum() > 120
    np.testing.assert_array_equal(shown.argmax(1)[clear], expected.argmax(1)[clear])
    np.testing.assert_allclose(margins(shown)[clear], margins(expected)[clear], rtol=1e-5, atol=1e-4)
    probabilities = [torch.from_numpy(s[clear]).double().softmax(1).numpy() for s in (shown, expected)]
    np.testing.assert_allclose(*probabilities, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [aaa, terraces])
@pytest.mark.parametrize("given", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("shown", ["logits", "probs", "log_probs"])
def test_kinds_of_scores(tmp_path: Path, make: Any, given: str, shown: str) -> None:
    found, z = make(10), 3 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    scores = {"logits": z, "log_probs": z.log_softmax(1), "probs": z.softmax(1)}[given]
    protect = code(found, tmp_path / "p.py", given=given, shown=shown)["protect"]
    expected = Protection(found, given, shown)(scores).numpy()
    clear = off_borders(z, found).numpy()
    np.testing.assert_allclose(protect(scores.numpy())[clear], expected[clear], rtol=1e-3, atol=2e-4)
    if given != "logits":
        sure = torch.zeros(1, 10)
        sure[0, 3] = 1
        sure = sure if given == "probs" else sure.log()
        np.testing.assert_allclose(protect(sure.numpy()), Protection(found, given, shown)(sure), rtol=1e-4)


@pytest.mark.parametrize("make", [aaa, terraces])
def test_rows_are_independent_and_bad_ones_are_nan(tmp_path: Path, make: Any) -> None:
    protect = code(make(10), tmp_path / "p.py")["protect"]
    z = hard(10).numpy()
    whole = protect(z)
    kept = z.copy()
    for n in (1, 3, 64):
        np.testing.assert_array_equal(protect(z[:n]), whole[:n])
    assert protect(z[:0]).shape == (0, 10)
    np.testing.assert_array_equal(z, kept)  # nor is what comes changed
    broken = z.copy()
    broken[1, 2], broken[2, :], broken[3, 0] = np.nan, np.inf, -np.inf
    shown = protect(broken)
    assert np.isnan(shown).all(1).tolist()[:5] == [False, True, True, True, False]
    np.testing.assert_array_equal(shown[4:], whole[4:])
    assert protect(z.astype(np.float16)).dtype == np.float32
    for bad, message in (
        (z[:, :9], r"expected scores \(N, 10\), as the protection was fitted to, but got \(160, 9\)"),
        (z[0], r"but got \(10,\)"),
        (z.astype(int), "expected floating-point scores, but got int64"),
    ):
        with pytest.raises(ValueError, match=message):
            protect(bad)


def test_what_is_no_probability_is_nan(tmp_path: Path) -> None:
    protect = code(aaa(3), tmp_path / "p.py", given="probs")["protect"]
    shown = protect(np.array([[0.5, 0.3, 0.2], [1.1, -0.1, 0.0], [0.5, np.nan, 0.5]]))
    assert np.isnan(shown).all(1).tolist() == [False, True, True]


def test_gaps_of_any_size_give_finite_scores() -> None:
    z = np.array([[1e30, -1e30, 3e38, 0.0], [1e10, -1e10, 0.0, 1.0], [1e-38, 0.0, 0.0, -1e-38]], dtype=np.float32)
    with np.errstate(all="ignore"):
        shown = numpy_aaa.disguise(z, "linear", 6.0, 1.0, 5.0, 1.0)
    assert np.isfinite(shown).all()
    assert shown.argmax(1).tolist() == [2, 0, 0]


@pytest.mark.parametrize("name", ["aaa", "terraces"])
def test_the_command_writes_a_file_that_needs_numpy_alone(tmp_path: Path, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(1000, 5, generator=generator)
    y = z.softmax(1).multinomial(1, generator=generator).squeeze(1)
    np.savez(tmp_path / "logits.npz", logits=z.numpy(), labels=y.numpy())
    found: Any = calibration.fit(z, y, tau=2.0) if name == "aaa" else terrace_fit.fit(z, y, allowed=0.1)
    found.save(tmp_path / "fit.json")
    out = tmp_path / "protection.py"
    given = ["--fit", str(tmp_path / "fit.json"), "--held-out", str(tmp_path / "logits.npz"), "--softmax"]
    result = CliRunner().invoke(cli.app, ["export", "scores", str(out), "--to", "numpy", *given])
    assert "labels are those of the module" in result.output.replace("\n", " "), result.output
    text = out.read_text()
    assert {line for line in text.splitlines() if "import " in line} == {
        "from collections.abc import Sequence",
        "import math",
        "from typing import Any",
        "import numpy as np",
        "from numpy.typing import NDArray",
    } - ({"import math"} if name == "terraces" else {"from collections.abc import Sequence"})
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert max(map(len, text.splitlines())) <= 120
    np.save(tmp_path / "z.npy", z[:20].numpy())
    lines = (
        "import sys; sys.modules['torch'] = None",
        "import numpy as np, protection",
        "np.save('shown.npy', protection.protect(np.load('z.npy')))",
        "print(protection.ABOUT['defense'], protection.ABOUT['fit_data'], protection.SHOWN)",
    )
    told = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    defense, fit_data, kind = told.stdout.split()
    assert (defense, len(fit_data), kind) == (name, 16, "probs")
    np.testing.assert_allclose(np.load(tmp_path / "shown.npy"), Protection(found, "logits", "probs")(z[:20]), atol=1e-4)


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Victim(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).eval())
    out = tmp_path / "p.py"
    with pytest.raises(ValueError, match="holds the protection alone, not the network"):
        export(network, aaa(5), out, to="numpy", shape=(1, 3, 4))
    with pytest.raises(ValueError, match="holds a protection, but there is none"):
        export(None, None, out, to="numpy", classes=5)
    monkeypatch.setattr(as_numpy, "_literal", lambda value, name: "3.0" if name == "TAU" else repr(value))
    with pytest.raises(ValueError, match="the exported file differs from the module: 0 of"):
        export(None, aaa(5), out, to="numpy")
    monkeypatch.setattr(as_numpy, "_literal", lambda value, name: "missing")
    with pytest.raises(ValueError, match=r"does not run with NumPy alone: (.|\n)*NameError"):
        export(None, aaa(5), out, to="numpy")
    assert list(tmp_path.iterdir()) == []


def test_a_template_stands_for_a_fit_too() -> None:
    z = hard(10).numpy()
    assert (numpy_aaa.protect(z).argmax(1) == z.argmax(1)).all()
    assert numpy_terraces.protect(z[:, :3]).max() == np.float32(np.log(0.9))
