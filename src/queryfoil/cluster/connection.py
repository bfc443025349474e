"""To a Ray cluster and back: a running one, or one of our own that nobody else can reach."""

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from queryfoil.cluster import Ray

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "3",  # without it, a chunk that never fits into memory would be tried for ever
}
SHORT = Path("/tmp")  # paths of sockets must be


@contextmanager
def connected(engine: Ray) -> Iterator[Any]:
    """The module `ray`, connected as the engine asks, and quiet; a cluster of our own is stopped at the end.

    Where the program has a connection already, it is used, and left open. ValueError if no task fits on
    the cluster.
    """
    import ray

    with _connection(ray, engine):
        _check_size(ray, engine)
        yield ray


@contextmanager
def _connection(ray: Any, engine: Ray) -> Iterator[None]:
    if ray.is_initialized():
        if engine.address is not None:
            raise ValueError(
                f"this program has a connection to Ray already, so the address {engine.address!r} would have no "
                "effect; leave it out"
            )
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    with _environment(ENVIRONMENT), _signals():
        if engine.address is not None:
            try:
                ray.init(address=engine.address, **quiet)
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"expected a Ray cluster at {engine.address}, but {reason}") from error
            try:
                yield
            finally:
                ray.shutdown()
            return
        folder = tempfile.mkdtemp(prefix="queryfoil-ray-", dir=SHORT if SHORT.is_dir() else None)
        try:
            with loopback():
                ray.init(address="local", include_dashboard=False, _temp_dir=folder, **quiet)
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)  # logs


def slots(ray: Any, engine: Ray) -> int:
    """How many tasks fit on the cluster as it is, all at once."""
    return sum(_fit(node["Resources"], engine) for node in ray.nodes() if node["Alive"])


def _fit(resources: dict[str, float], engine: Ray) -> int:
    fit = int(resources.get("CPU", 0))
    if not engine.gpus_per_task:
        return fit
    return min(fit, int(resources.get("GPU", 0)) * int(1 / engine.gpus_per_task))


def _check_size(ray: Any, engine: Ray) -> None:
    """ValueError if not a single task fits."""
    if not slots(ray, engine):
        there = ray.cluster_resources()
        raise ValueError(
            f"expected a cluster with a node that has a CPU and {engine.gpus_per_task:g} GPUs for a task, but got one "
            f"with {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs in all; add such a node, or leave "
            "gpus_per_task (--gpus-per-task) out"
        )


@contextmanager
def loopback() -> Iterator[None]:
    """Have Ray listen on 127.0.0.1 alone, as it does by itself where it knows no clusters (Windows, macOS)."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment({ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set, and unset them again."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _signals() -> Iterator[None]:
    """Put back the handler of SIGTERM that Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
