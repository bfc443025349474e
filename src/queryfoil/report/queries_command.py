"""What `queryfoil report --log` does."""

from datetime import datetime
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from queryfoil.deploy.watch import ATTACK, CALM, LOOK
from queryfoil.report import queries
from queryfoil.terminal import console, errors

PRINTED = 20  # clients
NAME = 60  # characters of a name that are printed; the page has them all
STYLES = {ATTACK: "red", LOOK: "yellow", CALM: "dim"}


def report(folder: Path, out: Path | None, since: datetime | None) -> None:
    """Write the page of the query log in a folder, and print the clients that stand out."""
    page = out or folder / "report.html"
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=errors, disable=not errors.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("reading", total=None)
        found = queries.write(
            folder,
            page,
            since,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    for name in found.queries.damaged:
        errors.print(f"left out, as the file cannot be read: {name}", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("client", "queries", "variants", "verdict", "evidence"):
        table.add_column(heading, justify="right" if heading in ("queries", "variants") else "left", overflow="fold")
    for line in queries.lines(found.clients[:PRINTED]):
        verdict = f"[{STYLES[line.level]}]{line.verdict}[/]"
        table.add_row(escape(plain(line.name)), line.queries, line.largest, verdict, escape(line.evidence))
    console.print(table)
    if len(found.clients) > PRINTED:
        console.print(f"and {len(found.clients) - PRINTED:,} more, none more suspicious", style="dim")
    console.print(queries.headline(found), markup=False, soft_wrap=True)
    console.print(f"report: {page.resolve()}", markup=False, soft_wrap=True)


def plain(name: str) -> str:
    """A client's name as a terminal may have it: short, and no character that moves or colours what is printed.

    >>> plain("shop\x1b[31m"), plain("a" * 80) == "a" * 60 + "..."
    ('shop?[31m', True)
    """
    seen = "".join(c if c.isprintable() else "?" for c in name[: NAME + 1])
    return seen if len(seen) <= NAME else f"{seen[:NAME]}..."
