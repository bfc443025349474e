"""How the command line speaks: results, progress, and errors in a line."""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from queryfoil.chunks import Outcome, Progress
from queryfoil.cluster import ClusterError
from queryfoil.flags import pages
from queryfoil.flags.flag import Flag
from queryfoil.oracle import ModelError
from queryfoil.report import cells

console = Console()
errors = Console(stderr=True)

STOPPED = 3
"""Exit status of a run that was stopped by its time limit and can be continued."""


def plainly(command: Callable[..., Any]) -> Callable[..., Any]:
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
        except (ModelError, ClusterError) as error:
            errors.print(f"error: {error}; what was finished is kept", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            errors.print("interrupted; what was finished is kept, run the same command to continue", markup=False)
            raise typer.Exit(130) from None

    return wrapped


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    errors.print(f"warning: {message}", style="yellow", markup=False)


class Display:
    """A progress bar with the cell, queries a second and the time left; nothing when not on a terminal."""

    def __enter__(self) -> Callable[[Progress], None]:
        self.bar = Bar(
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

    def update(self, now: Progress) -> None:
        elapsed = self.bar.tasks[0].elapsed or 0.0
        rate = f"{now.queries / elapsed:,.0f}" if elapsed > 0 else "–"
        self.bar.update(self.task, description=now.label, completed=now.units, total=now.total, rate=rate)

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()


def finished(outcome: Outcome) -> None:
    """Say which files were damaged; exit with `STOPPED` if images are left."""
    for path in outcome.damaged:
        errors.print(f"computed again, as the file was damaged: {path}", markup=False, soft_wrap=True)
    if outcome.left:
        console.print(
            f"stopped at the time limit: {outcome.left:,} of {outcome.total:,} images are still to be attacked; "
            "run the same command to continue",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(STOPPED)


def results(rows: list[cells.Row], kind: str) -> None:
    """Print the table of results and what was run; `kind` says what the rows are."""
    columns = cells.columns(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 1, 0), pad_edge=False)
    table.add_column(kind, min_width=10, overflow="fold")
    for column in columns:
        table.add_column(column.heading, justify="right", overflow="fold")
    for row in rows:
        entries = cells.entries(row, cells.points(rows))
        table.add_row(escape(row["label"]), *(_stacked(entry) for entry in entries))
    console.print(table)
    console.print("small print: 95 % interval and number of images", style="dim")
    for line in dict.fromkeys(cells.setting(row) for row in rows):
        console.print(line, style="dim", markup=False)


def flags(found: list[Flag]) -> None:
    """Print a table of flags, and how many are raised."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("", "flag", "", "measured"):
        table.add_column(heading, overflow="fold")
    styles = {"verdict": "red", "property": "yellow"}
    for flag in found:
        status = f"[{styles[flag.kind]}]{flag.kind}[/]" if flag.raised else f"[dim]{flag.status}[/dim]"
        text = f"missing: {flag.missing}" if flag.missing else flag.measured
        table.add_row(flag.id, flag.name, status, escape(text))
    console.print(table)
    console.print(f"{pages.counts(found)}; docs/flags.md explains them", markup=False, soft_wrap=True)


def _stacked(entry: cells.Entry) -> str:
    """The value above its small print, narrow enough for a terminal of 80 columns."""
    return "\n".join([entry.value, *(f"[dim]{part}[/dim]" for part in re.split("[,;] ", entry.detail) if part)])
