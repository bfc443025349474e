"""The command `queryfoil export`."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter

from queryfoil import options
from queryfoil.data import read_npz
from queryfoil.models.victim import Input, victim
from queryfoil.models.zoo import MODELS
from queryfoil.plan import Numbers
from queryfoil.protect import load_fit
from queryfoil.terminal import console, plainly

ALONE = "scores"


@plainly
def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A shipped name, NAME=PATH of published weights, `module:function` or an ONNX file; or `scores`, "
            "which writes the protection alone, from scores to shown scores, for a network that is elsewhere.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    fit: Annotated[Path | None, typer.Option(help="What `queryfoil fit` wrote for this model.")] = None,
    to: Annotated[
        str, typer.Option(help="onnx, pt2 (torch.export), or numpy: the protection alone as a Python file.")
    ] = "onnx",
    shape: Annotated[str | None, typer.Option(metavar="C,H,W", help="Of an image; known for shipped models.")] = None,
    softmax: Annotated[bool, typer.Option("--softmax", help="Show probabilities, whatever the model gives.")] = False,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="The file that `queryfoil fit` read: its hash and the margins that are shown for it are written too, "
            "with which `queryfoil serve` notices other images than expected."
        ),
    ] = None,
    unprotected: Annotated[
        bool, typer.Option("--unprotected", help="Write the model without a defense, as for a comparison.")
    ] = False,
    output: options.Output = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
) -> None:
    """Write one file with a model and its protection, and check it against the model.

    At batches of 1, 3 and 64 the labels have to be the same, and margins within 0.001; else there is no file.
    """
    from queryfoil.deploy.export import export

    if (fit is None) != unprotected:
        raise ValueError(
            "expected --fit, the file that `queryfoil fit` wrote for this model, or --unprotected to write it without "
            f"a defense, but got {'neither' if fit is None else 'both'}"
        )
    found = None if fit is None else load_fit(fit)
    arrays = None if held_out is None else read_npz(held_out, "logits", "labels")
    sample = None if arrays is None else (arrays["logits"], arrays["labels"])
    if model == ALONE:
        if found is None:
            raise ValueError("the protection alone needs --fit")
        if shape or mean or std or size:
            raise ValueError("the protection alone sees no images; leave out --shape, --mean, --std and --size")
        done = export(None, found, out, to=to, softmax=softmax, given=output or "logits", held_out=sample)
    else:
        read = TypeAdapter(Numbers | None).validate_python
        chosen = Input(read(mean), read(std), size)
        network = victim(model, output=output, input=chosen)
        sides = _shape(shape) if shape else (1, 28, 28) if model in MODELS else None
        done = export(network, found, out, to=to, shape=sides, softmax=softmax, held_out=sample)
    console.print(str(done), markup=False, highlight=False, soft_wrap=True)


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"expected --shape as C,H,W, such as 3,224,224, but got {text!r}")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width
