"""RFD: where noise enters, how much, and that nothing is left behind."""

import copy
import pickle
import threading
from statistics import NormalDist

import pytest
import torch
from torch import nn

from helpers import Linear, images
from queryfoil import models, rng
from queryfoil.defenses.rfd import RFD, largest_std
from queryfoil.models.preact_resnet import PreActResNet
from queryfoil.oracle import answers


class Stages(nn.Module):
    """Two stages that change nothing, and pixels as logits."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.head = nn.Identity(), nn.Identity(), nn.Flatten()
        self.eval()

    def forward(self, x):
        return self.head(self.layer2(self.layer1(x)))


def ask(model, x, query=1):
    ids = torch.arange(len(x))
    with torch.no_grad(), rng.rows(0, ids, torch.full_like(ids, query)):
        return model(x)


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


def test_each_stage_adds_noise_of_its_own_with_the_standard_deviation_given():
    x = images(200)
    one, other, both = (
        ask(RFD(Stages(), std=0.2, layers=layers), x) - x.flatten(1) for layers in ("layer1", "layer2", None)
    )
    n = one.numel()
    for noise, std in ((one, 0.2), (other, 0.2), (both, 0.2 * 2**0.5)):
        assert abs(float(noise.std()) - std) < 4 * std / (2 * n) ** 0.5
        assert abs(float(noise.mean())) < 4 * std / n**0.5
    second = both - one  # the first draw of a call is that of the first layer
    assert float(second.std()) == pytest.approx(0.2, rel=0.03)
    assert abs(float((one * second).mean())) < 4 * 0.04 / n**0.5


def test_relative_noise_follows_the_spread_of_each_image_and_channel():
    x = torch.zeros(2, 3, 40, 40)
    pattern = torch.tensor([-1.0, 1.0]).repeat(800).view(40, 40)
    x[0, 0], x[0, 1], x[1, 2] = pattern, 5 * pattern, 2 * pattern + 7
    noise = (ask(RFD(Stages(), std=0.1, layers="layer1", relative=True), x) - x.flatten(1)).view(2, 3, -1)
    expected = torch.tensor([[0.1, 0.5, 0.0], [0.0, 0.0, 0.2]])
    torch.testing.assert_close(noise.std(2), expected, rtol=0.08, atol=0)
    flat = torch.tensor([[0.0, 2.0] * 1000, [3.0, 3.0] * 1000])
    noise = ask(RFD(Stages(), std=0.1, layers="layer1", relative=True), flat) - flat
    torch.testing.assert_close(noise.std(1), torch.tensor([0.1, 0.0]), rtol=0.08, atol=0)


def test_zero_noise_changes_nothing(network, clothes):
    x = clothes.images[:20]
    assert torch.equal(ask(RFD(network, std=0.0), x), ask(network, x))


def test_noise_is_fresh_for_each_image_and_query():
    x = images(1).expand(3, -1, -1, -1)
    model = RFD(Stages())
    first, second = ask(model, x, 1), ask(model, x, 2)
    assert torch.equal(ask(model, x, 1), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(model(x), model(x))  # in a service


@pytest.mark.parametrize("relative", [False, True])
def test_rows_of_a_real_network_do_not_depend_on_their_batch(network, clothes, relative):
    model, x, ids = RFD(network, relative=relative), clothes.images[:9], torch.arange(9)
    queries = torch.ones_like(ids)
    whole = answers(model, x, ids, queries)
    order = torch.tensor([4, 8, 0, 1, 7, 2, 6, 5, 3])
    assert torch.equal(answers(model, x[order], ids[order], queries), whole[order])
    for i in range(9):
        assert torch.equal(answers(model, x[i : i + 1], ids[i : i + 1], queries[:1]), whole[i : i + 1])


def test_by_default_noise_enters_each_stage():
    def layers(name):
        return RFD(models.load(name)).layers

    assert layers("fashion-resnet") == "blocks.0, blocks.1, blocks.2"
    assert layers("fashion-wrn") == "block1, block2, block3"
    assert layers("fashion-resnext") == "layer1, layer2, layer3"
    assert layers("fashion-thermometer") == "network.blocks.0, network.blocks.1, network.blocks.2"
    assert RFD(PreActResNet(widths=(8, 16), blocks=1)).layers == "layer_0, layer_1"


def test_patterns_fit_the_last_parts_of_a_name(network):
    assert RFD(network, layers="blocks.[12]").layers == "blocks.1, blocks.2"
    assert RFD(network, layers="blocks.0, linear").layers == "blocks.0, linear"
    assert RFD(network, layers=["linear", "blocks.0"]).layers == "blocks.0, linear"
    assert RFD(network, layers="conv1").layers == "blocks.0.conv1, blocks.1.conv1, blocks.2.conv1"
    assert RFD(network, layers="blocks").layers == "blocks"
    with pytest.raises(ValueError, match=r"but blocks\.3 fits none; it has normalize, conv, bn, blocks, .*, \.\.\."):
        RFD(network, layers="blocks.0, blocks.3")


def test_a_network_without_known_stages_wants_to_be_told_its_layers():
    with pytest.raises(ValueError, match=r"expected layers of the network .* fits none; it has no modules"):
        RFD(Linear())
    with pytest.raises(ValueError, match="it has 0, 1"):
        RFD(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


def test_nothing_is_left_on_the_network(network, clothes):
    x = clothes.images[:4]
    plain, keys = ask(network, x), list(network.state_dict())
    model = RFD(network)
    noisy = ask(model, x)
    assert not hooks(network)
    assert not torch.equal(noisy, plain)
    assert torch.equal(ask(network, x), plain)
    assert list(model.state_dict()) == [f"model.{key}" for key in keys]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(ask(twin, x), noisy)
        assert not hooks(twin)


def test_nothing_is_left_after_a_failure():
    model = Stages()
    for wrong in (torch.zeros(2, 64).long(), torch.zeros(3, 64)):
        with rng.rows(0, torch.arange(2), torch.ones(2).long()), pytest.raises(ValueError, match="expected"):
            RFD(model)(wrong)
        assert not hooks(model)


def test_a_layer_that_is_passed_by_raises():
    class Passing(Stages):
        def forward(self, x):
            return self.head(self.layer1(x))

    model = Passing().eval()
    with pytest.raises(ValueError, match="expected a forward pass to go through layer2, but it did not"):
        ask(RFD(model), images(2))
    assert not hooks(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_raises():
    program = torch.jit.trace(Stages(), images(2), check_trace=False)
    with pytest.raises(ValueError, match=r"expected a network in Python, .* but got TorchScript"):
        RFD(program)


def test_who_asks_the_network_itself_meanwhile_sees_no_noise():
    class Busy(Stages):
        def forward(self, x):
            out = self.layer1(x)
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=lambda: seen.append(self(x)))
                thread.start()
                thread.join()
            return self.head(self.layer2(out))

    seen, x = [], images(3)
    noisy = ask(RFD(Busy().eval(), std=1.0), x)
    assert torch.equal(seen[0], x.flatten(1))
    assert not torch.equal(noisy, seen[0])


def test_calls_from_several_threads_have_each_their_own_noise():
    model, x = RFD(Stages(), std=0.5), torch.zeros(50, 1, 8, 8)
    shown = []
    threads = [threading.Thread(target=lambda: shown.extend(model(x) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shown) == 80
    assert float(torch.stack(shown).std()) == pytest.approx(0.5 * 2**0.5, rel=0.02)
    assert not hooks(model)


def test_it_stands_around_noisy_weights(clothes):
    model = RFD(models.load("fashion-pni"))
    x, ids = clothes.images[:6], torch.arange(6)
    queries = torch.tensor([1, 2, 1, 1, 2, 3])
    whole = answers(model, x, ids, queries)
    for i in range(6):
        assert torch.equal(answers(model, x[i : i + 1], ids[i : i + 1], queries[i : i + 1]), whole[i : i + 1])


# the strength


class Sign(nn.Module):
    """Sure of class 0 by the sign of the first of its features, which noise enters."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Identity()
        self.eval()

    def forward(self, x):
        first = self.layer1(x.flatten(1))[:, 0]
        return torch.stack([first, -first], 1)


