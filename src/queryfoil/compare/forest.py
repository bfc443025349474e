"""The figures of a comparison: differences with their intervals, one below the other."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from queryfoil.compare.comparison import Comparison
from queryfoil.compare.measures import Measure
from queryfoil.report.drawing import COLOURS, INK, Picture

MOST = 30
"""Lines that a figure can show."""
MARKERS = {1: ">", -1: "<", 0: "o"}


def all_of(c: Comparison) -> list[Picture]:
    """A forest for accuracy left, mean queries, ECE and AUROC, where any image differs."""
    pictures = []
    for title in ("Accuracy left", "Mean queries", "ECE", "AUROC"):
        found = []
        for pair in c.pairs:
            of_kind = [m for m in pair.measures if m.name.lower().startswith(title.lower()) and m.counts]
            if of_kind:
                found.append((pair.label, of_kind[-1]))  # of the numbers of queries, the largest
        if found:
            pictures.append(forest(title, found))
    return pictures


def forest(title: str, found: Sequence[tuple[str, Measure]]) -> Picture:
    """A line for each label: the difference and its interval, around 0."""
    kept = set(sorted(range(len(found)), key=lambda i: -abs(found[i][1].difference))[:MOST])
    shown = [line for i, line in enumerate(found) if i in kept]
    unit, scale = ("points", 100) if shown[0][1].kind == "share" else ("queries", 1)
    at = {m.name for _, m in shown}

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (label, m) in enumerate(shown):
            colour = {1: COLOURS[1], -1: COLOURS[2], 0: COLOURS[0]}[m.direction]
            d, low, high = (scale * v for v in (m.difference, m.low, m.high))
            axes.plot([0, 0], [i - 0.22, i + 0.4], lw=0.9, color=INK)  # leaves the text free
            axes.plot([low, high], [i, i], lw=1.4, color=colour, solid_capstyle="butt")
            fill = colour if m.direction else "none"
            axes.plot(d, i, MARKERS[m.direction], ms=6, color=colour, markerfacecolor=fill)
            name = label if len(at) == 1 or m.kind != "share" else f"{label}, at {m.name.rsplit(maxsplit=1)[-1]}"
            axes.annotate(
                _cut(name), (0, i), xycoords=("axes fraction", "data"), xytext=(0, 6), textcoords="offset points",
                fontsize=8,
            )  # fmt: skip
        axes.set(xlabel=f"B − A, {unit}", ylim=(len(shown) - 0.5, -0.9), yticks=[])
        axes.spines["left"].set_visible(False)

    name = next(iter(at)) if len(at) == 1 else title
    caption = (
        "B − A with its 95 % interval on the same images. A filled triangle points to the side of a difference beyond "
        "noise; a hollow dot is within it."
    )
    if len(found) > MOST:
        caption += f" Of {len(found)} cells, the {MOST} with the largest differences."
    return Picture(name[0].upper() + name[1:], caption, plot, 0.75 + 0.33 * len(shown))


def _cut(label: str, most: int = 56) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
