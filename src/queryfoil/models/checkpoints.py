"""Weights that others published, from their own files: RobustBench, torchvision, robustness, PNI, TRS and FD.

No file is downloaded, and none can run code: pickles are read with the few classes that tensors need, and an inert
stand-in for all others.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from queryfoil.checks import lookup
from queryfoil.defenses.ensemble import Ensemble
from queryfoil.defenses.pni import PNI
from queryfoil.models.bottleneck import BottleneckResNet
from queryfoil.models.inert import read_pickle
from queryfoil.models.layers import CIFAR
from queryfoil.models.preact_resnet import PreActResNet
from queryfoil.models.resnet import ResNet
from queryfoil.models.wide_resnet import WideResNet
from queryfoil.models.zoo import on_device

State = dict[str, Tensor]
RESNEXT_101: dict[str, Any] = {"layers": (3, 4, 23, 3), "groups": 32, "group_width": 8}
RESNET_20: dict[str, Any] = {"widths": (16, 32, 64), "blocks": 3, "stride": 1, "channels": 3}
PNI_CIFAR = ([x / 255 for x in (125.3, 123.0, 113.9)], [x / 255 for x in (63.0, 62.1, 66.7)])
TRS_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


class Published(NamedTuple):
    """Weights that somebody published: how to build the network, how to read the file, where it is to be had."""

    about: str
    build: Callable[[], nn.Module]
    read: Callable[[Path], State]
    where: str


def load(name: str, path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """A network of `PUBLISHED` with its weights from a local file, in evaluation mode.

    `path` has the format in which they were published, or is a .safetensors file that `queryfoil train` wrote.
    ValueError that names the first missing and unexpected weights if the file is of another network.
    """
    published = lookup(PUBLISHED, name, "published network")
    path = Path(path).expanduser()
    state = _safetensors(path) if path.suffix == ".safetensors" else published.read(path)
    with torch.random.fork_rng(devices=[]):
        model = published.build()
    _check(state, model.state_dict(), path, name)
    model.load_state_dict(state, strict=False)  # all but counters of batches, which old files lack
    return on_device(model.eval().requires_grad_(False), device)


def _safetensors(path: Path) -> State:
    if not path.is_file():
        raise ValueError(f"expected a file of weights at {path}, but there is none")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"expected a file of weights (.safetensors) at {path}, but it is damaged: {error}") from None


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, name: str) -> None:
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"expected the weights of {name} in {path}, but {_some('missing', missing)} and "
            f"{_some('unexpected', unexpected)}; is it the file of another network?"
        )
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            layerwise = "; these are layer-wise strengths of PNI" if key.endswith(".alpha") and len(value) == 1 else ""
            raise ValueError(
                f"expected {key} {tuple(wanted[key].shape)} in {path}, as {name} has it, but got {tuple(value.shape)}"
                + layerwise
            )


def _some(kind: str, keys: list[str]) -> str:
    return f"{len(keys)} are {kind} (first {keys[0]})" if keys else f"none is {kind}"


def _state(path: Path, *names: str) -> State:
    """The tensors of a file, or of the first of `names` in it."""
    content = read_pickle(path)
    for name in names:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"expected a dictionary of weights in {path}, or one with it as {' or '.join(names)}")
    return {str(key): value.detach() for key, value in content.items()}


def _renamed(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> State:
    """The state with regular expressions in its keys replaced, one after another."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _without(state: State, *endings: str) -> State:
    return {key: value for key, value in state.items() if not key.endswith(endings)}


# the formats: each gives the state of our network

PREFIX = (r"^((module|model)\.)+", "")
CONSTANTS = ("mean", "std", "mu", "sigma")  # of the normalization; `running_mean` is none


def robustbench(path: Path) -> State:
    """A state dict, bare or as "state_dict", behind the prefixes module. and model."""
    state = _renamed(_state(path, "state_dict"), [PREFIX])
    return {key: value for key, value in state.items() if key.rpartition(".")[2] not in CONSTANTS}


