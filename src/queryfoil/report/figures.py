"""The figures of a report, each in the form of the paper's."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from queryfoil import metrics, table
from queryfoil.plan import Plan
from queryfoil.report import frontier, sheets
from queryfoil.report.drawing import COLOURS, INK, Picture, look, with_legend
from queryfoil.summary import CellResult

SWEPT = ("tau", "alpha", "beta")
"""Axes with settings of AAA that a sweep shows."""


def accuracy_over_queries(results: Sequence[CellResult], labels: Sequence[str], of: str = "") -> Picture:
    """Accuracy left after each number of queries (the paper's figures 3, right, and 5)."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (r, label) in enumerate(zip(results, labels, strict=True)):
            budget = r.cell.budget
            curve = metrics.success_curve(table.fooled_at(r.attacked), budget)
            axes.plot(np.arange(1, budget + 1), 100 * curve, label=label, lw=1.6, **look(i))
        axes.set(xlabel="queries", ylabel="accuracy left (%)", ylim=(0, 100), xscale="log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        figure.legend(loc="outside lower center", ncols=1)

    caption = (
        "Share of all images that are still answered correctly after so many queries, of which the first is the "
        "clean image. A curve that goes flat means that the attack is stuck, not that no adversarial "
        "example exists."
    )
    title = "Accuracy over queries" + (f": {of}" if of else "")
    return Picture(title, caption, plot, with_legend(len(results)))


def losses_along_an_attack(result: CellResult, image: int) -> Picture:
    """The loss shown to the attacker against the true one on one image (figures 2, 6 and 7), on two paths."""
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
        "crosses zero. The image is one that survives the attack, where any does."
    )
    return Picture(f"Losses along an attack: {result.label}, image {image}", caption, plot, 4.8)


def _current(loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the greedy attacker's current point at each query: the start is query 2, then any strict fall."""
    best = np.zeros(len(loss), dtype=np.int64)
    for i in range(1, len(loss)):
        best[i] = i if i == 1 or loss[i] < loss[best[i - 1]] else best[i - 1]
    return best


def reliability(results: Sequence[CellResult]) -> Picture:
    """Accuracy against confidence in 15 bins, one diagram a cell."""
    rows = (len(results) + 1) // 2

    def plot(figure: Figure) -> None:
        all_axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
        for i, (r, axes) in enumerate(zip(results, all_axes, strict=False)):
            bins = metrics.reliability(*sheets.shown(r))
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
    return Picture("Reliability", caption, plot, 1.75 * rows + 0.5)


def scores_by_bin(results: Sequence[CellResult], labels: Sequence[str], bins: int = 25) -> Picture:
    """Confidence and accuracy by bins of the undefended true-class probability (the paper's figure 3, left)."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        first = sheets.undefended(results[0])
        right = np.asarray(results[0].clean.column("label"))
        order = np.argsort(first[np.arange(len(right)), right], kind="stable")
        for i, (r, label) in enumerate(zip(results, labels, strict=True)):
            probs, y = sheets.shown(r)
            parts = np.array_split(order, bins)
            confidence = [100 * probs[part].max(1).mean() for part in parts]
            hit = [100 * (probs[part].argmax(1) == y[part]).mean() for part in parts]
            axes.plot(confidence, lw=1.5, label=label, color=COLOURS[i % len(COLOURS)])
            axes.plot(hit, lw=1.0, ls=":", color=COLOURS[i % len(COLOURS)])
        axes.set(xlabel=f"bin of images, hardest first ({bins} bins)", ylabel="%", ylim=(0, 103))
        figure.legend(loc="outside lower center", ncols=1)

    caption = (
        "Images sorted by the probability that the undefended network gives their true class. Solid: confidence "
        "shown; dotted: accuracy. The nearer a solid line is to the grey one, the less a user sees of the defense; "
        "dotted lines that coincide mean that no answer has changed."
    )
    return Picture("Scores before and after", caption, plot, with_legend(len(results)))


def margins_shown(results: Sequence[CellResult], labels: Sequence[str]) -> Picture:
    """The margin shown over the true one (the paper's figure 1 b), as targeted and as the solver reached it."""

    def plot(figure: Figure) -> None:
        all_axes = figure.subplots(len(results), 1, sharex=True, squeeze=False).ravel()
        for i, (r, label, axes) in enumerate(zip(results, labels, all_axes, strict=True)):
            true, seen = (_margins(table.scores(r.clean, name)) for name in ("undefended_scores", "scores"))
            grid = np.linspace(0, float(np.quantile(true, 0.99)), 1000, dtype=np.float64)
            axes.plot(grid, grid, lw=0.8, color=INK)
            target = _target(r, grid)
            if target is not None:
                axes.plot(grid, target, lw=1.0, color=COLOURS[0], label="target")
            axes.plot(true, seen, ".", ms=2, color=COLOURS[1 + i % 7], label="reached")
            axes.set(title=label, ylabel="margin shown", xlim=(0, grid[-1]), ylim=(0, grid[-1] * 1.2))
        all_axes[-1].set_xlabel("true margin")
        handles, names = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)

    caption = (
        "Each dot is an image that nothing was fitted on. Grey: the curve that AAA aims at (the paper's eq. 5); black: "
        "no defense. Where calibration wins, at small margins, the dots leave the curve."
    )
    return Picture("Margins shown", caption, plot, 1.7 * len(results) + 0.6)


def _margins(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    top = np.partition(scores, -2, axis=1)[:, -2:]
    return np.asarray(top[:, 1] - top[:, 0])


def _target(r: CellResult, margin: metrics.Floats) -> metrics.Floats | None:
    """The paper's eq. 5 at these margins, for the cell's AAA."""
    found = next((d for d in sheets.fitted(r) if d["name"] == "aaa"), None)
    if found is None:
        return None
    tau, alpha = found["tau"], found["alpha"]
    attractor = (np.floor(margin / tau) + 0.5) * tau
    if found["curve"] == "linear":
        return np.asarray(attractor - alpha * (margin - attractor))
    return np.asarray(margin - alpha * tau * np.sin(np.pi * (1 - 2 * (margin - attractor) / tau)))


def sweep(axis: str, results: Sequence[CellResult]) -> Picture:
    """Accuracy, ECE and temperature over one setting of AAA (the paper's figure 4)."""
    values = [float(r.cell.place[axis]) for r in results]
    left = {
        "accuracy": [_accuracy(r) for r in results],
        f"accuracy left at {results[0].cell.budget}": [
            100 * metrics.accuracy_at(table.fooled_at(r.attacked), r.cell.budget) for r in results
        ],
    }
    right = {
        "ECE": [100 * metrics.ece(*sheets.shown(r)) for r in results],
        "temperature x 5": [5 * sheets.fitted(r)[-1]["temperature"] for r in results],
    }
    undefended = 100 * metrics.ece(sheets.undefended(results[0]), sheets.shown(results[0])[1])

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        other = axes.twinx()
        for i, (name, y) in enumerate(left.items()):
            axes.plot(values, y, "o-", ms=3, label=name, color=COLOURS[1 + i])
        for i, (name, y) in enumerate(right.items()):
            other.plot(values, y, "s--", ms=3, label=f"{name} (right)", color=COLOURS[3 + i])
        other.axhline(undefended, lw=0.9, ls=":", color=COLOURS[3], label="ECE undefended (right)")
        other.grid(visible=False)
        axes.set(xlabel=axis, ylabel="%", ylim=(0, 100))
        other.set(ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=1)

    caption = (
        f"AAA-linear with other values of {axis}, the temperature fitted anew for each. A larger tau or alpha, or a "
        "smaller beta, puts defense before calibration."
    )
    return Picture(f"Sweep of {axis}", caption, plot, with_legend(5))


def _accuracy(r: CellResult) -> float:
    probs, labels = sheets.shown(r)
    return float(100 * (probs.argmax(1) == labels).mean())


def _wrapped(label: str) -> str:
    return label.replace(", ", ",\n", 1) if len(label) > 22 else label


def all_of(plan: Plan, results: Sequence[CellResult]) -> list[Picture]:
    """The figures of a report: those that the plan's layout asks for; without one, all that make sense for any plan."""
    traced = [losses_along_an_attack(r, image) for r in results for image in table.traced(r.trace)[: r.cell.trace]]
    if plan.layout is None:
        shown = _one_of_each_model(results)  # scores do not depend on the attack
        labels = [r.label for r in shown]
        curves = accuracy_over_queries(results, [r.label for r in results])
        return [curves, *traced, scores_by_bin(shown, labels), reliability(shown)]
    pictures: list[Picture] = []
    for kind in plan.layout.figures:
        pictures += traced if kind == "losses" else _of_layout(plan, results, kind)
    return pictures


def _of_layout(plan: Plan, results: Sequence[CellResult], kind: str) -> list[Picture]:
    assert plan.layout is not None
    axis = plan.layout.columns
    if kind == "sweep":
        axes = dict.fromkeys(name for r in results for name in r.cell.place if name in SWEPT)
        return [sweep(name, [r for r in results if name in r.cell.place]) for name in axes]
    if kind == "frontier":
        *early, last = plan.layout.at
        return [
            frontier.frontier(frontier.points(cells, q), q, ", ".join(group if q == last else (*group, f"{q} queries")))
            for group, cells in sheets.groups(results, plan.layout.users or (), axis).items()
            for q in (last, *early)
        ]
    if kind in ("scores", "curves"):
        shown = _one_of_each_model(results)
        labels = [r.cell.place[axis] for r in shown]
        return [scores_by_bin(shown, labels) if kind == "scores" else margins_shown(shown, labels)]
    rows: dict[str, list[CellResult]] = {}
    for r in results:
        rows.setdefault(sheets.row_label(plan.layout, r), []).append(r)
    if len({r.cell.place[axis] for r in results}) == 1:  # one column: all its rows in one figure
        return [accuracy_over_queries([row[0] for row in rows.values()], list(rows))]
    return [
        accuracy_over_queries(row, [r.cell.place[axis] for r in row], label) for label, row in rows.items() if row[1:]
    ]


def _one_of_each_model(results: Sequence[CellResult]) -> list[CellResult]:
    models: dict[object, CellResult] = {}
    for r in results:
        models.setdefault((r.cell.dataset, r.cell.model, r.cell.defenses), r)
    return list(models.values())
