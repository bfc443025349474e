"""The command line: a mirror of the library, one short function a command."""

import functools
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from queryfoil import __version__, plan
from queryfoil import bench as running
from queryfoil.attacks import ATTACKS
from queryfoil.checks import lookup
from queryfoil.data import DATASETS
from queryfoil.defenses import DEFENSES
from queryfoil.defenses.calibration import fit as fit_logits
from queryfoil.models import MODELS
from queryfoil.models.zoo import card
from queryfoil.report import cells, page
from queryfoil.train import recipe, standard

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Protect a classifier's scores from score-based query attacks, and measure what that is worth.",
)
console = Console()
errors = Console(stderr=True)

DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder with the full data set (IDX files).")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
STOPPED = 3
"""Exit status of a run that was stopped by its time limit and can be continued."""


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    errors.print(f"warning: {message}", style="yellow", markup=False)


def _plainly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Show what went wrong, and warnings, in a line instead of a traceback; exit status 2 for an error."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            name = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
            errors.print(f"error: {text}{name}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            errors.print("interrupted; what was finished is kept, run the same command to continue", markup=False)
            raise typer.Exit(130) from None

    return wrapped


@app.command()
@_plainly
def bench(
    name: Annotated[
        str, typer.Argument(metavar="PLAN", help="A plan file (.toml) or a shipped plan: see `queryfoil list`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results; a folder of the same plan is continued.")],
    data: DataFolder = None,
    device: Device = "cpu",
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="Minutes after which to stop at the end of a chunk.")
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Images a chunk: what a killed run can lose. Does not change results.")
    ] = running.CHUNK,
) -> None:
    """Run a plan's attacks and write summary.json, images.parquet, report.md and report.html.

    Can be stopped at any moment and continued by the same command, with the same result.
    """
    chosen = plan.read(name)
    limit = None if time_limit is None else 60 * time_limit
    with Display() as report:
        outcome = running.bench(chosen, out, data, device, limit, chunk, report)
    for path in outcome.damaged:
        errors.print(f"computed again, as the file was damaged: {path}", markup=False, soft_wrap=True)
    if outcome.left:
        console.print(
            f"stopped at the time limit: {outcome.left:,} of {outcome.total:,} images are still to be attacked; "
            "run the same command to continue",
            markup=False,
        )
        raise typer.Exit(STOPPED)
    report_command(out)


class Display:
    """A progress bar with the cell, queries a second and the time left; nothing when not on a terminal."""

    def __enter__(self) -> Callable[[running.Progress], None]:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]} queries/s, left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=errors,
            disable=not errors.is_terminal,
        )
        self.bar.start()
        self.task = self.bar.add_task("preparing", total=None, rate="–")
        return self.update

    def update(self, now: running.Progress) -> None:
        elapsed = self.bar.tasks[0].elapsed or 0.0
        rate = f"{now.queries / elapsed:,.0f}" if elapsed > 0 else "–"
        self.bar.update(self.task, description=now.label, completed=now.units, total=now.total, rate=rate)

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()


@app.command("report")
@_plainly
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `queryfoil bench` has finished.")],
) -> None:
    """Make the report of a finished folder again, from what is stored there, and print its table."""
    rows = page.write(folder)
    columns = cells.columns(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0), pad_edge=False)
    table.add_column("defense", min_width=10, overflow="fold")
    for column in columns:
        table.add_column(column.heading, justify="right", overflow="fold")
    for row in rows:
        entries = cells.entries(row, cells.points(rows))
        table.add_row(escape(row["label"]), *(_stacked(entry) for entry in entries))
    console.print(table)
    console.print("small print: 95 % interval and number of images", style="dim")
    for line in dict.fromkeys(cells.setting(row) for row in rows):
        console.print(line, style="dim", markup=False)
    console.print(f"report: {(folder / 'report.html').resolve()}", markup=False, soft_wrap=True)


def _stacked(entry: cells.Entry) -> str:
    """The value above its small print, narrow enough for a terminal of 80 columns."""
    return "\n".join([entry.value, *(f"[dim]{part}[/dim]" for part in re.split("[,;] ", entry.detail) if part)])


