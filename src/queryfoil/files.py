"""Writing files so that a killed process leaves the old file or the new one, never a half."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, put it in `path`'s place.

    OSError (no space left, no permission) leaves `path` as it was and removes the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_if_old(path: Path, seconds: float = 600) -> None:
    """Remove a half-written file that a killed process left; one that was touched lately may still be written."""
    try:
        if time.time() - path.stat().st_mtime > seconds:
            path.unlink()
    except FileNotFoundError:  # its writer has put it in its place
        return
