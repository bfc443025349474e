"""Which clients of a query log look like attackers, and why.

An attack asks about many variants of one image: a sequence of near-duplicates. What is found, from `Rules` on:

* A walk: a sequence in which the shown margin falls, or whose top class keeps changing, as on the boundary between two
  classes. Or many short ones, which fall or end in another class than they began with: a weak model, image after image.
  Looks like an attack.
* A search without a walk: many more variants, with the same to see again and again. A defense of scores shows just this
  to an attacker who gets nowhere; and so does a fixed camera. To look at.

Sequences that several clients share are judged as a whole as well, for an attack that was spread.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from queryfoil.deploy.grouping import Queries, Step

FIRST, LAST = 5, 10  # queries at a sequence's beginning, and in a row later, whose median margins are compared
STRIDE = 5  # queries between two such looks
PART = 3  # variants that make a client a part of a sequence
CALM, LOOK, ATTACK = 0, 1, 2
LEVELS = ("", "to look at", "looks like an attack")

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """From when on a sequence is a walk, or a search.

    walk: variants (distinct images) where the margin falls, 1 + margin by the factor `fall`, or the top class changes
    with a share `flips` of the queries and 3 times. search: variants without either. walks: so many sequences of
    `short` variants or more that fall or end in another class, if they are half of such sequences.
    """

    walk: int = 30
    fall: float = 2.0
    flips: float = 0.1
    search: int = 100
    short: int = 8
    walks: int = 5


@dataclass(frozen=True)
class Sequence:
    """What one client, or several, asked about variants of one image."""

    rows: Rows  # of the log
    variants: int
    changes: int  # of the top class, from a query to the next
    fell: tuple[float, float] | None  # margins between which it fell, if enough
    flips: bool
    turned: bool  # fell, or ends in another class
    level: int
    since: int  # position in `rows` of the query that gave it this level

    def about(self) -> str:
        """The evidence in a line."""
        signs = [] if self.fell is None else [f"the shown margin fell from {self.fell[0]:.3g} to {self.fell[1]:.3g}"]
        signs += [f"the top class changed {self.changes:,} times"] if self.flips else []
        if self.level == LOOK:
            signs.append("no walk, but it ends in another class" if self.turned else "no walk")
        walked = " and ".join(signs)
        return f"{self.variants:,} variants of one image" + (f"; {walked}" if walked else "")


@dataclass
class Client:
    """What a client asked, and what to think of it."""

    name: str
    queries: int
    images: int  # distinct ones
    near: int  # images that are near-duplicates of an earlier one, whoever asked about that
    largest: Sequence | None = None  # the most suspicious; without any, that of most variants
    level: int = CALM
    since: int | None = None  # number of the client's query that gave it this level
    evidence: list[str] = field(default_factory=list)

    def found(self, level: int, since: int | None, evidence: str) -> None:
        """Take a finding into account."""
        if level > self.level or (level == self.level and since is not None and (self.since or since) >= since):
            self.since = since
        self.level = max(self.level, level)
        self.evidence.append(evidence)


@dataclass(frozen=True)
class Watched:
    """A log and what was found in it; the most suspicious clients first."""

    queries: Queries
    clients: list[Client]
    shared: list[tuple[Sequence, list[str]]]  # sequences of several clients, and these
    rules: Rules

    def count(self, level: int) -> int:
        """How many clients are of a level."""
        return sum(client.level == level for client in self.clients)


def watch(queries: Queries, rules: Rules | None = None, step: Step = lambda *_: None) -> Watched:
    """Judge all clients of a log."""
    chosen = rules or Rules()
    fresh = np.zeros(len(queries), bool)
    fresh[np.unique(queries.image, return_index=True)[1]] = True
    fresh[np.unique(queries.group, return_index=True)[1]] = False
    clients, alone = [], defaultdict(set)
    done = 0
    for name, rows in zip(queries.clients, _parts(queries.client), strict=True):
        client = Client(name, len(rows), len(np.unique(queries.image[rows])), int(fresh[rows].sum()))
        sequences = [sequence(queries, rows[part], chosen) for part in _parts(queries.group[rows], chosen.short)]
        _judge(client, rows, sequences, chosen)
        for found in sequences:
            if found.level:
                alone[int(queries.group[found.rows[0]])].add(name)
        clients.append(client)
        done += len(rows)
        step("judging", done, len(queries))
    by_name = {client.name: client for client in clients}
    shared = []
    for whole, rest, names, others in _shared(queries, alone, chosen):
        shared.append((whole, names))
        for name in others:
            besides = len(names) - 1
            text = f"together with {besides} other client{'s' if besides > 1 else ''}: {rest.about()}"
            by_name[name].found(rest.level, None, text)
    clients.sort(key=lambda c: (-c.level, -(c.largest.variants if c.largest else 0), -c.queries, c.name))
    shared.sort(key=lambda found: (-found[0].level, -found[0].variants))
    return Watched(queries, clients, shared, chosen)


def sequence(queries: Queries, rows: Rows, rules: Rules) -> Sequence:
    """Judge queries about variants of one image. What once looked like an attack stays one, whatever is asked later."""
    image, top, margin = queries.image[rows], queries.top[rows], queries.margin[rows]
    new = np.zeros(len(rows), bool)
    new[np.unique(image, return_index=True)[1]] = True
    variants = np.cumsum(new)
    changes = np.concatenate([[0], np.cumsum(top[1:] != top[:-1])])
    fallen, start, lowest = np.zeros(len(rows), bool), float(_middle(margin[None, :FIRST])[0]), np.inf
    if len(rows) >= FIRST + LAST:
        later = _middle(np.lib.stride_tricks.sliding_window_view(margin[FIRST:], LAST)[::STRIDE])
        lowest = float(later.min())
        low = np.flatnonzero((1 + later) * rules.fall <= 1 + start)
        if len(low):
            fallen[FIRST + LAST - 1 + STRIDE * low[0] :] = True
    flipping = changes >= np.maximum(rules.flips * np.arange(1, len(rows) + 1), 3)
    walks = np.flatnonzero((variants >= rules.walk) & (fallen | flipping))
    searches = np.flatnonzero(variants >= rules.search)
    level = ATTACK if len(walks) else LOOK if len(searches) else CALM
    return Sequence(
        rows=rows, variants=int(variants[-1]), changes=int(changes[-1]),
        fell=(start, lowest) if fallen[-1] else None, flips=bool((flipping & (variants >= rules.walk)).any()),
        turned=bool(fallen[-1] or top[0] != top[-1]), level=level,
        since=int((walks if level == ATTACK else searches)[0]) if level else 0,
    )  # fmt: skip


def _judge(client: Client, rows: Rows, sequences: list[Sequence], rules: Rules) -> None:
    """A client by its own sequences."""
    if not sequences:
        return
    client.largest = max(sequences, key=lambda one: (one.level, one.variants))
    for level in (ATTACK, LOOK):
        those = sorted((one for one in sequences if one.level == level), key=lambda one: -one.variants)
        if those:
            more = f" (and {len(those) - 1:,} more such sequences)" if len(those) > 1 else ""
            first = min(int(one.rows[one.since]) for one in those)
            client.found(level, int(np.searchsorted(rows, first)) + 1, those[0].about() + more)
    full = sorted((one for one in sequences if one.variants >= rules.short), key=lambda one: int(one.rows[-1]))
    turned = np.cumsum([one.turned for one in full])
    enough = np.flatnonzero((turned >= rules.walks) & (2 * turned >= np.arange(1, len(full) + 1)))
    if len(enough):
        last = full[enough[0]].rows[-1]
        text = f"{turned[-1]:,} of {len(full):,} sequences of variants fell or ended in another class"
        client.found(ATTACK, int(np.searchsorted(rows, last)) + 1, text)


def _shared(
    queries: Queries, alone: dict[int, set[str]], rules: Rules
) -> Iterator[tuple[Sequence, Sequence, list[str], list[str]]]:
    """Suspicious sequences of several clients: as a whole; without those whose own part is suspicious; all; the latter.

    A client whose own part is suspicious says nothing about the others, so these are judged without it.
    """
    for rows in _parts(queries.group, rules.walk):
        if (queries.client[rows] == queries.client[rows[0]]).all():
            continue
        pairs = np.unique(np.stack([queries.client[rows].astype(np.uint64), queries.image[rows]]), axis=1)
        numbers, counts = np.unique(pairs[0].astype(np.int32), return_counts=True)
        parties = numbers[counts >= PART]
        own = alone.get(int(queries.group[rows[0]]), set())
        others = [number for number in parties.tolist() if queries.clients[number] not in own]
        of_all = rows[np.isin(queries.client[rows], parties)]
        if len(parties) < 2:
            continue
        whole = sequence(queries, of_all, rules)
        names = [queries.clients[number] for number in parties.tolist()]
        if len(others) > 1:
            rest = sequence(queries, of_all[np.isin(queries.client[of_all], others)], rules)
            if rest.level:
                yield whole, rest, names, [queries.clients[number] for number in others]
                continue
        if len(parties) - len(others) > 1:
            yield whole, whole, names, []


def _parts(values: NDArray[np.int32], least: int = 1) -> list[Rows]:
    """For each value that is there `least` times or more, in rising order, where it stands."""
    order = np.argsort(values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])) + 1, len(order))
    starts = np.append(0, ends[:-1])
    enough = ends - starts >= least
    return [order[start:end] for start, end in zip(starts[enough], ends[enough], strict=True)]


def _middle(margins: NDArray[np.float32]) -> NDArray[np.float32]:
    """The median of each row (N, k), the lower of two."""
    found: NDArray[np.float32] = np.sort(margins, axis=1)[:, (margins.shape[1] - 1) // 2]
    return found
