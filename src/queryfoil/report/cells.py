"""The results table as text: which columns there are, and how a number is written."""

from typing import Any, NamedTuple

from queryfoil.metrics import Interval

Row = dict[str, Any]


class Entry(NamedTuple):
    """One cell of the table: the value, and below it the 95 % interval and n."""

    value: str
    detail: str


class Column(NamedTuple):
    """A column: its heading, and what its numbers mean."""

    heading: str
    meaning: str


def percent(share: float) -> str:
    """A share as percent with one digit, two below one percent: 0.6067 as "60.7 %"."""
    return f"{100 * share:.{1 if abs(share) >= 0.0995 else 2}f} %"


def columns(row: Row) -> list[Column]:
    """The headings for rows like this one."""
    goal = "not brought to the target" if row["targeted"] else "not fooled"
    budget = str(row["budget"])
    repeat = "; for randomized defenses also the share of successes that repeat on 10 fresh queries"
    return [
        Column("clean accuracy", "on the attacked images, before any attack"),
        *(
            Column(f"accuracy at {q}", f"share of all images {goal} within {q} queries" + repeat * (q == budget))
            for q in row["accuracy"]
        ),
        Column(
            "average queries",
            f"over initially correct images, survivors counted with {row['budget']}; in brackets over successes only",
        ),
        Column("ECE", "expected calibration error (15 bins) on images that nothing was fitted on; change in brackets"),
        Column("labels changed", "answers that differ from the undefended network's, on the same images"),
    ]


def entries(row: Row) -> list[Entry]:
    """The row's cells, one for each of `columns`."""
    n, budget, unseen = row["n"], str(row["budget"]), row["unseen_n"]
    queries, successes = row["average_queries"][budget], row["average_queries_of_successes"][budget]
    correct = round(row["clean_accuracy"] * n)
    result = [
        _share(row["clean_accuracy"], row["clean_accuracy_interval"], n),
        *(_share(value, row["accuracy_interval"][q], n) for q, value in row["accuracy"].items()),
    ]
    if row["confirmed"] is not None:
        last = result.pop()
        result.append(Entry(last.value, f"{last.detail}, {percent(row['confirmed'])} repeat"))
    spent = "–" if queries is None else f"{queries:.0f}"
    spent += "" if successes is None else f" ({successes:.0f})"
    interval = row["average_queries_interval"][budget]
    result.append(Entry(spent, f"{_range(interval, '{:.0f}')}n = {correct}"))
    change = f"{100 * row['ece_change']:+.2f}" if row["defenses"] else None
    ece = percent(row["ece"]) + (f" ({change})" if change else "")
    result.append(Entry(ece, f"{_interval(row['ece_interval'])}, n = {unseen}"))
    result.append(Entry(str(row["labels_changed"]), f"of {unseen}"))
    return result


def _share(value: float, interval: Interval, n: int) -> Entry:
    return Entry(percent(value), f"{_interval(interval)}, n = {n}")


def _interval(interval: Interval) -> str:
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _range(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{form.format(interval[0])}–{form.format(interval[1])}, "


def setting(row: Row) -> str:
    """One line that says what was attacked, and how."""
    goal = "targeted" if row["targeted"] else "untargeted"
    norm = {"linf": "L-inf", "l2": "L2"}[row["norm"]]
    eps = f"{row['eps'] * 255:g}/255" if row["norm"] == "linf" else f"{row['eps']:g}"
    hyper = ", ".join(f"{k} {v}" for k, v in row["hyper"].items())
    return (
        f"{row['attack']} ({hyper}), loss {row['loss']}, {goal}, {norm} eps {eps}, budget {row['budget']} queries, "
        f"{row['model']} on {row['dataset']}, seed {row['seed']}, n = {row['n']}"
    )