def deepmind(path: Path) -> State:
    """The same, with DeepMind's names for wide residual networks."""
    rules = [
        (r"^init_conv\.", "conv1."),
        (r"^batchnorm\.", "bn1."),
        (r"^logits\.", "fc."),
        (r"\.batchnorm_1\.", ".bn2."),
        (r"\.batchnorm_0\.", ".bn1."),
        (r"\.conv_1\.", ".conv2."),
        (r"\.conv_0\.", ".conv1."),
        (r"\.shortcut\.", ".convShortcut."),
        *((rf"^layer\.{g}\.block\.", f"block{g + 1}.layer.") for g in range(3)),
    ]
    return _renamed(robustbench(path), rules)


def robustness(path: Path) -> State:
    """The robustness library's checkpoint: the network under "model", behind more prefixes and beside a copy."""
    state = _state(path, "model", "state_dict")
    own = {key: value for key, value in state.items() if not re.match(r"(module\.)?(attacker|normalizer)\.", key)}
    return _renamed(own, [PREFIX])


def pni(path: Path) -> State:
    """PNI's, where the network is the second of a sequence and noise is alpha_w, one number for each channel."""
    rules = [
        (PREFIX[0], ""),
        (r"^1\.", "model."),
        (r"\.conv_1_3x3\.", ".conv."),
        (r"\.bn_1\.", ".bn."),
        (r"\.classifier\.", ".linear."),
        *((rf"\.stage_{g + 1}\.{j}\.", f".blocks.{3 * g + j}.") for g in range(3) for j in range(3)),
        (r"\.conv_a\.", ".conv1."),
        (r"\.conv_b\.", ".conv2."),
        (r"\.bn_a\.", ".bn1."),
        (r"\.bn_b\.", ".bn2."),
        (r"\.(conv|conv1|conv2|linear)\.weight$", r".\1.parametrizations.weight.original"),
        (r"\.alpha_w$", ".parametrizations.weight.0.alpha"),
    ]
    state = _renamed(_without(_state(path, "state_dict"), "0.mean", "0.std"), rules)
    return {key: value.flatten() if key.endswith(".alpha") else value for key, value in state.items()}


def trs(path: Path) -> State:
    """TRS's three files, PATH.0 to PATH.2, one a member."""
    members = [_state(path.with_name(f"{path.name}.{i}"), "state_dict") for i in range(3)]
    rules = [
        PREFIX,
        (r"^1\.", ""),
        (r"^conv1\.", "conv."),
        (r"^bn1\.", "bn."),
        (r"^fc\.", "linear."),
        *((rf"^layer{g + 1}\.{j}\.", f"blocks.{3 * g + j}.") for g in range(3) for j in range(3)),
        (r"\.downsample\.", ".shortcut."),
    ]
    return {f"members.{i}.{k}": v for i, state in enumerate(members) for k, v in _renamed(state, rules).items()}


def feature_denoising(path: Path) -> State:
    """TensorFlow's variables in a NumPy file: kernels as (height, width, in, out), the last layer as (in, out)."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected a NumPy file (.npz) of weights at {path}, but there is none, or it is damaged")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            loaded = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return from_tensorflow(loaded)
    except (TypeError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"expected a NumPy file (.npz) of weights at {path}, but it holds other things than their arrays: {error}"
        ) from None


def from_tensorflow(raw: Mapping[str, Tensor]) -> State:
    """TensorFlow's variables, by name, as the state of our network."""
    rules = [
        (r":0$", ""),
        (r"^conv0/bn/", "bn1/"),
        (r"^conv0/", "conv1/"),
        (r"^linear/W", "fc/weight"),
        (r"^linear/b", "fc/bias"),
        *((f"^group{g}/block", f"layer{g + 1}/") for g in range(4)),
        (r"/convshortcut/bn/", "/downsample/1/"),
        (r"/convshortcut/", "/downsample/0/"),
        (r"/non_local/conv/bn/", "/denoise/bn/"),
        (r"/non_local/", "/denoise/"),
        (r"/conv(\d)/bn/", r"/bn\1/"),
        (r"/W$", "/weight"),
        (r"/gamma$", "/weight"),
        (r"/beta$", "/bias"),
        (r"/mean/EMA$", "/running_mean"),
        (r"/variance/EMA$", "/running_var"),
        (r"/", "."),
    ]
    turned = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    return {key: value.permute(turned[value.ndim]) for key, value in _renamed(raw, rules).items() if value.ndim}


