"""A protection as a graph: tensor operations alone, nothing that depends on values, so that it can be exported."""

import math

import torch
from torch import Tensor, nn

from queryfoil.checks import lookup
from queryfoil.defenses.calibration import Fit
from queryfoil.defenses.scores import single
from queryfoil.defenses.terrace_fit import TerraceFit
from queryfoil.defenses.terraces import Terraces
from queryfoil.deploy.exact import Exact
from queryfoil.models.victim import OUTPUTS, Input
from queryfoil.oracle import SMALLEST, from_log_scores


class Protection(nn.Module):
    """Scores (N, K) in, shown scores (N, K) out, in single precision, as `qf.protect` shows them.

    found: what `qf.fit` found; None shows the scores as they are. given, shown: kinds of scores, "logits", "log_probs"
    or "probs". A row that is not finite, or has a probability outside [0, 1], is shown as NaN, where `qf.protect` may
    raise. ValueError for AAA's solver "adam": its steps are a loop whose gradients no exported graph has.

    >>> found = Fit("linear", 2.0, 1.0, 5.0, 1.0, "exact", 100, 0.1, 3, 100, 1.0, 0.1, 0.1, 0.1)
    >>> z = torch.tensor([[4.0, 0.0, -3.0], [torch.nan, 0.0, 1.0]])
    >>> Protection(found)(z).isnan().all(1)
    tensor([False,  True])
    """

    def __init__(self, found: Fit | TerraceFit | None, given: str = "logits", shown: str | None = None) -> None:
        super().__init__()
        self.given, self.shown, self.found = given, shown or given, found
        for kind in (self.given, self.shown):
            lookup(OUTPUTS, kind, "kind of scores")
        if isinstance(found, Fit) and found.solver != "exact":
            raise ValueError(
                "expected a fit with the solver exact, but got adam, whose steps follow gradients, which an exported "
                "graph has none of; fit with --solver exact"
            )
        self.aaa = Exact(found) if isinstance(found, Fit) else None
        self.terraces = Terraces.from_fit(nn.Identity(), found) if isinstance(found, TerraceFit) else None
        self.classes = None if found is None else found.classes

    def forward(self, scores: Tensor) -> Tensor:
        """Shown scores (N, K)."""
        if self.classes is not None and scores.shape[-1] != self.classes:
            raise ValueError(
                f"expected scores of {self.classes} classes, as the protection was fitted to, but got "
                f"{scores.shape[-1]}; fit it to this model"
            )
        if self.aaa is None and self.terraces is None and self.given == self.shown:
            return scores
        z = self._log_scores(scores.detach().to(single(scores.dtype)))
        defense = self.aaa or self.terraces
        return from_log_scores(z if defense is None else defense(z), self.shown)

    def _log_scores(self, scores: Tensor) -> Tensor:
        """As `oracle.as_log_scores`, but NaN for what is no probability, as an error would depend on values."""
        if self.given == "probs":
            right = (scores >= 0) & (scores <= 1 + 1e-3)
            return scores.clamp_min(SMALLEST).log().where(right, torch.nan)
        return torch.where(scores == -torch.inf, math.log(SMALLEST), scores) if self.given == "log_probs" else scores


class Protected(nn.Module):
    """A network and its protection, as one module from images (N, C, H, W) to shown scores (N, K)."""

    def __init__(self, network: nn.Module, protection: Protection) -> None:
        super().__init__()
        self.network, self.protection = network, protection

    def forward(self, images: Tensor) -> Tensor:
        """Shown scores (N, K)."""
        shown: Tensor = self.protection(self.network(images)).float()
        return shown


class Wanted(nn.Module):
    """What a network wants done to images (N, C, H, W), as a module."""

    def __init__(self, input: Input) -> None:
        super().__init__()
        self.input = input

    def forward(self, images: Tensor) -> Tensor:
        """Images as the network wants them."""
        return self.input(images)


def off_borders(z: Tensor, found: Fit | TerraceFit | None, near: float = 1e-4) -> Tensor:
    """Which rows (N,) of log-scores (N, K) have a margin at least `near` from 0 and each border of what is shown.

    At a border rounding decides between two answers, both right.
    """
    top = z.double().topk(2, dim=-1)
    margin = top.values[:, 0] - top.values[:, 1]
    far = margin >= near
    if isinstance(found, Fit) and found.curve == "linear":
        far &= (margin / found.tau - (margin / found.tau).round()).abs() * found.tau >= near
    if isinstance(found, TerraceFit):
        for g, borders in enumerate(found.borders):
            mine = torch.tensor([found.group[int(i)] == g for i in top.indices[:, 0]], device=z.device)
            for border in borders:
                far &= ~(mine & ((margin - border).abs() < near))
    return far
