"""Bearer tokens: who may ask, by name."""

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from queryfoil.deploy.tensors import RefusedError

VARIABLE = "QUERYFOIL_TOKEN"
SHORTEST = 16  # characters; a shorter token can be guessed
NAME = "token"  # of a client whose token has no name


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


@dataclass(frozen=True)
class Tokens:
    """Names and the digests of their tokens; the tokens themselves are not kept.

    >>> tokens = Tokens.parse("lab 0123456789abcdef")
    >>> tokens.name("Bearer 0123456789abcdef")
    'lab'
    >>> tokens
    Tokens(lab)
    """

    digests: tuple[tuple[str, bytes], ...] = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> "Tokens":
        """Tokens from lines of `NAME TOKEN`, or `TOKEN` alone; empty lines and comments (#) are skipped.

        ValueError for other lines, tokens that are too short, names or tokens that come twice, and none at all; it
        repeats no token.
        """
        found: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2:
                raise ValueError(f"expected `NAME TOKEN` or `TOKEN` in line {number} of the tokens, but got more words")
            name = words[0] if len(words) == 2 else NAME
            if len(words[-1]) < SHORTEST or not words[-1].isascii():
                raise ValueError(
                    f"expected a token of at least {SHORTEST} ASCII characters in line {number}, but it has "
                    f"{len(words[-1])}; make one with `openssl rand -hex 32`"
                )
            if name in found or _digest(words[-1]) in found.values():
                raise ValueError(f"the name or the token in line {number} comes twice; give each client its own")
            found[name] = _digest(words[-1])
        if not found:
            raise ValueError("expected at least one token, `NAME TOKEN` or `TOKEN` a line, but got none")
        return cls(tuple(found.items()))

    @classmethod
    def read(cls, path: Path) -> "Tokens":
        """Tokens from a file of such lines."""
        return cls.parse(path.read_text(encoding="utf-8"))

    def name(self, authorization: str | None) -> str:
        """The name of the client that sent this header; RefusedError if it has none of the tokens.

        Takes the same time whichever token is wrong, and wherever it is.
        """
        scheme, _, token = (authorization or "").partition(" ")
        digest = _digest(token.strip())
        names = [name for name, own in self.digests if hmac.compare_digest(own, digest)]
        if scheme.lower() != "bearer" or not names:
            raise RefusedError(
                "token", "expected the header `Authorization: Bearer TOKEN` with a token of this service"
            )
        return names[0]

    def __repr__(self) -> str:
        return f"Tokens({', '.join(name for name, _ in self.digests)})"
