"""The command `queryfoil audit`."""

import os
import ssl
import sys
from pathlib import Path
from typing import Annotated

import typer

from queryfoil import options, summary
from queryfoil.deploy.audit import LEDGER, Audit, prepare
from queryfoil.deploy.audit_run import CHUNK, run
from queryfoil.deploy.endpoint import EndpointError
from queryfoil.deploy.ledger import SpentError, read
from queryfoil.deploy.remote import BATCH, RATE, Limits
from queryfoil.deploy.sameness import ChangedError
from queryfoil.report import cells, page, worst
from queryfoil.store import Store
from queryfoil.terminal import STOPPED, Display, console, errors, finished, plainly, results

TOKEN = "QUERYFOIL_TOKEN"


@plainly
def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="An endpoint of yours: http(s)://HOST:PORT/v2/models/NAME or grpc(s)://HOST:PORT/NAME (Open Inference "
            "Protocol); or `module:function`, as `queryfoil attack` takes it.",
        ),
    ],
    images: Annotated[str, typer.Option(help="As `queryfoil attack` takes them.")],
    out: Annotated[Path, typer.Option(help="Folder for results; a folder of the same settings is continued.")],
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="An attacker of the plan worst-case, or an attack of `queryfoil list`; repeat. If left out, nine: "
            "see docs/audit.md."
        ),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Most queries an image and attack, the clean one included.")] = 500,
    n: Annotated[int, typer.Option("--n", help="Attack the first n images, from 15 on.")] = 100,
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    seed: options.Seed = 0,
    most: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images that may ever be sent, by all runs in the folder together, whatever they are for; if left "
            "out, what the attacks may need and a tenth more.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, help=f"Images a second, 0 for no limit; if left out, {RATE:g}, on this machine no limit."),
    ] = None,
    requests: Annotated[float, typer.Option(min=0, help="Requests a second, 0 for no limit.")] = 0,
    batch: Annotated[
        int | None, typer.Option(min=1, help=f"Images a request; {BATCH}, fewer where the endpoint wants fewer.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds for which a request is sent again while the endpoint is busy or gone.")
    ] = 120.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait for an answer.")] = 60.0,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a token, which is sent as `Authorization: Bearer TOKEN`. It can also come in the "
            f"environment variable {TOKEN}."
        ),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            help="File with certificates (PEM) of the authorities to trust instead of the usual ones, for an https or "
            "grpcs endpoint."
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask whether the endpoint is yours: for scripts that know it.")
    ] = False,
    output: options.Output = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="Minutes after which to stop at the end of a chunk.")
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Images a chunk: what a killed run can lose. Does not change results.")
    ] = CHUNK,
) -> None:
    """Attack an endpoint that is your own, within limits, and write the report that `bench` writes.

    Asks for confirmation unless the address is on this machine. Can be stopped at any moment and continued by the
    same command. docs/audit.md has more.
    """
    token = _token(token_file)
    checked = prepare(
        model, images, out, attacks=attack or [], n=n, budget=budget, norm=norm, eps=options.radius(eps, norm),
        seed=seed, output=output, mean=mean, std=std, size=size, most=most,
        limits=Limits.of(model, batch=batch, rate=rate, requests=requests, patience=patience, timeout=timeout),
    )  # fmt: skip
    _check_authorities(ca_file, checked)
    console.print(checked.estimate, markup=False, soft_wrap=True)
    _agree(checked, token, yes)
    try:
        with Display() as report:
            outcome = run(checked, token=token, authorities=ca_file, time_limit=time_limit, chunk=chunk, report=report)
    except SpentError as error:
        errors.print(
            f"stopped: {error}; what was finished is kept, run the same command with a larger --most to continue",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(STOPPED) from None
    except ChangedError:
        raise
    except EndpointError as error:
        kept = "; what was finished is kept, run the same command to continue" if read(out / LEDGER)[0] else ""
        raise EndpointError(f"{error}{kept}") from None
    finally:
        sent, asked = read(out / LEDGER)
        console.print(f"sent so far: {sent:,} images in {asked:,} requests", markup=False, highlight=False)
    finished(outcome)
    rows = page.write(out)
    results(rows, cells.subject(rows))
    _headline(out)
    console.print(f"report: {(out / 'report.html').resolve()}", markup=False, soft_wrap=True)


def _headline(out: Path) -> None:
    """Print what is left under the worst attack for each image."""
    plan, found = summary.collect(Store(out))
    at = plan.layout.at if plan.layout is not None else ()
    if left := worst.text(found, at):
        console.print(
            f"accuracy left after {' / '.join(map(str, at))} queries under the worst attack for each image, in percent "
            f"(of how many that see scores): {left}",
            style="bold", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _token(file: Path | None) -> str | None:
    """The token of the environment or a file; its text is in no error."""
    given = os.environ.pop(TOKEN, None)
    if given is not None and file is not None:
        raise ValueError(f"expected --token-file or {TOKEN}, but got both; leave one out")
    text = given if file is None else file.read_text(encoding="utf-8")
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"expected one token of ASCII characters, without spaces, in {file or TOKEN}, but it is none")
    return token


def _check_authorities(file: Path | None, audit: Audit) -> None:
    """ValueError where certificates are given that no line would use, or none that can be read."""
    if file is None:
        return
    if audit.address is None or not audit.address.encrypted:
        raise ValueError("--ca-file is for endpoints with https or grpcs; leave it out")
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:
        raise ValueError(f"expected certificates in PEM format in {file}, but {error}") from None


def _interactive() -> bool:
    return sys.stdin.isatty()


def _agree(audit: Audit, token: str | None, yes: bool) -> None:
    """Go on only with what is on this machine, or said to be the user's own."""
    where = audit.address
    if token is not None and where is None:
        raise ValueError("a token is for endpoints; a function has to bring its own, so leave it out")
    if token is not None and where is not None and not (where.encrypted or where.loopback):
        errors.print(
            f"warning: the token goes to {where.place} unencrypted, for all on the way to read", style="yellow",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    if yes or (where is not None and where.loopback):
        return
    what = f"{where}" if where is not None else f"{audit.cell.model}, wherever it sends the images,"
    if not _interactive():
        raise ValueError(
            f"{what} is not on this machine, and there is no terminal to ask whether it is yours; pass --yes if it "
            "is your own, or you may attack it"
        )
    if not typer.confirm(f"Attack only what is your own, or what you may attack. Is {what} such a one?"):
        raise ValueError("nothing was sent, as the endpoint is not yours")
