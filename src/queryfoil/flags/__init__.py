"""Flags that say when a defense only looks strong; `FLAGS` names them, `check` raises them."""

from queryfoil.flags.flag import FLAGS as FLAGS
from queryfoil.flags.flag import Flag as Flag
