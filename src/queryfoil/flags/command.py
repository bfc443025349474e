"""The command `queryfoil check`, with the options of `queryfoil attack`."""

from pathlib import Path
from typing import Annotated

import typer

from queryfoil import attacking
from queryfoil.flags import prepared
from queryfoil.terminal import Display, console, flags, plainly


@plainly
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As `queryfoil attack` takes it.")],
    images: Annotated[str, typer.Option(help="As `queryfoil attack` takes them; 100 do for a first look.")],
    out: Annotated[Path, typer.Option(help="Folder for check.json and check.html.")],
    norm: Annotated[str, typer.Option(help="Norm of the ball: linf or l2.")] = "linf",
    eps: Annotated[
        str | None,
        typer.Option(help="Radius of the ball on the [0, 1] scale, such as 8/255 or 0.5; for linf, 8/255 if left out."),
    ] = None,
    budget: Annotated[int, typer.Option(help="Most queries an image of each short attack, from 8 on.")] = 500,
    n: Annotated[int, typer.Option("--n", help="Check on the first n images.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.")] = 0,
    calibration: Annotated[
        str | None,
        typer.Option(help="Images that the defense was fitted on, as a folder or NumPy file: none may be attacked."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="What the scores are: logits, log_probs or probs; as the model says if left out.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="As for `queryfoil attack`, and so std and size.")] = None,
    std: Annotated[str | None, typer.Option(help="Then divided by, such as 0.229,0.224,0.225.")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width to which images are resized inside.")] = None,
    defense: Annotated[str | None, typer.Option(help="Put a defense around the model: see `queryfoil list`.")] = None,
    defense_set: Annotated[
        list[str] | None, typer.Option("--defense-set", metavar="KEY=VALUE", help="A setting of the defense; repeat.")
    ] = None,
    fit: Annotated[Path | None, typer.Option(help="What `queryfoil fit` wrote, for --defense aaa.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Ask whether a defense only looks strong: flags of its answers and of short attacks.

    docs/flags.md explains each flag.
    """
    if eps is None and norm == "l2":
        raise ValueError(
            "expected --eps, the length that an image may be changed by in L2, such as 0.5; there is no usual one"
        )
    request = attacking.request(
        model=model, output=output, mean=mean, std=std, size=size,
        defense=defense, defense_hyper=attacking.hyper(defense_set or []), fit=fit,
        images=images, n=n, attack="square", norm=norm, eps=eps or "8/255", budget=budget, seed=seed,
    )  # fmt: skip
    ready = prepared.ready(request, out, calibration, device)
    console.print(f"{request.name}: {ready.estimate}", markup=False, soft_wrap=True)
    with Display() as report:
        found = prepared.run(ready, out, report)
    flags(found)
    console.print(f"page: {(out / 'check.html').resolve()}", markup=False, soft_wrap=True)
