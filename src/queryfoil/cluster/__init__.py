"""A plan's work on a cluster: how it is asked for. What does it is imported only then."""

import importlib.util
from dataclasses import dataclass

from queryfoil.checks import lookup, require

ENGINES = {"process": "all work in this process", "ray": "each chunk a task of a Ray cluster"}


class ClusterError(RuntimeError):
    """The cluster cannot go on."""


@dataclass(frozen=True)
class Ray:
    """Each chunk is a task of a Ray cluster; results are written by the process that asks.

    `address` is of a running cluster, as `ray.init` takes it ("auto" or "HOST:PORT"); None starts one on this machine,
    and stops it at the end. A task takes a CPU; with `gpus_per_task` it computes on a GPU, of which it takes that part.

    >>> Ray(gpus_per_task=0.5).computes_on("cpu")
    'cuda'
    """

    address: str | None = None
    gpus_per_task: float = 0.0

    def __post_init__(self) -> None:
        if self.address is not None and not self.address.strip():
            raise ValueError(
                "expected the address of a Ray cluster, such as auto or HOST:6379, but got an empty "
                "one; leave it out for a cluster on this machine alone"
            )
        require("gpus_per_task", self.gpus_per_task, "from 0 to 1, as a task uses one", lambda value: 0 <= value <= 1)

    def check_installed(self) -> None:
        """ValueError without Ray."""
        if importlib.util.find_spec("ray") is None:
            raise ValueError("the engine ray needs Ray: pip install 'queryfoil[bench,ray]'")

    def computes_on(self, device: str) -> str:
        """The kind of device of tasks; ValueError if `device`, where their work is prepared, promises more."""
        if not self.gpus_per_task and device != "cpu":
            raise ValueError(
                f"expected the device cpu for tasks without a GPU, but got {device}; give each task one "
                "(gpus_per_task, --gpus-per-task 1), or leave the device out"
            )
        return "cuda" if self.gpus_per_task else "cpu"


def engine(name: str, address: str | None, gpus_per_task: float | None) -> Ray | None:
    """The engine of this name, None for this process; ValueError for what would have no effect there.

    >>> engine("ray", "auto", None)
    Ray(address='auto', gpus_per_task=0.0)
    """
    given = {"address": address, "gpus_per_task": gpus_per_task}
    chosen = {option: value for option, value in given.items() if value is not None}
    lookup(ENGINES, name, "engine")
    if name == "ray":
        return Ray(**chosen)  # type: ignore[arg-type]
    if chosen:
        needless = ", ".join("--" + option.replace("_", "-") for option in chosen)
        raise ValueError(f"{needless} would have no effect in one process; add --engine ray, or leave it out")
    return None
