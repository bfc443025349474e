"""The figures of a report, as SVG text that follows the page's colours, light or dark."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from queryfoil import metrics, table
from queryfoil.summary import CellResult

WIDTH = 4.2  # inches: a phone's width at the text size of the page
INK, GRID = "#010203", "#040506"  # stand-ins, replaced by the page's own colours
COLOURS = ("#8c8c8c", "#3b8ad0", "#e08214", "#2a9d6f", "#b05fc0", "#d1495b", "#a08a2a", "#4aa8a8")
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
    "svg.hashsalt": "queryfoil",  # the same figure gives the same file
    "figure.constrained_layout.use": True,
}


class Picture(NamedTuple):
    """A figure with its title and a caption that says what to see."""

    title: str
    svg: str
    caption: str


def _draw(plot: Callable[[Figure], None], height: float) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        plot(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--grid)")
    return svg.replace("<svg ", '<svg role="img" ', 1)


def _with_legend(results: list[CellResult]) -> float:
    """Height of a figure with a line of legend for each cell."""
    return 2.95 + 0.19 * len(results)


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[(i + i // len(COLOURS)) % len(STYLES)]}


def accuracy_over_queries(results: list[CellResult]) -> Picture:
    """Accuracy left after each number of queries, with the 95 % band of the final one."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for i, r in enumerate(results):
            budget = r.cell.budget
            curve = metrics.success_curve(table.fooled_at(r.attacked), budget)
            axes.plot(np.arange(1, budget + 1), 100 * curve, label=r.label, lw=1.6, **_look(i))
        axes.set(xlabel="queries", ylabel="accuracy left (%)", ylim=(0, 100), xscale="log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        figure.legend(loc="outside lower center", ncols=1)

    caption = (
        "Share of all images that are still answered correctly after so many queries, of which the first is the "
        "clean image. A curve that goes flat means that the attack is stuck, not that no adversarial "
        "example exists."
    )
    return Picture("Accuracy over queries", _draw(plot, _with_legend(results)), caption)


def losses_along_an_attack(result: CellResult, image: int) -> Picture:
    """The loss shown to the attacker against the true one on one image (the paper's figure 2), on two paths."""
    trace = result.trace.filter(np.asarray(result.trace.column("id")) == image).to_pydict()
    paths = [p for p in ("undefended", "defended") if p in trace["path"]]

    def plot(figure: Figure) -> None:
        all_axes = np.atleast_1d(figure.subplots(len(paths), 1))
        for path, axes in zip(paths, all_axes, strict=True):
            rows = [i for i, p in enumerate(trace["path"]) if p == path]
            query, true, shown = (
                np.array([trace[c][i] for i in rows]) for c in ("query", "true_margin", "shown_margin")
            )
            current = _current(true if path == "undefended" else shown)
            axes.axhline(0, lw=0.8, color=INK)
            axes.step(query, true[current], where="post", label="true margin", lw=1.5, color=COLOURS[1])
            axes.step(query, shown[current], where="post", label="margin shown", lw=1.5, color=COLOURS[2])
            name = "the undefended network" if path == "undefended" else "the defended model"
            axes.set(title=f"an attack on {name}", xlabel="queries", ylabel="margin")
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)

    caption = (
        f"Image {image}, at the current point of the attack with the margin loss. Above, the attack sees the true "
        "margin and drives it to zero; the defense would have shown it the mirrored line. Below, it sees only what "
        "the defense shows and follows that down, while the true margin stays up. The label flips where a line "
        "crosses zero."
    )
    return Picture(f"Losses along an attack: {result.label}", _draw(plot, 4.8), caption)


def _current(loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the greedy attacker's current point at each query: the start is query 2, then any strict fall."""
    best = np.zeros(len(loss), dtype=np.int64)
    for i in range(1, len(loss)):
        best[i] = i if i == 1 or loss[i] < loss[best[i - 1]] else best[i - 1]
    return best


def reliability(results: list[CellResult]) -> Picture:
    """Accuracy against confidence in 15 bins, one diagram a cell."""
    rows = (len(results) + 1) // 2

    def plot(figure: Figure) -> None:
        all_axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
        for i, (r, axes) in enumerate(zip(results, all_axes, strict=False)):
            bins = metrics.reliability(*_shown(r))
            edges = np.arange(15) / 15
            axes.plot([0, 100], [0, 100], lw=0.8, color=INK)
            height = 100 * np.nan_to_num(bins.accuracy)
            axes.bar(100 * edges, height, width=100 / 15, align="edge", color=COLOURS[i % len(COLOURS)], alpha=0.55)
            axes.plot(100 * bins.confidence, 100 * bins.accuracy, "o", ms=3, color=COLOURS[i % len(COLOURS)])
            axes.set_title(_wrapped(r.label), fontsize=8)
        for axes in all_axes[len(results) :]:
            axes.set_visible(False)
        figure.supxlabel("confidence (%)", fontsize=9)
        figure.supylabel("accuracy (%)", fontsize=9)

    caption = (
        f"Calibration on {len(results[0].clean)} images that nothing was fitted on: accuracy of the answers in each "
        "bin of confidence. On the diagonal the scores say what they mean; dots below it are over-confident."
    )
    return Picture("Reliability", _draw(plot, 1.75 * rows + 0.5), caption)


def scores_by_bin(results: list[CellResult], bins: int = 25) -> Picture:
    """Confidence and accuracy by bins of the undefended true-class probability (the paper's figure 3, left)."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for i, r in enumerate(results):
            probs, labels = _shown(r)
            raw = metrics.probabilities(table.scores(r.clean, "undefended_scores"), "logits")
            order = np.argsort(raw[np.arange(len(labels)), labels], kind="stable")
            parts = np.array_split(order, bins)
            confidence = [100 * probs[part].max(1).mean() for part in parts]
            hit = [100 * (probs[part].argmax(1) == labels[part]).mean() for part in parts]
            axes.plot(confidence, lw=1.5, label=r.label, color=COLOURS[i % len(COLOURS)])
            axes.plot(hit, lw=1.0, ls=":", color=COLOURS[i % len(COLOURS)])
        axes.set(xlabel=f"bin of images, hardest first ({bins} bins)", ylabel="%", ylim=(0, 103))
        figure.legend(loc="outside lower center", ncols=1)

    caption = (
        "Images sorted by the probability that the undefended network gives their true class. Solid: confidence "
        "shown; dotted: accuracy. The nearer a solid line is to the grey one, the less a user sees of the defense; "
        "dotted lines that coincide mean that no answer has changed."
    )
    return Picture("Scores before and after", _draw(plot, _with_legend(results)), caption)


def _shown(r: CellResult) -> tuple[metrics.Floats, NDArray[np.int64]]:
    probs = metrics.probabilities(table.scores(r.clean, "scores"), "logits")
    return probs, np.asarray(r.clean.column("label"))


def _wrapped(label: str) -> str:
    return label.replace(", ", ",\n", 1) if len(label) > 22 else label


def all_of(results: list[CellResult]) -> list[Picture]:
    """The figures of a report: of losses along an attack, one for each cell in which AAA meets a greedy search."""
    models: dict[Any, CellResult] = {}
    for r in results:
        models.setdefault((r.cell.dataset, r.cell.model, r.cell.defenses), r)
    shown = list(models.values())  # scores do not depend on the attack
    misled = [r for r in results if any(d.name == "aaa" for d in r.cell.defenses)]
    return [
        accuracy_over_queries(results),
        *(losses_along_an_attack(r, image) for r in misled for image in table.traced(r.trace)[: r.cell.trace]),
        scores_by_bin(shown),
        reliability(shown),
    ]
