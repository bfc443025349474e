"""What defenses of scores share: log-scores in double precision, and the way back, on which no answer changes."""

import torch
from torch import Tensor

from queryfoil.defenses.disguise import MIN_MARGIN
from queryfoil.oracle import as_log_scores, from_log_scores


def log_scores(scores: Tensor, output: str) -> Tensor:
    """A model's scores (N, K), of the kind that it declares, as log-scores in double precision.

    ValueError for NaN and infinite ones: not all that is shown of scores would let them through to whoever checks.
    """
    scores = as_log_scores(scores.double(), output)
    if not bool(scores.isfinite().all()):
        raise ValueError("expected finite scores from the model, but got NaN or infinite ones")
    return scores


def single(dtype: torch.dtype) -> torch.dtype:
    """Single precision in place of half: the type of what is shown, as rounding to half could tie the top two."""
    return torch.promote_types(dtype, torch.float32)


def show(scores: Tensor, top: Tensor, output: str, dtype: torch.dtype) -> Tensor:
    """Log-scores (..., K) in double precision as a kind and type of scores whose answer is class `top` (..., 1).

    The top class leads by a margin of at least `MIN_MARGIN`, so that it does as the logarithm of a single-precision
    probability too; and after rounding to the type by at least the next number of it, which is more for huge logits.
    Numbers beyond the type's are cut to its range.

    >>> show(torch.zeros(1, 2).double(), torch.tensor([[1]]), "probs", torch.float32).diff() > 0
    tensor([[True]])
    """
    scores = scores.scatter(-1, top, torch.maximum(scores.gather(-1, top), _others(scores, top) + MIN_MARGIN))
    limits = torch.finfo(dtype)
    # so that there is room above the others
    shown = from_log_scores(scores, output).clamp(limits.min, limits.max * (1 - limits.eps)).to(dtype)
    others = _others(shown, top)
    above = torch.nextafter(others, torch.full_like(others, torch.inf))
    return shown.scatter(-1, top, torch.maximum(shown.gather(-1, top), above))


def _others(scores: Tensor, top: Tensor) -> Tensor:
    """The best score (..., 1) of the classes but `top`."""
    return scores.scatter(-1, top, -torch.inf).amax(-1, keepdim=True)
