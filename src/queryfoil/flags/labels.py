"""F1: does the defense change answers?"""

import torch

from queryfoil import metrics
from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.subject import Subject, percent, top_lead

BINS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Lower ends of the bins of the undefended margin."""


def label_flips(subject: Subject) -> Flag:
    """F1: answers that differ from the undefended model's, on the images and on others near its boundary.

    A verdict for a defense that declares `keeps_label`, else a property.
    """
    if subject.raw is None:
        return not_judged("F1", "the undefended model; pass raw=")
    x, rows = subject.near
    task = subject.task
    raw = torch.cat([subject.true(task.images), subject.true(x, rows)])
    shown = torch.cat([subject.clean, subject.shown(x, rows, query=1)])
    margins, flips = top_lead(raw), raw.argmax(1) != shown.argmax(1)
    counts = {}
    for low, high in zip(BINS, (*BINS[1:], torch.inf), strict=True):
        inside = (margins >= low) & (margins < high)
        counts[f"flips_from_margin_{low:g}"] = int(flips[inside].sum())
        counts[f"images_from_margin_{low:g}"] = int(inside.sum())
    n = len(task.labels)
    right = [int((s[:n].argmax(1) == task.labels).sum()) for s in (raw, shown)]
    parts = [
        f"{counts[f'flips_from_margin_{low:g}']} of {counts[f'images_from_margin_{low:g}']} from {low:g}"
        for low in BINS
    ]
    kept = bool(getattr(subject.model, "keeps_label", False))
    interval = metrics.wilson(right[1], n)
    declared = (
        "although the defense declares that it keeps labels" if kept else "the defense does not promise to keep any"
    )
    measured = (
        f"{int(flips.sum())} of {len(flips)} answers differ from the undefended model's ({n} images and {len(x)} near "
        f"its boundary; by undefended margin {', '.join(parts)}); clean accuracy {percent(right[0] / n)} undefended, "
        f"{percent(right[1] / n)} shown ({100 * interval.low:.1f}–{100 * interval.high:.1f}). Raised by any"
        + (f", {declared}" if bool(flips.any()) else "")
    )
    return judged(
        "F1", bool(flips.any()), measured, "verdict" if kept else None,
        flips=int(flips.sum()), images=len(flips), accuracy_undefended=right[0] / n, accuracy=right[1] / n, **counts,
    )  # fmt: skip
