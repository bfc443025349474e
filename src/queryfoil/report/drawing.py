"""How the figures of a report are drawn: one style, as SVG that follows the page's colours, or as PNG for print."""

import functools
import html
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 4.2  # inches: a phone's width at the text size of the page
INK, GRID = "#010203", "#d4d5d6"  # stand-ins in SVG, replaced by the page's own colours
COLOURS = ("#8c8c8c", "#3b8ad0", "#e08214", "#2a9d6f", "#b05fc0", "#d1495b", "#a08a2a", "#4aa8a8")
MARKERS = "os^Dv"
STYLES = ("-", "-", "-", "--", ":", "-.", "--", ":")
STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Picture:
    """A figure with its title and a caption that says what to see; `plot` draws it, `height` is in inches.

    `notes` are texts to be seen on pointing at a part of it on the page, by the part's `gid`. `others` show the same in
    another way; the page shows one of them at a time, and calls each by its `choice`.
    """

    title: str
    caption: str
    plot: Callable[[Figure], None]
    height: float
    notes: Mapping[str, str] = field(default_factory=dict)
    choice: str = ""
    others: tuple["Picture", ...] = ()

    @functools.cached_property
    def svg(self) -> str:
        """SVG text in the page's colours, light or dark."""
        svg = self._saved("svg").decode()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--grid)")
        for part, note in self.notes.items():
            svg = svg.replace(f'<g id="{part}">', f'<g id="{part}"><title>{html.escape(note)}</title>', 1)
        return svg.replace("<svg ", '<svg role="img" ', 1)

    def files(self) -> dict[str, bytes]:
        """The same and the others for other documents: file name to content, vector and bitmap, dark on white."""
        name = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        own = {f"{name}.{kind}": self._saved(kind) for kind in ("svg", "png")}
        return own | {name: content for other in self.others for name, content in other.files().items()}

    def _saved(self, kind: str) -> bytes:
        # the same figure gives the same file, and no two on a page the same names of parts: a hidden one's draw nothing
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"queryfoil {self.title}"}):
            figure = Figure(figsize=(WIDTH, self.height))
            (FigureCanvasSVG if kind == "svg" else FigureCanvasAgg)(figure)
            self.plot(figure)
            buffer = io.BytesIO()
            metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            figure.savefig(buffer, format=kind, transparent=kind == "svg", metadata=metadata, dpi=144)
        return buffer.getvalue()


def with_legend(lines: int) -> float:
    """Height of a figure with a line of legend for each of its lines."""
    return 2.95 + 0.19 * lines


def look(i: int) -> dict[str, Any]:
    """Colour and style of line number i."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[(i + i // len(COLOURS)) % len(STYLES)]}
