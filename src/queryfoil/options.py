"""Options that several commands of the command line share."""

from pathlib import Path
from typing import Annotated

import typer

Norm = Annotated[str, typer.Option(help="Norm of the ball: linf or l2.")]
Eps = Annotated[
    str | None,
    typer.Option(help="Radius of the ball on the [0, 1] scale, such as 8/255 or 0.5; for linf, 8/255 if left out."),
]
Seed = Annotated[int, typer.Option(help="Seed of all random draws.")]
Output = Annotated[
    str | None, typer.Option(help="What the scores are: logits, log_probs or probs; as the model says if left out.")
]
Mean = Annotated[
    str | None, typer.Option(help="Subtracted from images before the model sees them, such as 0.485,0.456,0.406.")
]
Std = Annotated[str | None, typer.Option(help="Then divided by, such as 0.229,0.224,0.225.")]
Size = Annotated[int | None, typer.Option(help="Height and width to which images are resized inside.")]
Defense = Annotated[str | None, typer.Option(help="Put a defense around the model: see `queryfoil list`.")]
DefenseSet = Annotated[
    list[str] | None, typer.Option("--defense-set", metavar="KEY=VALUE", help="A setting of the defense; repeat.")
]
FitFile = Annotated[Path | None, typer.Option(help="What `queryfoil fit` wrote, for --defense terraces or aaa.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]

Engine = Annotated[
    str, typer.Option(help="Who does the work: process (this one), or ray (each chunk a task of a Ray cluster).")
]
Address = Annotated[
    str | None,
    typer.Option(help="With ray: a running cluster, such as auto or HOST:6379; all CPUs of this machine if left out."),
]
GpusPerTask = Annotated[
    float | None, typer.Option(help="With ray: 1 for a GPU for each task, 0.5 for two tasks on each; CPUs if left out.")
]


def radius(eps: str | None, norm: str) -> str:
    """The radius that was asked for, or the usual one of the norm; ValueError where there is none.

    >>> radius(None, "linf"), radius("0.5", "l2")
    ('8/255', '0.5')
    """
    if eps is None and norm == "l2":
        raise ValueError(
            "expected --eps, the length that an image may be changed by in L2, such as 0.5; there is no usual one"
        )
    return eps or "8/255"