def _denoising() -> nn.Module:
    return BottleneckResNet(**RESNEXT_101, denoise=True, same=True, bgr=True, normalize=([0.5], [0.5]))


ROBUSTBENCH = "RobustBench (github.com/RobustBench/robustbench, its model zoo)"
PUBLISHED: dict[str, Published] = {
    "Standard": Published("CIFAR-10, undefended WRN-28-10", WideResNet, robustbench, ROBUSTBENCH),
    "Dai2021Parameterizing": Published(
        "CIFAR-10, WRN-28-10 with PSSiLU, trained in L-inf",
        lambda: WideResNet(activation="pssilu"),
        robustbench,
        ROBUSTBENCH,
    ),
    "Rade2021Helper_extra": Published(
        "CIFAR-10, WRN-34-10 with Swish, trained in L-inf with helper images (HAT)",
        lambda: WideResNet(34, 10, activation="swish", same=True, normalize=CIFAR),
        deepmind,
        ROBUSTBENCH,
    ),
    "Rade2021Helper_R18_ddpm": Published(
        "CIFAR-10, PreActResNet-18 with Swish, trained in L2", PreActResNet, robustbench, ROBUSTBENCH
    ),
    "Salman2020Do_50_2": Published(
        "ImageNet, WRN-50-2, trained in L-inf",
        lambda: BottleneckResNet((3, 4, 6, 3), group_width=128),
        robustbench,
        ROBUSTBENCH,
    ),
    "wide_resnet50_2_linf": Published(
        "ImageNet, WRN-50-2, trained in L-inf, as a checkpoint of the library robustness",
        lambda: BottleneckResNet((3, 4, 6, 3), group_width=128),
        robustness,
        "Hugging Face, madrylab/robust-imagenet-models, wide_resnet50_2_linf_eps4.0.ckpt",
    ),
    "wide_resnet50_2": Published(
        "ImageNet, undefended WRN-50-2",
        lambda: BottleneckResNet((3, 4, 6, 3), group_width=128),
        robustbench,
        "torchvision, weights IMAGENET1K_V1 (wide_resnet50_2-95faca4d.pth)",
    ),
    "resnext101_32x8d": Published(
        "ImageNet, undefended ResNeXt-101 32x8d",
        lambda: BottleneckResNet(**RESNEXT_101),
        robustbench,
        "torchvision, weights IMAGENET1K_V1 (resnext101_32x8d-8ba56ff5.pth)",
    ),
    "X101-DenoiseAll": Published(
        "ImageNet, ResNeXt-101 32x8d with feature denoising (FD), trained in L-inf",
        _denoising,
        feature_denoising,
        "github.com/facebookresearch/ImageNet-Adversarial-Training, release v0.2 (X101-DenoiseAll.npz)",
    ),
    "PNI-W": Published(
        "CIFAR-10, ResNet-20 with channel-wise noise on its weights (PNI)",
        lambda: PNI(ResNet(**RESNET_20, shortcut="pad", normalize=PNI_CIFAR)),
        pni,
        "github.com/elliothe/CVPR_2019_PNI (a .pth.tar file)",
    ),
    "TRS": Published(
        "CIFAR-10, three ResNet-20 trained to differ (TRS)",
        lambda: Ensemble(ResNet(**RESNET_20, normalize=TRS_CIFAR) for _ in range(3)),
        trs,
        "not published: `queryfoil train cifar10-trs` writes TRS.safetensors; the release's training writes PATH.0, .1 "
        "and .2, of which PATH is given",
    ),
}
"""Name to network and format of weights that others published."""
