"""Names of networks to trained models: builder here, weights and a card under `shipped/zoo`."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from queryfoil.checks import lookup
from queryfoil.data import Images
from queryfoil.defenses.ensemble import Ensemble
from queryfoil.defenses.pni import PNI
from queryfoil.models.bottleneck import BottleneckResNet
from queryfoil.models.layers import FASHION
from queryfoil.models.resnet import ResNet
from queryfoil.models.thermometer import Thermometer
from queryfoil.models.wide_resnet import WideResNet

SHIPPED = Path(__file__).parent.parent / "shipped" / "zoo"

Movable = TypeVar("Movable", nn.Module, Images)


class Network(NamedTuple):
    """How to build a network: what it is, in a line, its class and the arguments of that."""

    about: str
    kind: Callable[..., nn.Module]
    arguments: dict[str, Any]

    def __call__(self) -> nn.Module:
        return self.kind(**self.arguments)


def _pni() -> nn.Module:
    return PNI(ResNet((16, 32, 64), shortcut="pad"))


def _trs() -> nn.Module:
    return Ensemble(ResNet((16, 32, 64)) for _ in range(3))


SMALL_WRN = {"depth": 10, "widen": 2, "stride": 2, "normalize": FASHION, "channels": 1}
SMALL_RESNEXT = {
    "layers": (1, 1, 1), "groups": 4, "group_width": 8, "base": 16, "small": True, "normalize": FASHION,
    "channels": 1, "classes": 10,
}  # fmt: skip

MODELS: dict[str, Network] = {
    "fashion-resnet": Network("undefended residual network, 8 convolutions deep", ResNet, {}),
    "fashion-resnet-at": Network("fashion-resnet, adversarially trained in L-inf", ResNet, {}),
    "fashion-resnet-l2": Network("fashion-resnet, adversarially trained in L2", ResNet, {}),
    "fashion-wrn": Network("undefended wide residual network", WideResNet, SMALL_WRN),
    "fashion-wrn-pssilu": Network(
        "fashion-wrn with PSSiLU, adversarially trained in L-inf", WideResNet, {**SMALL_WRN, "activation": "pssilu"}
    ),
    "fashion-wrn-hat": Network(
        "fashion-wrn with Swish, adversarially trained in L-inf with helper images (HAT)",
        WideResNet,
        {**SMALL_WRN, "activation": "swish", "same": True},
    ),
    "fashion-resnext": Network("undefended aggregated residual network", BottleneckResNet, SMALL_RESNEXT),
    "fashion-resnext-denoise": Network(
        "fashion-resnext with feature denoising (FD), adversarially trained in L-inf",
        BottleneckResNet,
        {**SMALL_RESNEXT, "denoise": True},
    ),
    "fashion-pni": Network("residual network with trained noise on its weights (PNI)", _pni, {}),
    "fashion-trs": Network("three residual networks with diverse gradients (TRS)", _trs, {}),
    "fashion-thermometer": Network(
        "fashion-resnet that sees thermometer codes",
        Thermometer,
        {"network": functools.partial(ResNet, normalize=([0.5], [0.5])), "channels": 1},
    ),
}


def load(name: str, device: str | torch.device = "cpu", folder: str | Path = SHIPPED) -> nn.Module:
    """Build a network, read its weights, and put it in evaluation mode.

    `folder` holds NAME.safetensors (by default the weights that ship with the library).

    >>> model = load("fashion-resnet")
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    builder = lookup(MODELS, name, "model")
    with torch.random.fork_rng(devices=[]):  # building draws weights, which are then overwritten
        model = builder()
    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"expected the weights of {name} at {path}; train them with `queryfoil train {name}`")
    model.load_state_dict(load_file(path))
    return on_device(model.eval().requires_grad_(False), device)


cached = functools.cache(load)
"""`load`, which reads a network once for each device: for those that are asked again and again."""


def on_device(thing: Movable, device: str | torch.device) -> Movable:
    """A model or images moved to a device; ValueError if torch cannot use that here."""
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("the meta device computes nothing")
        return thing.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected a device that torch can use here, such as cpu, but got {device}: {reason}"
        ) from None


def card(name: str, folder: str | Path = SHIPPED) -> dict[str, Any]:
    """The card beside the weights: recipe, seed, accuracy, ECE."""
    return dict(json.loads((Path(folder) / f"{name}.json").read_text()))
