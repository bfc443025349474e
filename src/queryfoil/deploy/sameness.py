"""Whether an endpoint is still the one that an audit began with, by its answers to the same few images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from queryfoil import files, provenance
from queryfoil.data import Images
from queryfoil.deploy.endpoint import EndpointError
from queryfoil.oracle import Model, answers

IMAGES = 8  # at most, the first ones that are attacked; each is asked about twice
ROUNDING = 1e-4  # part of the largest score by which answers of one model may differ, by batch or machine
SPREADS = 5.0  # how many times its own spread the answers of a randomized model may have moved
EVERY = 2000  # images after which an endpoint is asked again


class ChangedError(EndpointError):
    """The endpoint answers otherwise than when the audit began."""


@dataclass(frozen=True)
class Answers:
    """Two answers (2, N, K) of a model to the same images, as log-scores."""

    scores: Tensor

    @classmethod
    def of(cls, model: Model, images: Images, seed: int) -> "Answers":
        """Ask a model."""
        number = torch.zeros_like(images.ids)
        return cls(torch.stack([answers(model, images.images, images.ids, number + i, seed).cpu() for i in range(2)]))

    @property
    def spread(self) -> float:
        """By how much the two differ: for each image the largest difference of a score, on average."""
        return _apart(self.scores[0], self.scores[1])

    @property
    def rounding(self) -> float:
        """The difference that rounding may make."""
        return ROUNDING * max(1.0, float(self.scores.abs().max()))

    @property
    def deterministic(self) -> bool:
        """Whether the two are the same, but for rounding."""
        return self.spread <= self.rounding

    def moved(self, now: "Answers") -> str:
        """Why the answers now are not of the same model; empty if they may be.

        >>> before = Answers(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]))
        >>> before.moved(Answers(before.scores + 1e-6))
        ''
        >>> before.moved(Answers(before.scores + torch.tensor([0.5, 0.0])))
        'scores of the same images are 0.5 away from what they were, of which 0.0001 could be chance'
        """
        if now.scores.shape != self.scores.shape:
            return f"it gives {now.scores.shape[2]} scores an image instead of {self.scores.shape[2]}"
        apart = _apart(self.scores.mean(0), now.scores.mean(0))
        chance = self.rounding + SPREADS * max(self.spread, now.spread)
        if now.deterministic != self.deterministic:
            chance = self.rounding  # one that began or ceased to draw at random is another
            apart = max(apart, self.spread, now.spread)
        if apart <= chance:
            return ""
        return (
            f"scores of the same images are {apart:.2g} away from what they were, of which {chance:.2g} could be chance"
        )


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().amax(1).mean())


class Record:
    """What an audit's folder remembers of its endpoint, in audit.json: what it was asked with, said and answered."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))
        self.first: Answers | None = None

    def read(self) -> bool:
        """Whether there is a record of the same settings; ChangedError if it says that the endpoint changed."""
        if not self.path.is_file():
            return False
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.first = Answers(torch.tensor(found["answers"], dtype=torch.float64))
            about, changed = found["about"], found["changed"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); choose another folder") from None
        if changed:
            raise ChangedError(f"{changed}; this folder holds answers of both, so audit the endpoint in another one")
        if {**about, "told": None} != {**self.about, "told": None}:
            self.first = None  # of other settings, of which there are no results
            return False
        if about["told"] != self.about["told"]:
            raise ChangedError("the endpoint describes its model otherwise than when this audit began; if it is meant "
                               "to be another, audit it in another folder")  # fmt: skip
        return True

    def write(self, changed: str = "") -> None:
        """Write it, with why the endpoint is another one than at first, if it is."""
        assert self.first is not None
        content = {"about": self.about, "answers": self.first.scores.tolist(), "changed": changed}
        files.write_text(self.path, json.dumps(content) + "\n")

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of what the endpoint said and answered at first."""
        assert self.first is not None
        told = provenance.tensors(torch.tensor(list(json.dumps(self.about, sort_keys=True).encode())))
        return {"endpoint": told, "answers": provenance.tensors(self.first.scores)}


class Watch:
    """Asks the endpoint again about the same images; ChangedError, also written down, where it has changed."""

    def __init__(self, model: Model, images: Images, seed: int, record: Record) -> None:
        self.model, self.images, self.seed, self.record = model, images[:IMAGES], seed, record
        self.last = 0

    def begin(self, sent: int = 0) -> Answers:
        """Ask for the first time, or compare with what an earlier run was answered; `sent` images so far."""
        self.last = sent
        known = self.record.read()
        now = Answers.of(self.model, self.images, self.seed)
        if not known:
            self.record.first = Answers(now.scores.double())
            self.record.write()
        assert self.record.first is not None
        self._compare(now, "since this audit began")
        return self.record.first

    def again(self, sent: int, always: bool = False) -> None:
        """Compare, if `EVERY` images have been sent since the last time, of `sent` in all."""
        if always or sent - self.last >= EVERY:
            self.last = sent
            self._compare(Answers.of(self.model, self.images, self.seed), "during this audit")

    def _compare(self, now: Answers, when: str) -> None:
        assert self.record.first is not None
        if reason := self.record.first.moved(Answers(now.scores.double())):
            text = f"the endpoint has changed {when}: {reason}"
            if when == "during this audit":
                self.record.write(text)
            raise ChangedError(f"{text}; nothing is reported, as results of both would mix; audit it in another folder")
