"""Protected models under torch.compile and autocast: the same labels and margins, as docs/protect-a-model.md says."""

import pytest
import torch
from torch import Tensor, nn

import queryfoil as qf
from queryfoil.defenses.calibration import Fit
from queryfoil.defenses.terrace_fit import TerraceFit

K = 5
FITS: dict[str, Fit | TerraceFit] = {
    "aaa": Fit("linear", 2.0, 1.0, 5.0, 1.0, "exact", 100, 0.1, K, 100, 1.0, 0.1, 0.1, 0.1),
    "terraces": TerraceFit(
        (0, 1, 1, 0, 1), ((0.5,), ()), (((0.5,), (0.9,)), ((0.8,),)), 1.0, 100, 0.5, 0.1, 0.1, 0.9, 0.9
    ),
}
each = pytest.mark.parametrize("name", FITS)


def margins(scores: Tensor) -> Tensor:
    top = scores.double().topk(2).values
    return top[:, 0] - top[:, 1]


def drawn(n: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, K)).eval()


@each
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_compiled_protection_shows_the_same(name: str, backend: str) -> None:
    torch.compiler.reset()
    protected, x = qf.protect(network(), FITS[name]), torch.randn(64, 8)
    with torch.no_grad():
        expected = protected(x)
        found = torch.compile(protected, backend=backend, fullgraph=name == "terraces")(x)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert (margins(found) - margins(expected)).abs().max() <= 1e-5
    assert not torch.allclose(margins(expected), margins(network()(x)))  # there was something to show


def test_aaa_as_one_graph_is_refused_and_its_exported_form_is_not() -> None:
    torch.compiler.reset()
    from queryfoil.deploy.graph import Protection

    z = drawn(64)
    with torch.no_grad(), pytest.raises(Exception, match=r"(?i)data-dependent"):
        torch.compile(qf.protect(nn.Identity(), FITS["aaa"]), backend="aot_eager", fullgraph=True)(z)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(Protection(FITS["aaa"]), backend="aot_eager", fullgraph=True)(z)
    assert (margins(found) - margins(qf.protect(nn.Identity(), FITS["aaa"])(z))).abs().max() <= 1e-3


@each
def test_autocast_leaves_a_protection_as_it_is(name: str) -> None:
    protected, z = qf.protect(nn.Identity(), FITS[name]), drawn(500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = protected(z)
    assert found.dtype == torch.float32
    assert torch.equal(found, protected(z))


@each
def test_a_network_under_autocast_keeps_its_labels(name: str) -> None:
    inner, x = network(), 3 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        raw, shown = inner(x), qf.protect(inner, FITS[name])(x)
    expected = qf.protect(nn.Identity(), FITS[name])(raw.float())
    places = raw.float().topk(2).indices
    tied = raw.gather(1, places[:, :1]) == raw.gather(1, places[:, 1:])
    assert torch.equal(shown.argmax(1)[~tied[:, 0]], raw.argmax(1)[~tied[:, 0]])
    # terraces answer in single precision, AAA in the precision of what it is given
    assert shown.dtype == (torch.float32 if name == "terraces" else torch.bfloat16)
    near = 0.0 if name == "terraces" else float(raw.abs().max()) * 2.0**-7
    assert (margins(shown) - margins(expected)).abs().max() <= near