def test_the_largest_strength_costs_as_much_as_is_allowed():
    x, y = torch.ones(2000, 1, 1, 1), torch.zeros(2000).long()
    for drop in (0.02, 0.1):
        expected = 1 / NormalDist().inv_cdf(1 - drop)  # noise beyond -1 flips the sign
        assert largest_std(Sign(), x, y, drop=drop) == pytest.approx(expected, rel=0.1)


def test_the_largest_strength_keeps_its_promise(network, clothes):
    x, y, ids = clothes.images[:200], clothes.labels[:200], torch.arange(200)

    def right(model):
        return float((answers(model, x, ids, torch.zeros_like(ids)).argmax(1) == y).double().mean())

    found = largest_std(network, x, y, drop=0.05, layers="linear", draws=1)
    assert right(network) - right(RFD(network, std=found, layers="linear")) <= 0.05
    assert right(network) - right(RFD(network, std=1.06 * found, layers="linear")) > 0.05


def test_a_strength_that_cannot_be_found_raises():
    x, y = torch.ones(60, 1, 1, 1), torch.zeros(60).long()
    with pytest.raises(ValueError, match="expected at least 50 held-out images"):
        largest_std(Sign(), x[:40], y[:40])
    with pytest.raises(ValueError, match="expected drop >= 0 and < 1"):
        largest_std(Sign(), x, y, drop=1.0)
    with pytest.raises(ValueError, match="expected draws as a whole number >= 1"):
        largest_std(Sign(), x, y, draws=0)
    with pytest.raises(ValueError, match="expected a model in evaluation mode"):
        largest_std(Sign().train(), x, y)
    with pytest.raises(ValueError, match="expected noise to cost accuracy"):
        largest_std(Sign(), x, y, drop=0.9)
    with pytest.raises(ValueError, match="expected some noise to cost at most"):
        largest_std(Sign(), 0 * x, y)
