"""F2, F3 and F4: does the same image get the same answer, in any batch, at any time, after any other?"""

import torch

from queryfoil.flags.flag import Flag, judged, not_judged
from queryfoil.flags.subject import ROUNDING, Subject, percent, same, top_lead
from queryfoil.oracle import answers, quantize

SOME = 32  # images asked one by one
LEAST = 2
"""Images whose answer must differ: a defense with jumps shows one now and then, where rounding crosses a jump."""
REPEATS = 10
OTHERS = 100


def batch_dependence(subject: Subject) -> Flag:
    """F2: the same images in one batch, in another order, one by one, and each among black images.

    Raised where at least two images (one, of fewer than eight) get other scores, beyond rounding. A verdict for a
    model that declares `rowwise`, as one does that says nothing; else a property.
    """
    some = subject.first(SOME)
    task, n = some.task, len(some.task.ids)
    if n < 2:
        return not_judged("F2", "a second image")
    if not some.repeats:
        return not_judged("F2", "an answer that repeats: it changes between two calls with one batch (see F3)")
    together = some.clean
    backwards = some.shown(task.images.flip(0), torch.arange(n).flip(0)).flip(0)
    alone = torch.cat([some.shown(task.images[i : i + 1], torch.tensor([i])) for i in range(n)])
    padded = []
    for i in range(n):
        # black images at ids that no image has
        x = torch.zeros_like(task.images[:8])
        x[:1] = quantize(task.images[i : i + 1])
        ids = torch.cat([task.ids[i : i + 1], int(task.ids.max()) + 1 + torch.arange(len(x) - 1, device=x.device)])
        padded.append(answers(some.model, x, ids, torch.zeros_like(ids), task.seed)[:1])
    ways = {"in another order": backwards, "one by one": alone, "among black images": torch.cat(padded)}
    differ = {way: ~same(together, scores) for way, scores in ways.items()}
    count = int(torch.stack(list(differ.values())).any(0).sum())
    largest = max(float((together - scores).abs().max()) for scores in ways.values())
    margin = max(float((top_lead(together) - top_lead(scores)).abs().max()) for scores in ways.values())
    least = LEAST if n >= 8 else 1
    measured = (
        f"{count} of {n} images get other scores in another batch ("
        + ", ".join(f"{way} {int(d.sum())}" for way, d in differ.items())
        + f"); scores differ by up to {largest:.2g}, margins by up to {margin:.2g}. Raised from {least} on that differ "
        f"by more than {ROUNDING:g} of their size"
    )
    rowwise = bool(getattr(subject.model, "rowwise", True))
    return judged(
        "F2", count >= least, measured, None if rowwise else "property",
        images=n, differing=count, largest_difference=largest, largest_margin_difference=margin,
    )  # fmt: skip


def chance(subject: Subject) -> Flag:
    """F3: each image asked ten times, each time as a new query, for which the library's defenses draw anew.

    Raised by any difference beyond rounding. A property for a model that declares `deterministic = False`, else a
    verdict: its successes are not asked for again, and its results cannot be repeated.
    """
    x = subject.task.images
    draws = torch.stack([subject.shown(x, query=q) for q in range(1, REPEATS + 1)])
    differ = torch.stack([~same(draws[0], scores) for scores in draws[1:]]).any(0)
    changed = (draws.argmax(2) != draws[0].argmax(1)).any(0)
    margins = torch.stack([top_lead(scores) for scores in draws])
    spread = float(margins.std(0).median())
    declared = not getattr(subject.model, "deterministic", True)
    says = "declares deterministic = False" if declared else "does not declare deterministic = False"
    measured = (
        f"{int(differ.sum())} of {len(x)} images get other scores when asked {REPEATS} times, {int(changed.sum())} "
        f"another label; the margin's standard deviation has a median of {spread:.2g}; the model {says}. Raised by any "
        "beyond rounding"
    )
    return judged(
        "F3", bool(differ.any()), measured, None if declared else "verdict",
        images=len(x), differing=int(differ.sum()), other_label=int(changed.sum()), margin_deviation=spread,
    )  # fmt: skip


def state(subject: Subject) -> Flag:
    """F4: an image, then 100 others, then near-duplicates of it, then it again, all at one query number.

    For eight images. Raised where an answer changes that did not when asked twice in a row.
    """
    n = len(subject.task.ids)
    if n < 2:
        return not_judged("F4", "a second image")
    after_others, after_near, unstable, tried = 0, 0, 0, min(8, n)
    for i in range(tried):
        row, x = torch.tensor([i]), subject.task.images[i : i + 1]
        first, again = subject.shown(x, row), subject.shown(x, row)
        if not bool(same(first, again)):
            unstable += 1
            continue
        others = (i + 1 + torch.arange(OTHERS) % (n - 1)) % n
        subject.shown(subject.task.images[others], others)
        after_others += not bool(same(first, subject.shown(x, row)))
        near = x.repeat(OTHERS, 1, 1, 1)
        flat = near.flatten(1)
        pixel = torch.arange(OTHERS, device=x.device) % flat.shape[1]
        value = flat.gather(1, pixel[:, None])
        flat.scatter_(1, pixel[:, None], torch.where(value < 0.5, value + 1 / 255, value - 1 / 255))
        for part in torch.split(flat.view_as(near), 10):
            subject.shown(part, row.expand(len(part)))
        after_near += not bool(same(first, subject.shown(x, row)))
    if unstable == tried:
        return not_judged("F4", "an answer that repeats: it changes when asked twice in a row (see F3)")
    measured = (
        f"of {tried - unstable} images, {after_others} get another answer after {OTHERS} queries of others, "
        f"{after_near} after {OTHERS} near-duplicates. Raised by any beyond rounding"
        + (f"; {unstable} more change when asked twice in a row ({percent(unstable / tried)})" if unstable else "")
    )
    return judged(
        "F4", after_others + after_near > 0, measured,
        images=tried - unstable, after_others=after_others, after_near_duplicates=after_near,
    )  # fmt: skip
