"""What a flag is, and which there are."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PAGE = "docs/flags.md"
KINDS = {
    "verdict": "the measurement or the defense is broken; do not trust the number",
    "property": "true of this defense; know it",
}


class About(NamedTuple):
    """What a flag is called, what it says where it is raised, and why it matters."""

    name: str
    kind: str
    why: str


FLAGS: dict[str, About] = {
    "F1": About(
        "label flips",
        "property",
        "users get other answers, and each flip is a success that no attack earned",
    ),
    "F2": About(
        "batch dependence",
        "verdict",
        "an image's result depends on what is asked with it, and an image sent along reads the rest",
    ),
    "F3": About(
        "chance",
        "property",
        "a single answer is a draw: an attacker averages, and a single success may be luck",
    ),
    "F4": About(
        "state",
        "verdict",
        "the answer depends on what was asked before, so results depend on the order of the queries",
    ),
    "F5": About(
        "degenerate scores",
        "property",
        "an attack that follows scores has nothing to follow there, and fails at that",
    ),
    "F6": About(
        "scores no better than labels",
        "property",
        "who looks at labels alone does as well, so nothing that is done to the scores protects the labels",
    ),
    "F7": About(
        "more queries do not help",
        "verdict",
        "the attack is trapped, or the network itself resists; only other attacks can tell which",
    ),
    "F8": About(
        "larger eps does not help",
        "verdict",
        "an attack that is free to do anything and still fails is broken",
    ),
    "F9": About(
        "another attack beats the standard one",
        "verdict",
        "the standard attack's number is not what is left; quote the worst per image",
    ),
    "F10": About(
        "trend reversed or leaked",
        "property",
        "an attacker who turns round, or looks elsewhere, sees the way",
    ),
    "F11": About(
        "jumps",
        "property",
        "where the shown margin jumps and the label stays, the defense's rule can be read off and undone",
    ),
    "F12": About(
        "seeds disagree",
        "verdict",
        "one run's number says little",
    ),
    "F13": About(
        "lucky success",
        "verdict",
        "recorded successes are single draws that mostly do not repeat",
    ),
    "F14": About(
        "budget accounting",
        "verdict",
        "queries that are counted wrong, or spent twice, flatter the defense",
    ),
    "F15": About(
        "invalid adversarial images",
        "verdict",
        "a success outside the ball, or lost in 8 bits, is none",
    ),
    "F16": About(
        "attack weak without the defense",
        "verdict",
        "what is left is not the defense's doing, but the network's or the attack's",
    ),
    "F17": About(
        "planted example missed",
        "verdict",
        "the attack misses what is provably there, so what it leaves is not robust",
    ),
    "F18": About(
        "tuning leak",
        "verdict",
        "the defense was fitted on images that it is then judged by",
    ),
    "F19": About(
        "columns on different images",
        "property",
        "averages over initially correct images compare different images",
    ),
    "F20": About(
        "overhead",
        "property",
        "users pay for it at every query, and time that depends on the image tells of it",
    ),
}
"""Id to name, kind and reason."""


@dataclass(frozen=True)
class Flag:
    """One flag, judged or not.

    id: of `FLAGS`. kind: "verdict" or "property" (see `KINDS`). raised: whether it is. measured: what was, in a
    sentence with numbers and the threshold. why: why it matters. page: where it is explained. figures: the numbers by
    name. missing: what is missing to judge it; empty if it was.
    """

    id: str
    name: str
    kind: str
    raised: bool
    measured: str
    why: str
    page: str
    figures: dict[str, float] = field(default_factory=dict)
    missing: str = ""

    @property
    def status(self) -> str:
        """ "raised", "clear" or "not judged"."""
        return "not judged" if self.missing else "raised" if self.raised else "clear"

    def as_json(self) -> dict[str, Any]:
        """What check.json holds of it."""
        return {**vars(self), "status": self.status}


def page_of(id: str) -> str:
    """The page and section that explain a flag.

    >>> page_of("F1")
    'docs/flags.md#f1-label-flips'
    """
    heading = f"{id} {FLAGS[id].name}".lower()
    return f"{PAGE}#" + re.sub(r"[^\w-]", "", heading.replace(" ", "-"))


def judged(id: str, raised: bool, measured: str, kind: str | None = None, /, **figures: float) -> Flag:
    """A flag that was judged; `kind` where it is not the usual one."""
    about = FLAGS[id]
    numbers = {name: float(value) for name, value in figures.items()}
    return Flag(id, about.name, kind or about.kind, bool(raised), measured, about.why, page_of(id), numbers)


def not_judged(id: str, missing: str) -> Flag:
    """A flag that could not be judged, as something is missing."""
    about = FLAGS[id]
    return Flag(id, about.name, about.kind, False, "", about.why, page_of(id), {}, missing)


def number(id: str) -> int:
    """To sort flags by.

    >>> sorted(["F10", "F9"], key=number)
    ['F9', 'F10']
    """
    return int(id[1:])
