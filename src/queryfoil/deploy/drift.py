"""Whether the margins that are served are still those of the images that the protection was fitted on."""

import logging
import threading
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from queryfoil.deploy.margins import shown_margins
from queryfoil.deploy.served import Margins

WINDOW = 1000  # images; with as many held out, a distance of 0.15 comes by chance once in 10^9 windows
EVERY = 100  # images between two looks
LIMIT, GONE = 0.15, 0.1  # the distance that is told, and that under which it is told again
CLOSE = 1e-4  # two margins that are the same but for rounding

log = logging.getLogger(__name__)


def distance(margins: NDArray[np.float64], fitted: Margins) -> float:
    """How far the distribution of margins is from the fitted one: the largest difference of their shares, in [0, 1].

    That of Kolmogorov and Smirnov, taken at the fitted quantiles. Levels, such as those of terraces, are met by many
    images at once: where the quantiles leave the share below a margin open, any share between them will do.

    >>> fitted = Margins(quantiles=(0, 0.25, 0.5, 0.75, 1), margins=(1, 1, 2, 4, 4))
    >>> distance(np.array([1.0, 1.0, 2.0, 4.0]), fitted), distance(np.array([0.5, 0.5, 0.5, 4.0]), fitted)
    (0.0, 0.75)
    """
    ordered = np.sort(margins)
    at, far = np.array(fitted.margins), np.array(fitted.quantiles)
    slack = CLOSE * np.maximum(1, np.abs(at))
    below = np.searchsorted(ordered, at - slack, "left") / len(ordered)
    upto = np.searchsorted(ordered, at + slack, "right") / len(ordered)
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(at)) if b - a > CLOSE * max(1, abs(b))), len(at)]
    worst = 0.0
    for first, after in pairwise(starts):  # quantiles of one margin
        least = far[first - 1] if first else 0.0
        most = far[after] if after < len(far) else 1.0
        worst = max(worst, least - below[first], below[first] - far[first], far[after - 1] - upto[after - 1],
                    upto[after - 1] - most)  # fmt: skip
    return float(worst)


class Drift:
    """The distance over the last `WINDOW` images; warns once when it passes the limit, and again after it has gone.

    Scores of the given kind are set aside until there are some, so that an answer does not wait for more than that.
    """

    def __init__(self, fitted: Margins, output: str) -> None:
        self.fitted, self.output = fitted, output
        self.value: float | None = None  # until there is a full window
        self._aside: list[NDArray[np.float32]] = []
        self._waiting = self._seen = 0
        self._window = np.empty(WINDOW)
        self._told = False
        self._lock = threading.Lock()

    def add(self, scores: NDArray[np.float32]) -> bool:
        """Take the shown scores (N, K) of an answer into account; whether the value is a new one."""
        with self._lock:
            self._aside.append(scores)
            self._waiting += len(scores)
            if self._waiting < EVERY:
                return False
            margins = shown_margins(np.concatenate(self._aside), self.output)[-WINDOW:]
            self._aside, self._waiting = [], 0
            self._window[(self._seen + np.arange(len(margins))) % WINDOW] = margins
            self._seen += len(margins)
            if self._seen < WINDOW:
                return False
            self._look()
            return True

    def _look(self) -> None:
        self.value = distance(self._window, self.fitted)
        if self.value > LIMIT and not self._told:
            log.warning(
                "drift: the margins of the last %d images are not those that the protection was fitted on (distance "
                "%.2f, more than %.2f): other images than expected, or many queries about a few; see docs/watch.md",
                WINDOW, self.value, LIMIT,
            )  # fmt: skip
            self._told = True
        elif self.value < GONE and self._told:
            log.warning("drift: the margins are again as fitted (distance %.2f)", self.value)
            self._told = False
