"""The command `queryfoil check`, with the options of `queryfoil attack`."""

from pathlib import Path
from typing import Annotated

import typer

from queryfoil import attacking, options
from queryfoil.flags import prepared
from queryfoil.terminal import Display, console, flags, plainly


@plainly
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As `queryfoil attack` takes it.")],
    images: Annotated[str, typer.Option(help="As `queryfoil attack` takes them; 100 do for a first look.")],
    out: Annotated[Path, typer.Option(help="Folder for check.json and check.html.")],
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    budget: Annotated[int, typer.Option(help="Most queries an image of each short attack, from 8 on.")] = 500,
    n: Annotated[int, typer.Option("--n", help="Check on the first n images.")] = 100,
    seed: options.Seed = 0,
    calibration: Annotated[
        str | None,
        typer.Option(help="Images that the defense was fitted on, as a folder or NumPy file: none may be attacked."),
    ] = None,
    output: options.Output = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    defense: options.Defense = None,
    defense_set: options.DefenseSet = None,
    fit: options.FitFile = None,
    device: options.Device = "cpu",
) -> None:
    """Ask whether a defense only looks strong: flags of its answers and of short attacks.

    docs/flags.md explains each flag.
    """
    request = attacking.request(
        model=model, output=output, mean=mean, std=std, size=size,
        defense=defense, defense_hyper=attacking.hyper(defense_set or []), fit=fit,
        images=images, n=n, attack="square", norm=norm, eps=options.radius(eps, norm), budget=budget, seed=seed,
    )  # fmt: skip
    ready = prepared.ready(request, out, calibration, device)
    console.print(f"{request.name}: {ready.estimate}", markup=False, soft_wrap=True)
    with Display() as report:
        found = prepared.run(ready, out, report)
    flags(found)
    console.print(f"page: {(out / 'check.html').resolve()}", markup=False, soft_wrap=True)
