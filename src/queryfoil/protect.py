"""Protecting a model in two calls: `fit` on held-out scores, with an objective, and `protect`."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from queryfoil.checks import lookup
from queryfoil.defenses import calibration, temperature, terrace_fit
from queryfoil.defenses import disguise as aaa
from queryfoil.defenses.aaa import AAA
from queryfoil.defenses.calibration import Fit
from queryfoil.defenses.disguise import SMALLEST_SETTING
from queryfoil.defenses.terrace_fit import TerraceFit
from queryfoil.defenses.terraces import Terraces, terraced

OBJECTIVES: dict[str, tuple[Callable[..., Fit | TerraceFit], dict[str, Any], str]] = {
    "worst-case": (terrace_fit.fit, {}, "terraces: little to go by for attackers who expect a defense"),
    "greedy": (
        calibration.fit,
        {},
        "AAA, exact, the largest period that stays calibrated: best against greedy attackers",
    ),
    "paper": (
        calibration.fit,
        {"curve": "linear", "tau": 6.0, "solver": "adam", "rule": "lowest"},
        "AAA as in the paper, whatever the model: to compare with it",
    ),
}
"""What a protection is fitted for: how, with which settings, and a line about it."""

TERRACES = "terraces"
SCALED_DOWN, FAR_OFF = 0.1, 0.1  # a temperature, and an ECE
ROUNDED = 0.05  # by how much probabilities of few digits may miss their sum
REFUSED = "no terraces keep"  # how `terrace_fit.fit` begins where it finds none that are good enough


def fit(logits: Tensor, labels: Tensor, *, objective: str = "worst-case", **settings: Any) -> Fit | TerraceFit:
    """Find a protection for a model from its scores (N, K) on held-out images and their labels (N,).

    Never pass images that you report on. For log-probabilities pass them as they are; for probabilities their
    logarithm.

    objective: "worst-case", the least to go by for attackers who expect a defense, while the AUROC of right against
    wrong answers falls by little and the ECE rises by at most half a point (`terrace_fit.fit`, which takes `ranks` and
    `allowed`); "greedy", most against attackers who minimize what they are shown, at the same ECE (`calibration.fit`,
    with `curve`, `tau`, `alpha`, `beta`, `solver`, `steps`, `lr`, `rule`); or "paper", AAA-linear with the settings
    of the paper. All decide on these images alone. ValueError for settings that the objective does not take, for
    probabilities, and for logits whose best classes lead by too little to fit anything to, or by too much for any
    temperature; it says by how much they do.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> logits = 3 * torch.randn(500, 10, generator=generator)
    >>> labels = (logits / 2).softmax(1).multinomial(1, generator=generator).squeeze(1)
    >>> fit(logits, labels, objective="greedy", curve="sine").curve
    'sine'
    """
    how, fixed, _ = lookup(OBJECTIVES, objective, "objective")
    takes = _takes(objective)
    for name in settings:
        if name not in takes:
            others = [key for key in OBJECTIVES if name in _takes(key)]
            hint = f"; it belongs to the objective {' or '.join(others)}" if others else ""
            raise ValueError(f"the objective {objective} does not take {name}{hint}; it takes {', '.join(takes)}")
    calibration.check_held_out(logits, labels)
    _check_logits(logits)
    _check_margins(logits, finds_tau=objective == "greedy" and settings.get("tau") is None)
    fitted = _check_temperature(logits, labels)
    if how is terrace_fit.fit:
        _check_parted(logits, fitted)
    try:
        found: Fit | TerraceFit = how(logits, labels, **fixed, **settings)
    except ValueError as error:  # at a small scale terraces are found for some networks, so it is let try
        if str(error).startswith(REFUSED) and (why := _small(logits)):
            raise ValueError(f"{why}. As these logits are, {error}") from error
        raise
    _check_calibrated(found, fitted, int((logits.argmax(1).cpu() != labels.cpu()).sum()))
    return found


def _check_logits(logits: Tensor) -> None:
    """ValueError for what can only be probabilities."""
    z = logits.detach().double()
    if bool((z < 0).any()):
        return
    for whole in (1, 100):
        if bool(((z.sum(1) / whole - 1).abs() < ROUNDED).all()):
            raise ValueError(
                f"expected logits or log-probabilities, but each row is of numbers from 0 on that sum to {whole}: "
                f"probabilities; pass their logarithm, such as (p / {whole}).clamp_min(1e-12).log()"
            )


def _check_calibrated(found: Fit | TerraceFit, fitted: float, wrong: int) -> None:
    """ValueError for a protection whose confidence is far off, of logits that are too small to be a model's own.

    `wrong`: how many answers are, without which no temperature is too low.
    """
    if wrong and fitted < SCALED_DOWN and found.ece_cross_fitted > FAR_OFF:
        raise ValueError(
            f"expected logits that are calibrated near their own scale, but these want a temperature of {fitted:.2g}, "
            f"and the confidence of the best protection found would be off by {100 * found.ece_cross_fitted:.0f} % "
            "(ECE); check that these are the model's logits and were not scaled down"
        )


def _check_margins(logits: Tensor, finds_tau: bool) -> None:
    """ValueError where the classes of nearly all rows are level, so that nothing can be fitted to their margins.

    `finds_tau`: whether a period is looked for, the smallest of which is a share of the median margin.
    """
    margins = _margins(logits)
    largest, median = float(margins.max()), float(margins.median())
    if largest == 0:
        raise ValueError("expected logits with margins above 0, but all rows are tied for the top; check the model")
    if largest < SMALLEST_SETTING or (finds_tau and 0 < median * min(calibration.TAU_SHARES) < SMALLEST_SETTING):
        raise ValueError(
            f"expected logits whose best class leads by more than float32 can tell apart, but of these {len(margins)} "
            f"rows half lead by at most {median:.2g}, and none by more than {largest:.2g}; check the model, and that "
            "these are its logits and were not scaled down"
        )


def _check_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that calibrates; ValueError for logits so large that none of those tried does."""
    z = logits.detach().double().cpu()
    fitted = temperature.fit(z, labels.cpu()).temperature
    if fitted > 0.999 * temperature.TO and (median := float(_margins(z).median())) > temperature.TO:
        raise ValueError(
            f"expected logits that a temperature of at most {temperature.TO:g}, the highest that is tried, calibrates, "
            f"but half of these {len(z)} lead by at least {median:.2g}, and no such temperature is high enough; check "
            "that these are the model's logits and were not scaled up"
        )
    return fitted