@app.command()
@_plainly
def train(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file (.toml) or a shipped recipe: see `queryfoil list`.")
    ],
    data: Annotated[Path, typer.Option(help="Folder with the full data set (IDX files).")],
    out: Annotated[Path, typer.Option(help="Folder for the weights (safetensors) and their card (JSON).")],
    device: Device = "cpu",
) -> None:
    """Train a network by a recipe; a killed run continues after its last finished epoch."""
    chosen = recipe.read(name)

    def report(epoch: standard.Epoch) -> None:
        bar.update(task, completed=epoch.epoch)
        if not errors.is_terminal:
            console.print(
                f"epoch {epoch.epoch}/{epoch.epochs}: loss {epoch.loss:.4f}, test accuracy {epoch.accuracy:.4f}"
            )

    with Progress(
        TextColumn(chosen.name), BarColumn(), MofNCompleteColumn(), TextColumn("epochs, left"), TimeRemainingColumn(),
        console=errors, disable=not errors.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=chosen.epochs)
        card = standard.train(chosen, data, out, device, report)
    console.print(
        f"{out / chosen.name}.safetensors: test accuracy {card['test_accuracy']:.4f}, ECE {card['test_ece']:.4f}"
    )


@app.command()
@_plainly
def fit(
    logits: Annotated[
        Path, typer.Argument(help="A NumPy file (.npz) with arrays `logits` (N, K) and `labels` (N,), held out.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write; `Fit.load` and `AAA.from_fit` read it.")],
    curve: Annotated[str, typer.Option(help="linear or sine.")] = "linear",
    tau: Annotated[float | None, typer.Option(help="Period in units of logits; found if left out.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Reverse step; the paper's if left out.")] = None,
    beta: Annotated[float, typer.Option(help="Weight of calibration.")] = 5.0,
) -> None:
    """Fit AAA to a model's held-out logits: temperature, and tau if it is left out."""
    values, labels = _held_out(logits)
    found = fit_logits(values, labels, curve=curve, tau=tau, alpha=alpha, beta=beta)
    found.save(out)
    console.print(
        f"{out}: tau {found.tau:g}, temperature {found.temperature:g}; "
        f"ECE {cells.percent(found.ece_undefended)} undefended, "
        f"{cells.percent(found.ece_cross_fitted)} behind AAA (cross-fitted, n = {found.n})",
        markup=False,
        soft_wrap=True,
    )


def _held_out(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"expected a NumPy file (.npz) at {path}, but there is none")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected a NumPy file (.npz) written by numpy.savez, but {path} is none, or is damaged")
    with np.load(path, allow_pickle=False) as arrays:
        for name in ("logits", "labels"):
            lookup(dict.fromkeys(arrays.files), name, f"array in {path}")
        try:
            return torch.from_numpy(arrays["logits"]), torch.from_numpy(arrays["labels"])
        except (TypeError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"expected numbers in the arrays of {path}, but got others: {error}") from None


@app.command("list")
@_plainly
def list_command() -> None:
    """Show every attack, defense, model, data set, recipe and plan, with a line each."""
    groups: dict[str, dict[str, str]] = {
        "attacks": {k: _first_line(v) for k, v in ATTACKS.items()},
        "defenses": {k: _first_line(v) for k, v in DEFENSES.items()},
        "models": {k: f"{_first_line(v)} {cells.percent(card(k)['test_accuracy'])} right" for k, v in MODELS.items()},
        "data sets": DATASETS,
        "recipes": {p.stem: recipe.read(p.stem).dataset for p in sorted(recipe.SHIPPED.glob("*.toml"))},
        "plans": {k: plan.read(k).about for k in plan.shipped()},
    }
    for kind, entries in groups.items():
        table = Table(title=kind, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, about in entries.items():
            table.add_row(name, about)
        console.print(table, "")


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit()


if __name__ == "__main__":
    sys.exit(app())
