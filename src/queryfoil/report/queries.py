"""The page of a query log: which clients look like attackers, and what they were shown on their way."""

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from queryfoil import __version__, files
from queryfoil.deploy.grouping import Queries, Step, read
from queryfoil.deploy.watch import ATTACK, CALM, LEVELS, LOOK, PART, Client, Rules, Sequence, Watched, watch
from queryfoil.page import page
from queryfoil.report.drawing import COLOURS, Picture

SHOWN = 200  # clients in the table, sequences of several clients
DRAWN = 12  # clients and sequences with a figure
DOTS = 800  # in a figure, of each kind


@dataclass(frozen=True)
class Line:
    """A client as the table shows it."""

    name: str
    level: int
    verdict: str
    queries: str
    images: str
    near: str
    largest: str
    evidence: str


def write(folder: str | Path, out: str | Path, since: datetime | None = None, step: Step = lambda *_: None) -> Watched:
    """Read and judge the query log in a folder and write its page; gives what was found. Errors as `grouping.read`."""
    found = watch(read(folder, since, step), step=step)
    files.write_text(Path(out), html(found))
    return found


def html(found: Watched) -> str:
    """One page with everything inside: no script, no network. Names of clients are escaped."""
    shown = lines(found.clients[:SHOWN])
    suspects = [client for client in found.clients if client.level > CALM]
    drawn = [(client.name, client.level, client.largest) for client in suspects if client.largest][:DRAWN]
    return page(
        "report/queries.html.j2",
        headline=headline(found),
        facts=_facts(found),
        suspicious=[line for line in shown if line.level > CALM],
        calm=[line for line in shown if line.level == CALM],
        left_out=max(len(found.clients) - SHOWN, 0),
        pictures=[(name, LEVELS[level], _picture(found.queries, sequence)) for name, level, sequence in drawn],
        undrawn=len(suspects) - len(drawn),
        shared=[
            (names, LEVELS[sequence.level], sequence.about(), _picture(found.queries, sequence))
            for sequence, names in found.shared[:DRAWN]
        ],
        shared_left_out=max(len(found.shared) - DRAWN, 0),
        rules=rules(found.rules),
        damaged=found.queries.damaged,
        version=__version__,
    )


def headline(found: Watched) -> str:
    """The result in a sentence."""
    attackers, look = found.count(ATTACK), found.count(LOOK)
    of = f"{len(found.clients):,} client{'s' if len(found.clients) > 1 else ''}"
    looks, are = "looks" if attackers == 1 else "look", "is" if look == 1 else "are"
    return f"{attackers:,} of {of} {looks} like an attack, {look:,} {are} to look at."


def lines(clients: list[Client]) -> list[Line]:
    """A line of the table for each client."""
    return [_line(client) for client in clients]


def _line(client: Client) -> Line:
    since = [f"From its query {client.since:,} on"] if client.since else []
    return Line(
        name=client.name,
        level=client.level,
        verdict=LEVELS[client.level],
        queries=f"{client.queries:,}",
        images=f"{client.images:,}",
        near=f"{100 * client.near / client.images:.0f} %",
        largest=f"{client.largest.variants:,}" if client.largest else "–",
        evidence=". ".join(text[0].upper() + text[1:] for text in (*client.evidence, *since)),
    )


def rules(chosen: Rules) -> list[tuple[str, str]]:
    """The thresholds in words, by what they lead to."""
    return [
        (
            LEVELS[ATTACK],
            f"{chosen.walk} variants of one image or more, while the shown margin falls (1 + margin to a "
            f"{'half' if chosen.fall == 2 else f'1/{chosen.fall:g}'} of what it was) or the top class changes at "
            f"{100 * chosen.flips:.0f} % of the queries; or {chosen.walks} sequences of {chosen.short} variants or "
            "more whose margin falls or whose top class is another at the end, if they are half of such sequences.",
        ),
        (LEVELS[LOOK], f"{chosen.search} variants of one image or more, without such a walk."),
        (
            "several clients",
            f"sequences to which each adds {PART} variants or more, by the same numbers; who is suspicious alone does "
            "not count for the others.",
        ),
    ]


def _facts(found: Watched) -> list[tuple[str, str]]:
    queries = found.queries
    first, last = (str(moment.astype("datetime64[s]")).replace("T", " ") for moment in queries.time[[0, -1]])
    facts = [
        ("from", f"{first} UTC"),
        ("to", f"{last} UTC"),
        ("queries", f"{len(queries):,}, about {len(np.unique(queries.image)):,} different images"),
        ("log", f"{queries.folder.resolve()}, {queries.files:,} files"),
    ]
    if queries.keys > 1:
        facts.append(("keys", f"{queries.keys}: queries are compared with others of the same key alone"))
    return facts


def _picture(queries: Queries, sequence: Sequence) -> Picture:
    many = len(sequence.rows) > 2 * DOTS
    caption = "Each dot a query; the margin it was shown, as logged in steps of 0.25."
    caption += f" Some of the {len(sequence.rows):,} queries, the lowest included." if many else ""
    return Picture(sequence.about(), caption, partial(_walk, queries, sequence), 2.5)


def _walk(queries: Queries, sequence: Sequence, figure: Figure) -> None:
    """The shown margin query by query, and where the top class was another than at first."""
    margin, top = queries.margin[sequence.rows], queries.top[sequence.rows]
    axes: Any = figure.subplots()
    numbers, high = np.arange(1, len(margin) + 1), max(1.0, float(margin.max()))
    kinds = (("top class as at first", top == top[0], COLOURS[1]), ("another", top != top[0], COLOURS[2]))
    for label, where, colour in kinds:
        if where.any():
            some = _some(margin[where])
            axes.plot(numbers[where][some], margin[where][some], "o", ms=2.2, mew=0, color=colour, label=label)
    axes.set(xlabel="query of the sequence", ylabel="shown margin", ylim=(-0.05 * high, 1.08 * high))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handletextpad=0.2, markerscale=2)


def _some(margin: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Positions of at most `DOTS` of these margins: in each stretch the first lowest one."""
    if len(margin) <= DOTS:
        return np.arange(len(margin))
    starts = np.linspace(0, len(margin), DOTS, endpoint=False).astype(np.int64)
    return np.array([a + margin[a:b].argmin() for a, b in zip(starts, np.append(starts[1:], len(margin)), strict=True)])