def _check_parted(logits: Tensor, fitted: float) -> None:
    """ValueError where nearly all wrong answers to expect are in rows tied for the top, so that no border parts them.

    That is, where even the last of the candidates for borders (`terrace_fit.CANDIDATES`) would lie at 0. `fitted` is
    the temperature that calibrates.
    """
    z = logits.detach().double().cpu()
    wrong = 1 - (z / fitted).softmax(1).amax(1)
    tied = _margins(z) == 0
    share = float(wrong[tied].sum() / wrong.sum())
    if share >= terrace_fit.CANDIDATES[-1] - 1e-9:  # in another order the sum is rounded otherwise
        raise ValueError(
            f"expected logits whose best class leads in rows that may be wrong, but {int(tied.sum())} of these "
            f"{len(z)} rows are tied for the top, and {100 * share:.1f} % of the wrong answers to expect are among "
            "them, so that no margin tells right from wrong; check the model, and that these are its logits and were "
            "neither rounded nor scaled down"
        )


def _small(logits: Tensor) -> str:
    """What is wrong with logits of which half lead by at most the lowest temperature that is tried; else nothing.

    Terraces are fitted to calibrated confidences, and no such temperature makes confident answers of these rows.
    """
    margins = _margins(logits)
    median, tied = float(margins.median()), int((margins == 0).sum())
    if median > temperature.FROM:
        return ""
    return (
        f"expected logits whose best class leads by more than {temperature.FROM:g}, the lowest temperature that is "
        f"tried, in most rows, but half of these {len(margins)} lead by at most {median:.2g} ({tied} are tied for the "
        f"top, and none leads by more than {float(margins.max()):.2g}); check the model, and that these are its logits "
        "and were neither rounded nor scaled down"
    )


