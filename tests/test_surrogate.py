"""The surrogates of QueryNet: that they learn, and how the searching ones are built."""

import pytest
import torch

from helpers import Linear, images, labels_of
from queryfoil.attacks import surrogate
from queryfoil.attacks.surrogate_search import Edge, Halve, SuperNet
from queryfoil.losses import margin


def agreement(network, model, x):
    """Correlation of a surrogate's margins with the model's."""
    labels = labels_of(model, x)
    with torch.no_grad():
        return float(torch.stack([margin(network(x), labels), margin(model(x), labels)]).corrcoef()[0, 1])


def test_small_surrogates_learn_the_model():
    model, x = Linear(), images(600)
    with torch.no_grad():
        answers = model(x) / model(x).std()
    batches = torch.randint(0, 500, (150, 2, 64), generator=torch.Generator().manual_seed(0))
    networks = surrogate.build("small", x, 10, 16, seed=0)
    for network in networks:
        before = agreement(network, model, x[500:])
        surrogate.train(network, (x * 255).round().byte(), answers, batches)
        assert before < 0.3
        assert agreement(network, model, x[500:]) > 0.6
    assert len({sum(p.numel() for p in network.network.parameters()) for network in networks}) == 3


def test_a_searching_surrogate_learns_weights_and_architecture(monkeypatch):
    monkeypatch.setattr(surrogate, "CELLS", (1,))
    model, x = Linear(), images(8)
    with torch.no_grad():
        answers = model(x) / model(x).std()
    (network,) = surrogate.build("search", x, 10, 4, seed=0)
    bytes_of_x, every = (x * 255).round().byte(), torch.arange(8).expand(26, 2, 8)  # ends with the rate near 0

    def error():
        with torch.no_grad():
            return float((network(x) - answers).pow(2).mean())

    before, parameters = error(), [p.clone() for p in network.network.parameters()]
    surrogate.train(network, bytes_of_x, answers, every[:1])
    assert all(not torch.equal(p, q) for p, q in zip(parameters, network.network.parameters(), strict=True))
    surrogate.train(network, bytes_of_x, answers, every)
    assert error() < 0.7 * before


def test_the_searching_surrogates_have_10_6_and_8_cells_and_halve_at_the_thirds():
    networks = [model.network for model in surrogate.build("search", images(2), 10, 4, seed=0)]
    assert [len(network.cells) for network in networks] == [10, 6, 8]
    halving = [[i for i, halves in enumerate(network.halves) if halves] for network in networks]
    assert halving == [[3, 6], [2, 4], [2, 5]]
    assert [network.linear.in_features for network in networks] == [4 * 16] * 3
    assert networks[0].alphas.shape == (2, 14, 8)
    assert len(networks[0].architecture()) + len(networks[0].weights()) == len(list(networks[0].parameters()))


def test_an_edge_passes_a_quarter_of_the_channels_and_shuffles_all():
    x = torch.rand(2, 8, 5, 7, generator=torch.Generator().manual_seed(0))
    edge = Edge(8, stride=1)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # four groups of two, one of each in turn
    torch.testing.assert_close(edge(x, torch.eye(8)[3]), x[:, order])  # skip
    none = edge(x, torch.eye(8)[0]).detach()
    assert float(none[:, [0, 4]].abs().max()) == 0
    torch.testing.assert_close(none[:, [1, 2, 3, 5, 6, 7]], x[:, [2, 4, 6, 3, 5, 7]])
    pooled = torch.nn.functional.avg_pool2d(x[:, :2], 3, 1, 1, count_include_pad=False)
    scaled = torch.nn.functional.batch_norm(pooled, None, None, training=True)
    torch.testing.assert_close(edge(x, torch.eye(8)[2] / 2)[:, [0, 4]], scaled / 2)


@pytest.mark.parametrize("size", [(5, 5), (6, 9), (8, 8)])
def test_halving_works_for_any_size(size):
    x = images(3, (8, *size))
    half = [-(-side // 2) for side in size]
    assert list(Halve(8, 4)(x).shape) == [3, 4, *half]
    assert list(Edge(8, stride=2)(x, torch.full((8,), 1 / 8)).shape) == [3, 8, *half]
    assert SuperNet(8, 3, width=4, cells=3)(x).shape == (3, 3)
    assert surrogate.Small(x, 3, 4, kernel=5, depth=2)(x).shape == (3, 3)


@pytest.mark.parametrize("kind", ["small", "search"])
@pytest.mark.usefixtures("same_random_states")
def test_surrogates_are_a_function_of_the_seed(kind, monkeypatch):
    monkeypatch.setattr(surrogate, "CELLS", (1, 1, 1))
    first, again, other = (
        torch.cat(
            [p.flatten() for one in surrogate.build(kind, images(1), 5, 4, seed) for p in one.network.parameters()]
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
