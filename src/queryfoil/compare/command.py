"""The command `queryfoil compare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from queryfoil.compare import comparison, page, words
from queryfoil.compare.comparison import Comparison
from queryfoil.compare.measures import Measure
from queryfoil.terminal import console, errors, plainly

MOST = 12
"""Cells that are printed whole; of more, what is beyond noise."""


@plainly
def command(
    a: Annotated[Path, typer.Argument(metavar="DIR_A", help="A finished folder of `queryfoil bench` or `attack`.")],
    b: Annotated[Path, typer.Argument(metavar="DIR_B", help="Another one, or the same with --pair.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for compare.json, compare.md and compare.html; only printed if left out."),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL_A=LABEL_B", help="Compare these cells, in place of those with the same label; repeat."
        ),
    ] = None,
) -> None:
    """Show two runs side by side: each figure of A and B, and the difference with a paired 95 % interval.

    Cells are matched by label, images by id. Says what else differs: settings, fits, code, versions.
    """
    with Progress(console=errors, disable=not errors.is_terminal, transient=True) as bar:
        task = bar.add_task("comparing", total=None)
        found = comparison.compare(a, b, pair or (), lambda done, of: bar.update(task, completed=done, total=of))
    show(found)
    if out is not None:
        page.write(found, out)
        console.print(f"page: {(out / 'compare.html').resolve()}", markup=False, soft_wrap=True)


def show(c: Comparison) -> None:
    """Print a comparison: each cell with its figures, what was not compared, and the result in a sentence."""
    if not c.same:
        few = len(c.pairs) <= MOST
        for p in c.pairs:
            lines = [m for m in p.measures if few or words.mark(m)]
            if lines:
                console.print(f"[bold]{escape(p.label)}[/bold]", highlight=False, soft_wrap=True)
                for line in words.about(p, c.everywhere):
                    console.print(line, style="dim", markup=False, highlight=False)
                console.print(_table(lines))
        console.print(words.READ, style="dim", markup=False, highlight=False)
        if not few:
            console.print(f"{len(c.pairs)} cells: only what is beyond noise is printed; --out writes all", markup=False)
    console.print(words.heading(c), markup=False, highlight=False, soft_wrap=True)
    if c.everywhere:
        line = f"in every cell, A / B differ in {'; '.join(c.everywhere)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in words.remainder(c):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(words.verdict(c), markup=False, highlight=False, soft_wrap=True)


def _table(lines: list[Measure]) -> Table:
    """The figures of a pair, in 78 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", width=21)
    for heading, width in (("A", 7), ("B", 7), ("B − A (95 %)", 25)):
        table.add_column(heading, justify="right", width=width)
    table.add_column("", width=8)
    for m in lines:
        values = (words.value(m, m.a), words.value(m, m.b), words.difference(m), words.mark(m))
        table.add_row(m.name, *values, style="bold" if words.mark(m) else "")
    return table
