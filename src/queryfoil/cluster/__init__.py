"""A plan's work on a cluster: how it is asked for. What does it is imported only then."""

from dataclasses import dataclass

from queryfoil.checks import lookup, require, require_whole

ENGINES = {"process": "all work in this process", "ray": "each chunk a task of a Ray cluster"}


@dataclass(frozen=True)
class Ray:
    """Each chunk is a task of a Ray cluster; results are written by the process that asks.

    `address` is of a running cluster, as `ray.init` takes it ("auto", "ray://HOST:PORT" or "HOST:PORT"); None starts
    one on this machine and stops it at the end. A task computes with `cpus_per_task` threads; with `gpus_per_task`, on
    a GPU, or on that part of one.

    >>> Ray(gpus_per_task=0.5).computes_on("cpu")
    'cuda'
    """

    address: str | None = None
    cpus_per_task: int = 1
    gpus_per_task: float = 0.0

    def __post_init__(self) -> None:
        if self.address is not None and not self.address.strip():
            raise ValueError(
                "expected the address of a Ray cluster, such as auto, ray://HOST:10001 or HOST:6379, but got an empty "
                "one; leave it out for a cluster on this machine alone"
            )
        require_whole("cpus_per_task", self.cpus_per_task)
        require("gpus_per_task", self.gpus_per_task, "from 0 to 1, as a task uses one", lambda value: 0 <= value <= 1)

    def computes_on(self, device: str) -> str:
        """The kind of device of tasks; ValueError if `device`, where their work is prepared, promises more."""
        if not self.gpus_per_task and device != "cpu":
            raise ValueError(
                f"expected the device cpu for tasks without a GPU, but got {device}; give each task one (gpus_per_task, "
                "--gpus-per-task 1), or leave the device out"
            )
        return "cuda" if self.gpus_per_task else "cpu"


def engine(name: str, address: str | None, cpus_per_task: int | None, gpus_per_task: float | None) -> Ray | None:
    """The engine of this name, None for this process; ValueError for what would have no effect there.

    >>> engine("ray", "auto", None, None)
    Ray(address='auto', cpus_per_task=1, gpus_per_task=0.0)
    """
    given = {"address": address, "cpus_per_task": cpus_per_task, "gpus_per_task": gpus_per_task}
    chosen = {option: value for option, value in given.items() if value is not None}
    lookup(ENGINES, name, "engine")
    if name == "ray":
        return Ray(**chosen)  # type: ignore[arg-type]
    if chosen:
        needless = ", ".join("--" + option.replace("_", "-") for option in chosen)
        raise ValueError(f"{needless} would have no effect in one process; add --engine ray, or leave it out")
    return None
