"""Score-based query attacks, one a file; `ATTACKS` names them."""

from typing import Any

from queryfoil.attacks.square import Square

ATTACKS: dict[str, Any] = {
    "square": Square,
}
