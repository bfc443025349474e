"""Input preprocessing: what fine perturbations do not survive, if the attacker does not attack through it."""

import io
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from queryfoil import rng
from queryfoil.checks import is_real
from queryfoil.defenses.defense import Defense
from queryfoil.oracle import quantize


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"expected {name} as an integer from {low} to {high}, but got {value!r}")
    return value


class BitDepth(Defense):
    """Values rounded to 2^`bits` levels (feature squeezing: Xu, Evans and Qi, NDSS 2018). Costs no forward pass.

    bits: 1 to 8; 5 for colour photographs in the paper. 8 changes nothing.
    """

    def __init__(self, model: nn.Module, *, bits: int = 5) -> None:
        super().__init__(model)
        self.bits = _integer("bits", bits, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the rounded images."""
        top = 2**self.bits - 1
        scores: Tensor = self.model((x * top).round() / top)
        return scores


class JPEG(Defense):
    """Images compressed as JPEG and back, by Pillow (Dziugaite, Ghahramani and Roy, 2016; Guo et al., ICLR 2018).

    Grey or RGB; colour at half the resolution (4:2:0). Images are floored to 8 bits first, as a service has them. Costs
    some 0.1 ms an image of 32 x 32, on one core of the CPU.

    quality: 1 to 95; 75 in Guo et al.
    """

    def __init__(self, model: nn.Module, *, quality: int = 75) -> None:
        super().__init__(model)
        self.quality = _integer("quality", quality, 1, 95)
        try:
            import PIL.Image  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("the defense jpeg needs Pillow: pip install 'queryfoil[bench]'") from None

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the compressed images."""
        if x.shape[1] not in (1, 3):
            raise ValueError(f"expected grey or RGB images (1 or 3 channels) for JPEG, but got {x.shape[1]} channels")
        levels = (quantize(x) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        back = np.stack([self._compressed(picture) for picture in levels])
        scores: Tensor = self.model(torch.from_numpy(back).to(x).permute(0, 3, 1, 2) / 255)
        return scores

    def _compressed(self, levels: np.ndarray) -> np.ndarray:
        from PIL import Image

        grey = levels.shape[2] == 1
        with io.BytesIO() as file:
            picture = Image.fromarray(levels[:, :, 0] if grey else levels)
            picture.save(file, "JPEG", quality=self.quality, subsampling="4:2:0")
            with Image.open(file) as opened:
                return np.asarray(opened).reshape(levels.shape)


class Median(Defense):
    """Each value replaced by the median of its `size` x `size` neighbours in its channel (feature squeezing).

    The border is reflected. size: 2 to 7; the paper has 2 and 3. For an even size the window reaches one
    pixel further to the right and bottom, and the median is the lower of the two middle values. Costs no forward pass.
    """

    def __init__(self, model: nn.Module, *, size: int = 3) -> None:
        super().__init__(model)
        self.size = _integer("size", size, 2, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the smoothed images."""
        before, after = (self.size - 1) // 2, self.size // 2
        padded = F.pad(x, (before, after, before, after), mode="reflect")
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)
        scores: Tensor = self.model(windows.median(-1).values)
        return scores


class TotalVariation(Defense):
    """Total-variation minimization (Guo et al., ICLR 2018): smooth images from a random part of the pixels.

    Each pixel is kept with probability `keep`, anew at each call. The image z that is classified minimizes
    sum over kept pixels (z - x)^2 / 2 + `weight` TV(z), TV the sum of the lengths of z's gradient in each channel,
    smoothed near 0; `steps` steps of gradient descent with momentum go towards it from x (after 50, a third of the
    change is left), where Guo et al. use another solver. Costs about as much as a forward pass of a small network.
    """

    deterministic = False
    SMOOTH = 1e-2
    """Length of a gradient below which its penalty is quadratic, on the [0, 1] scale."""

    def __init__(self, model: nn.Module, *, keep: float = 0.5, weight: float = 0.03, steps: int = 50) -> None:
        super().__init__(model)
        for name, value, high in (("keep", keep, 1.0), ("weight", weight, math.inf)):
            if not is_real(value) or not 0 < value <= high or value == math.inf:
                raise ValueError(f"expected {name} > 0" + f" and <= {high:g}" * (high == 1) + f", but got {value!r}")
        self.keep, self.weight = float(keep), float(weight)
        self.steps = _integer("steps", steps, 1, 10_000)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, K) of the smoothed images."""
        quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * self.keep - 1, dtype=torch.float64)))
        kept = (rng.noise_like(x[:, :1]) <= quantile).to(x)
        # of the quadratic majorant: 1 for the kept pixels, 8 for the differences of neighbours (Chambolle, 2004)
        rate = 1 / (1 + 8 * self.weight / self.SMOOTH)
        z = ahead = x
        for step in range(self.steps):
            following = ahead - rate * (kept * (ahead - x) + self.weight * _variation_slope(ahead, self.SMOOTH))
            ahead = following + step / (step + 3) * (following - z)
            z = following
        scores: Tensor = self.model(z.clamp(0, 1))
        return scores


def _variation_slope(z: Tensor, smooth: float) -> Tensor:
    """The gradient of the sum of sqrt(dx^2 + dy^2 + smooth^2) over pixels and channels."""
    dx = F.pad(z[:, :, :, 1:] - z[:, :, :, :-1], (0, 1))
    dy = F.pad(z[:, :, 1:] - z[:, :, :-1], (0, 0, 0, 1))
    length = (dx.square() + dy.square() + smooth**2).sqrt()
    dx, dy = dx / length, dy / length
    return F.pad(dx[:, :, :, :-1], (1, 0)) - dx + F.pad(dy[:, :, :-1], (0, 0, 1, 0)) - dy
