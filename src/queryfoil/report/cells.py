"""The results table as text: which columns there are, and how a number is written."""

from typing import Any, NamedTuple

from queryfoil.metrics import Interval, wilson

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
    """A share as percent with three digits: 0.6067 as "60.7 %", 0.0123 as "1.23 %"."""
    return f"{100 * share:.{1 if abs(share) >= 0.0995 else 2}f} %"


def points(rows: list[Row]) -> list[int]:
    """At how many queries accuracy is shown: all that any row has, budgets included."""
    return sorted({int(q) for row in rows for q in row["accuracy"]})


def columns(rows: list[Row]) -> list[Column]:
    """The columns of a table with these rows, calibration among them where it was measured."""
    meaning = "share of all images whose attack has not reached its goal within {} queries (untargeted: still answered "
    meaning += (
        "correctly); for randomized defenses, at the budget, also the share of successes that repeat on 10 queries"
    )
    found = [
        Column("clean accuracy", "on the attacked images, before any attack"),
        *(Column(f"accuracy at {q}", meaning.format(q)) for q in points(rows)),
        Column("average queries", "over initially correct images, survivors counted with the budget"),
    ]
    if "ece" not in rows[0]:
        return found
    if all(row["labels_changed"] is None for row in rows):  # nobody knows the undefended network
        return [*found, Column("ECE", "expected calibration error (15 bins), on the attacked images before any attack")]
    return [
        *found,
        Column("ECE", "expected calibration error (15 bins) on images that nothing was fitted on; below, its change"),
        Column("labels changed", "answers that differ from the undefended network's, on the same images"),
    ]


def entries(row: Row, at: list[int]) -> list[Entry]:
    """The row's cells, one for each of `columns`; `at` are the table's `points`."""
    found = [
        _share(row["clean_accuracy"], row["clean_accuracy_interval"], row["n"]),
        *(_accuracy(row, str(q)) for q in at),
        _queries(row, str(row["budget"])),
    ]
    if "ece" not in row:
        return found
    unseen, changed = row["unseen_n"], row["labels_changed"]
    ece = f"{_interval(row['ece_interval'])}, n = {unseen}"
    if row["defenses"]:
        ece += f"; change {100 * row['ece_change']:+.2f} ({_interval(row['ece_change_interval'])})"
    if changed is None:
        return [*found, Entry(percent(row["ece"]), ece)]
    return [
        *found,
        Entry(percent(row["ece"]), ece),
        Entry(str(changed), f"{_interval(wilson(changed, unseen))} %, n = {unseen}"),
    ]


def _accuracy(row: Row, q: str) -> Entry:
    if q not in row["accuracy"]:
        return Entry("–", "")
    value, detail = _share(row["accuracy"][q], row["accuracy_interval"][q], row["n"])
    if row["confirmed"] is not None and q == str(row["budget"]):
        detail += f"; {percent(row['confirmed'])} repeat ({_interval(row['confirmed_interval'])})"
    return Entry(value, detail)


def _queries(row: Row, budget: str) -> Entry:
    queries, interval = row["average_queries"][budget], row["average_queries_interval"][budget]
    successes = row["average_queries_of_successes"][budget]
    if queries is None:
        return Entry("–", "no image was correct")
    correct = round(row["clean_accuracy"] * row["n"])
    detail = f"{interval[0]:.0f}–{interval[1]:.0f}, n = {correct}"
    if successes is not None:
        low, high = row["average_queries_of_successes_interval"][budget]
        fooled = round((row["clean_accuracy"] - row["accuracy"][budget]) * row["n"])
        detail += f"; successes {successes:.0f} ({low:.0f}–{high:.0f}), n = {fooled}"
    return Entry(f"{queries:.0f}", detail)


def _share(value: float, interval: Interval, n: int) -> Entry:
    return Entry(percent(value), f"{_interval(interval)}, n = {n}")


def _interval(interval: Interval) -> str:
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f}" if low >= 0 else f"{100 * low:+.1f} to {100 * high:+.1f}"


def subject(rows: list[Row]) -> str:
    """What the rows of a table differ in: heading of its first column."""
    return "defense" if len({row["attack"] for row in rows}) == 1 else "attack"


def setting(row: Row) -> str:
    """One line that says what was attacked, and how."""
    return f"{attack_setting(row)}, {row['model']} on {row['dataset']}, seed {row['seed']}, n = {row['n']}"


def _short(value: Any) -> str:
    """A hyper-parameter as it is, but the start of a text that is long (of weights)."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:20]}… ({len(text)} characters)"


def attack_setting(row: Row) -> str:
    """One line that says how something was attacked."""
    goal = "targeted" if row["targeted"] else "untargeted"
    norm = {"linf": "L-inf", "l2": "L2"}[row["norm"]]
    eps = f"{row['eps'] * 255:g}/255" if row["norm"] == "linf" else f"{row['eps']:g}"
    hyper = ", ".join(f"{k} {_short(v)}" for k, v in row["hyper"].items())
    seen = "sees labels alone" if row["loss"] is None else f"loss {row['loss']}"
    return f"{row['attack']} ({hyper}), {seen}, {goal}, {norm} eps {eps}, budget {row['budget']} queries"
