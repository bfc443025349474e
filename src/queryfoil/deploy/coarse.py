"""Scores shown coarser than the model gives them: a few classes, or a few decimals. The label stays."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from queryfoil.defenses.coarse import RoundedScores, TopK
from queryfoil.deploy.served import About

Coarse = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class _Given(nn.Module):
    """Probabilities as they came."""

    output = "probs"

    def forward(self, x: Tensor) -> Tensor:
        return x


def coarse(about: About, decimals: int | None, top_k: int | None) -> Coarse | None:
    """What to do to probabilities (N, K) before they are shown; None if nothing.

    First the `top_k` highest alone, as `TopK` shows them with rest "equal" (the others share what is left, so that the
    confidence stays calibrated), then `decimals` decimals, as `RoundedScores` does it (the sum 1, the label on top).
    Both see shown scores alone, so they can tell nothing that the protection hides. ValueError for logits and
    log-probabilities.

    >>> about = About(version="1", defense=None, input="images", input_shape=(1, 1, 1), classes=3, output="probs")
    >>> coarse(about, 1, 1)(np.array([[0.35, 0.45, 0.2]], np.float32))
    array([[0.3, 0.4, 0.3]], dtype=float32)
    """
    if decimals is None and top_k is None:
        return None
    if about.output != "probs":
        raise ValueError(
            f"--round and --top-k are for probabilities, but this file shows {about.output}; export it with --softmax"
        )
    if top_k is not None and top_k >= about.classes:
        raise ValueError(f"expected --top-k below the {about.classes} classes of the model, but got {top_k}")
    module: nn.Module = _Given().eval()
    if top_k is not None:
        module = TopK(module, k=top_k, rest="equal")
    if decimals is not None:
        module = RoundedScores(module, decimals=decimals)

    def shown(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = module(torch.from_numpy(np.ascontiguousarray(scores))).numpy()
        return found

    return shown
