"""Settings for the whole test run."""

import os

# Idle threads sleep instead of spinning: on a machine that does other things as well, spinning makes torch ten times
# slower. Must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
