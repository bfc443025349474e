"""How many images an audit has sent, in a file that outlives it, and the most that it may send."""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from queryfoil.checks import require_whole
from queryfoil.deploy.endpoint import EndpointError

WIDTH = 80  # bytes of the file, always the same: it is written over in place, in one call
SYNC = 1.0  # seconds after which what was written is put on the disk itself


class SpentError(EndpointError):
    """The next request would send more images than may be sent."""


class Ledger:
    """Images and requests that were sent so far, by all runs in a folder; one run at a time holds it.

    Each request is written down before it is sent, so that a run that is killed at any moment has sent no more than
    the file says. `most` is how many images may be sent in all.
    """

    def __init__(self, path: Path, most: int) -> None:
        require_whole("most", most)
        self.path, self.most = path, most
        self.images = self.requests = 0
        self._file = -1
        self._synced = 0.0

    def __enter__(self) -> Self:
        """Open the file and lock it; ValueError if another run has it, or for a damaged one."""
        try:
            import fcntl
        except ModuleNotFoundError:
            raise ValueError("an audit locks its ledger, for which it needs Linux, macOS or another Unix") from None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.images, self.requests = read(self.path)
        except BlockingIOError:
            os.close(self._file)
            raise ValueError(
                f"another audit is running in {self.path.parent}; wait, or choose another folder"
            ) from None
        except ValueError:
            os.close(self._file)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def take(self, n: int) -> None:
        """Write down a request of n images that will be sent now; SpentError if they are too many."""
        if self.images + n > self.most:
            raise SpentError(f"{self.images:,} of at most {self.most:,} images were sent, and the next request has {n}")
        self._write(self.images + n, self.requests + 1)

    def give_back(self, n: int) -> None:
        """A request of n images was not sent after all."""
        self._write(self.images - n, self.requests - 1)

    def _write(self, images: int, requests: int) -> None:
        self.images, self.requests = images, requests
        text = json.dumps({"images": images, "requests": requests}).ljust(WIDTH - 1) + "\n"
        os.pwrite(self._file, text.encode(), 0)
        if time.monotonic() - self._synced > SYNC:
            os.fsync(self._file)
            self._synced = time.monotonic()


def read(path: Path) -> tuple[int, int]:
    """Images and requests that a file says; none if there is no file yet. ValueError for a damaged one."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text:
        return 0, 0
    try:
        found = json.loads(text)
        images, requests = found["images"], found["requests"]
        require_whole("images", images, 0)
        require_whole("requests", requests, 0)
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path} is damaged, so that nobody knows how many images were sent; choose another folder"
        ) from None
    return images, requests
