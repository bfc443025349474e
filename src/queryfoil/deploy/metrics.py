"""What Prometheus is told: requests, refusals by reason, latency, memory and drift. Of images and scores nothing."""

import os
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from queryfoil.deploy.kserving import PREDICT_HIST_TIME
from queryfoil.deploy.served import About

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable with the folder in which processes share their counts; the client library reads it when it is
imported. Without it the counts are those of one process."""

LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds


class Metrics:
    """The counts of one process, in a registry of its own, without what tells versions."""

    def __init__(self, about: About) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "queryfoil", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered or refused", ["protocol", "code"], **own)
        self.refused = Counter("refused", "Requests refused, by reason", ["protocol", "reason"], **own)
        self.images = Counter("images", "Images answered", **own)
        self.seconds = Histogram(
            "request_seconds",
            "Time of an inference request, from its head to the end of its answer",
            ["protocol"],
            buckets=LATENCIES,
            **own,
        )
        self.running = Gauge("running", "Inference requests in hand", multiprocess_mode="livesum", **own)
        self.drift = Gauge(
            "drift", "Distance of the served margins from the fitted ones, 0 to 1; absent until there are enough",
            ["defense"], multiprocess_mode="livemax", **own,
        )  # fmt: skip
        self.unlogged = Counter("unlogged_images", "Answered images that the query log could not take", **own)
        served = Gauge("served", "1 for the defense that is served", ["defense"], multiprocess_mode="livemax", **own)
        served.labels(about.defense or "none").set(1)
        if FOLDER not in os.environ:
            ProcessCollector(registry=self.registry)
            self.registry.register(PREDICT_HIST_TIME)

    def text(self) -> bytes:
        """All counts, of all processes, in Prometheus's text format."""
        folder = os.environ.get(FOLDER)
        if folder is None:
            return generate_latest(self.registry)
        for file in Path(folder).glob("gauge_live*.db"):  # what a killed process left would count for ever
            pid = int(file.stem.rpartition("_")[2])
            if not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
                mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
        shared = CollectorRegistry()
        MultiProcessCollector(shared, folder)  # type: ignore[no-untyped-call]
        return generate_latest(shared)
