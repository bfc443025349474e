"""The command `queryfoil scan`: the period of the AAA around a model, from its answers alone."""

from typing import Annotated

import torch
import typer
from torch import Tensor

from queryfoil import attacking, options
from queryfoil.attacks.line_scan import Scan, estimate_tau
from queryfoil.checks import require_whole
from queryfoil.terminal import console, plainly

LINES = 5


@plainly
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As `queryfoil attack` takes it.")],
    images: Annotated[str, typer.Option(help="As `queryfoil attack` takes them, with labels of two classes or more.")],
    lines: Annotated[
        int, typer.Option(help="Lines between two images each, from 2 on; some 100 queries a line.")
    ] = LINES,
    output: options.Output = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    defense: options.Defense = None,
    defense_set: options.DefenseSet = None,
    fit: options.FitFile = None,
    device: options.Device = "cpu",
) -> None:
    """Estimate AAA's curve, tau and alpha from answers on lines between images, as an attacker does before an attack.

    docs/choose-an-attack.md says what can be done with it.
    """
    require_whole("lines", lines, 2)
    request = attacking.request(
        model=model, output=output, mean=mean, std=std, size=size,
        defense=defense, defense_hyper=attacking.hyper(defense_set or []), fit=fit,
        images=images, attack="square", eps="8/255", budget=1,
    )  # fmt: skip
    ready = attacking.prepare(request, device)
    scan = estimate_tau(ready.model, ready.task.images[ends(ready.task.labels, lines)])
    console.print(f"{request.name}: {told(scan)}", markup=False, soft_wrap=True)


def ends(labels: Tensor, lines: int) -> Tensor:
    """Rows of images (2 L,) that are the ends of lines, one after the other: the first ones of two classes each.

    ValueError where labels (N,) have no so many pairs.

    >>> ends(torch.tensor([3, 3, 5, 3, 5]), 2)
    tensor([0, 2, 1, 4])
    """
    free = list(enumerate(labels.tolist()))
    found: list[int] = []
    while free and len(found) < 2 * lines:
        row, label = free.pop(0)
        other = next((one for one in free if one[1] != label), None)
        if other is not None:
            free.remove(other)
            found += [row, other[0]]
    if len(found) < 2 * lines:
        raise ValueError(
            f"expected images for {lines} lines, each between two classes, but these {len(labels)} have "
            f"{len(found) // 2} such pairs; pass more images, or fewer lines"
        )
    return torch.tensor(found, device=labels.device)


def told(scan: Scan) -> str:
    """What a scan found, in a line.

    >>> told(Scan(None, None, None, lines=5, jumps=0, queries=612))
    'no period found: nothing that lines agree on looks like AAA (5 lines, 612 queries)'
    """
    cost = f"{scan.lines} lines, {scan.queries} queries"
    if scan.tau is None:
        return f"no period found: nothing that lines agree on looks like AAA ({cost})"
    where = "jumps" if scan.curve == "linear" else "turning points"
    return f"AAA-{scan.curve}, tau {scan.tau:.4g}, alpha {scan.alpha:.3g}, from {scan.jumps} {where} ({cost})"