def _margins(logits: Tensor) -> Tensor:
    """By how much the best class of each row leads (N,)."""
    top = logits.detach().topk(2, dim=1).values.double()
    return top[:, 0] - top[:, 1]


def _takes(objective: str) -> list[str]:
    """The settings that an objective leaves open."""
    how, fixed, _ = OBJECTIVES[objective]
    parameters = inspect.signature(how).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in fixed]


def protect(model: nn.Module, found: Fit | TerraceFit) -> nn.Module:
    """A module like the model, with the same answers, protected by what `fit` found.

    >>> import torch
    >>> network = nn.Linear(4, 10)
    >>> generator = torch.Generator().manual_seed(0)
    >>> logits = 3 * torch.randn(500, 10, generator=generator)
    >>> labels = (logits / 2).softmax(1).multinomial(1, generator=generator).squeeze(1)
    >>> protected = protect(network, fit(logits, labels, objective="greedy"))
    >>> x = torch.rand(8, 4)
    >>> torch.equal(protected(x).argmax(1), network(x).argmax(1))
    True
    """
    if isinstance(found, TerraceFit):
        return Terraces.from_fit(model, found)
    if isinstance(found, Fit):
        return AAA.from_fit(model, found)
    raise ValueError(f"expected what `fit` found, or `load_fit` read, but got {type(found).__name__}; pass that")


def load_fit(path: str | Path) -> Fit | TerraceFit:
    """Read what `fit` found, and `save` wrote; ValueError if it is no such file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a JSON file that `fit` wrote, but {path} is none: {error}") from None
    kind: Any = TerraceFit if isinstance(content, dict) and "borders" in content else Fit
    found: Fit | TerraceFit = kind.load(path)
    return found


def about(found: Fit | TerraceFit) -> str:
    """What a fit found, in a line."""
    ece = f"ECE {100 * found.ece_undefended:.2f} % undefended, {100 * found.ece_cross_fitted:.2f} % protected"
    on = f"cross-fitted, n = {found.n}"
    if isinstance(found, Fit):
        return f"AAA, {found.curve}, tau {found.tau:g}, temperature {found.temperature:g}; {ece} ({on})"
    borders = sum(map(len, found.borders))
    return (
        f"terraces, {borders} borders in {sum(map(bool, found.borders))} of {len(found.borders)} groups of classes "
        f"({100 * found.exposed:.0f} % of the right answers); {ece}, AUROC {100 * found.auroc_undefended:.1f} % "
        f"undefended, {100 * found.auroc_cross_fitted:.1f} % protected ({on})"
    )


def disguise(logits: Tensor, *, curve: str = "linear", key: TerraceFit | None = None, **settings: Any) -> Tensor:
    """Rewrite logits (..., K), K >= 2, so that score-based query attacks are led astray.

    curve: "linear" or "sine", AAA (see `queryfoil.defenses.disguise`, whose settings these are); or "terraces", with
    the `key` that `fit` found. Each row is independent of the others. ValueError for settings that have no effect.

    >>> import torch
    >>> top2 = disguise(torch.tensor([[4.0, 0.0, -3.0]]), temperature=2.0).topk(2).values[0]
    >>> round(float(top2[0] - top2[1]), 3)  # target 2 x 3 - 4 = 2
    2.0
    """
    lookup({**aaa.ALPHA, TERRACES: 0}, curve, "curve")
    if not (isinstance(key, TerraceFit) if curve == TERRACES else key is None):
        raise ValueError(
            f"expected a key, what `fit` found, for the curve {TERRACES} and for no other, but got curve={curve!r} and "
            f"key={'None' if key is None else type(key).__name__}"
        )
    if key is None:
        return aaa.disguise(logits, curve=curve, **settings)
    if settings:
        raise ValueError(f"the key holds all settings of {TERRACES}, so {', '.join(settings)} would have no effect")
    return terraced(logits, key)
