"""RFD: randomized features (Nguyen, Lao, Pham, Wong and Doan, ICLR 2024)."""

import fnmatch
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from queryfoil import rng
from queryfoil.checks import require, require_whole
from queryfoil.defenses.calibration import check_held_out
from queryfoil.defenses.defense import Defense
from queryfoil.oracle import answers, check_mode

STAGES = ("blocks.*", "block[0-9]", "layer[0-9]", "layer_[0-9]")
"""Names of stages in our networks, torchvision's ResNets, and the blocks of timm's transformers."""

RESOLUTION = 1.05  # ratio at which `largest_std` stops
EXTREMES = 2.0**-20, 2.0**20  # noise that `largest_std` tries

_registering = threading.Lock()  # torch numbers its hooks without one


class RFD(Defense):
    """Normal noise on the features that enter chosen layers, fresh at every call and for every number.

    Costs no forward pass, but a draw for every feature. The network is the wrapped one: its weights stay, and hooks are
    on it only while a call lasts, and do nothing in other threads.

    std: nu, >= 0, in units of the features, which differ from network to network: `largest_std` finds the largest that
        costs little accuracy. 0.1 is that of the shipped `fashion-resnet` at 1 % on the calibration images.
    layers: names of modules whose input gets noise, as patterns (`block[12]`, `blocks.*`) of which each part
        between dots fits a part of the name, from the end; a list, or a text with commas. Left out: each stage
        (`STAGES`; for ResNet each block), which is after the stem and each stage but the last, as the release has it
        for ResNets. Scores themselves never get noise.
    relative: std is in units of the standard deviation of the features: that of each image and channel over its
        positions, or of the image over all features where these have no positions.
    """

    deterministic = False

    def __init__(
        self,
        model: nn.Module,
        *,
        std: float = 0.1,
        layers: str | Sequence[str] | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__(model)
        require("std", std, ">= 0", lambda value: value >= 0)
        self.std, self.relative = float(std), relative
        self._names = _matching(model, layers)
        self.layers = ", ".join(self._names)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) from noisy features."""
        with self._noise() as reached:
            scores: Tensor = self.model(x)
        if missed := [name for name in self._names if name not in reached]:
            raise ValueError(
                f"expected a forward pass to go through {', '.join(missed)}, but it did not, so there was no noise; "
                "choose other layers"
            )
        return scores

    @contextmanager
    def _noise(self) -> Iterator[set[str]]:
        """Within the block, the chosen layers get noisy features; gives the names of those that were called."""
        reached: set[str] = set()
        caller, handles = threading.get_ident(), []

        def hook(name: str) -> Any:
            def noisy(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
                if threading.get_ident() != caller:  # somebody else asks the network itself
                    return None
                if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
                    raise ValueError(f"expected features (N, ...) as the first input of {name}; choose other layers")
                reached.add(name)
                return self._noisy(inputs[0]), *inputs[1:]

            return noisy

        try:
            modules = dict(self.model.named_modules())
            with _registering:
                for name in self._names:
                    handles.append(modules[name].register_forward_pre_hook(hook(name)))
            yield reached
        finally:
            with _registering:
                for handle in handles:
                    handle.remove()

    def _noisy(self, features: Tensor) -> Tensor:
        """Features (N, ...) and noise."""
        noise = self.std * rng.noise_like(features)
        if self.relative:
            over = tuple(range(2, features.ndim)) or (1,)
            # in double precision, so that the sum over an image hardly depends on its order, which may on the batch
            noise = noise * features.double().std(over, correction=0, keepdim=True).to(features)
        return features + noise


def largest_std(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    drop: float = 0.01,
    layers: str | Sequence[str] | None = None,
    relative: bool = False,
    draws: int = 3,
    seed: int = 0,
) -> float:
    """The largest std of `RFD` that costs a model at most `drop` of its accuracy on held-out images.

    x (N, C, H, W) in [0, 1] and labels y (N,), at least 50, better 1,000 or more; never images that you report on.
    drop: share of all images, in [0, 1), the mean over `draws` answers for each image. The search doubles or halves
    from 1, then narrows to 5 %; all strengths see the same draws, by `seed`. Some fifteen times `draws` forward
    passes. ValueError for bad input, or where no noise costs that much, or any does.

    >>> from queryfoil import data, models
    >>> images = data.load("fashion-mnist", "calibration")[:50]
    >>> 0.01 < largest_std(models.load("fashion-resnet"), images.images, images.labels, drop=0.1, draws=1) < 10
    True
    """
    require("drop", drop, ">= 0 and < 1", lambda value: 0 <= value < 1)
    require_whole("draws", draws)
    check_mode(model)
    RFD(model, layers=layers, relative=relative)  # raises for layers that are not there
    ids = torch.arange(len(x), device=x.device)

    def accuracy(asked: nn.Module) -> float:
        hits = [answers(asked, x, ids, torch.full_like(ids, draw), seed).argmax(1) == y for draw in range(draws)]
        return float(torch.stack(hits).double().mean())

    check_held_out(answers(model, x, ids, ids * 0, seed), y)
    least = accuracy(model) - drop

    def allowed(std: float) -> bool:
        return accuracy(RFD(model, std=std, layers=layers, relative=relative)) >= least - 1e-9

    low = high = 1.0
    while allowed(high):
        low, high = high, 2 * high
        if high > EXTREMES[1]:
            raise ValueError(f"expected noise to cost accuracy, but up to {low:g} costs at most {drop:g}; raise drop?")
    while low == high or not allowed(low):
        low, high = low / 2, low
        if low < EXTREMES[0]:
            raise ValueError(f"expected some noise to cost at most {drop:g} of accuracy, but {high:g} costs more")
    while high > RESOLUTION * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def _matching(model: nn.Module, layers: str | Sequence[str] | None) -> list[str]:
    """Names of the modules that the patterns fit; ValueError for a pattern that fits none."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("expected a network in Python, whose features noise can be added to, but got TorchScript")
    names = [name for name, _ in model.named_modules() if name]
    patterns = [part.strip() for part in layers.split(",")] if isinstance(layers, str) else list(layers or STAGES)
    found = {pattern: [name for name in names if _fits(name, pattern)] for pattern in patterns}
    missing = [pattern for pattern in patterns if not found[pattern]]
    if missing and (layers is not None or len(missing) == len(patterns)):
        some = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "no modules"
        raise ValueError(
            f"expected layers of the network that noise is to enter, but {', '.join(missing)} fits none; it has {some}"
        )
    chosen = {name for fitting in found.values() for name in fitting}
    return [name for name in names if name in chosen]


def _fits(name: str, pattern: str) -> bool:
    """Whether the parts of a pattern fit the last parts of a name."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatch.fnmatchcase, parts[-len(wanted) :], wanted))
