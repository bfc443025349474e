"""The task of a hundred classes: pairs of images, and a network for them."""

import torch

from queryfoil import data, models
from queryfoil.models.pairs import Pairs, fashion


def test_both_halves_and_the_label_belong_together() -> None:
    one, two = data.load("fashion-mnist", "attack"), data.load("fashion-pairs", "attack")
    assert two.images.shape == (1000, 1, 28, 56)
    assert torch.equal(two.images[..., :28], one.images)
    assert torch.equal(two.ids, one.ids)
    for i in (0, 7, 500):
        right = (one.images == two.images[i, :, :, 28:]).flatten(1).all(1).nonzero()[0, 0]
        assert int(two.labels[i]) == 10 * int(one.labels[i]) + int(one.labels[right])
    assert torch.equal(two.labels, data.load("fashion-pairs", "attack").labels)
    assert not set(two.ids.tolist()) & set(data.load("fashion-pairs", "calibration").ids.tolist())


def test_the_margin_of_a_pair_is_the_smaller_one_of_its_halves() -> None:
    some = data.load("fashion-pairs", "attack")[:20].images
    network = models.load("fashion-resnet")
    with torch.no_grad():
        both = Pairs(network)(some)
        halves = [network(half) for half in (some[..., :28], some[..., 28:])]
    tops = [half.topk(2, 1) for half in halves]
    assert torch.equal(both.argmax(1), 10 * tops[0].indices[:, 0] + tops[1].indices[:, 0])
    margins = torch.stack([top.values[:, 0] - top.values[:, 1] for top in tops]).amin(0)
    top = both.topk(2, 1).values
    torch.testing.assert_close(top[:, 0] - top[:, 1], margins, atol=1e-4, rtol=0)
    product = (halves[0].softmax(1)[:, :, None] * halves[1].softmax(1)[:, None, :]).flatten(1)
    torch.testing.assert_close(both.softmax(1), product, atol=1e-5, rtol=0)


def test_the_shipped_network_reads_pairs() -> None:
    pairs = data.load("fashion-pairs", "attack")[:100]
    with torch.no_grad():
        assert float((fashion()(pairs.images).argmax(1) == pairs.labels).float().mean()) > 0.8
