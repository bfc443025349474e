"""What a protection adds to an exported network: ONNX files of one network without and with each, asked in turns.

A figure is the median over the repeats; a difference that of the medians, with a 95 % interval of 1,000 bootstrap draws
of rounds, as the files are asked one after another in each. onnxruntime, one thread.

python benchmarks/export.py [--repeats 5000]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

import queryfoil as qf
from queryfoil.deploy.export import export
from queryfoil.models.victim import victim

NETWORK, BATCHES, DRAWS = "fashion-resnet", (1, 8, 64), 1000


def main() -> None:
    """Print a line for each batch and file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5000, help="at a batch of 1; fewer in proportion at others")
    repeats = parser.parse_args().repeats
    network, held_out = victim(NETWORK), qf.data.load("fashion-mnist", "calibration")
    with torch.inference_mode():
        z = network(held_out.images)
    fits: dict[str, Any] = {
        "plain": None,
        "terraces": qf.fit(z, held_out.labels),
        "AAA-linear": qf.fit(z, held_out.labels, objective="greedy"),
        "AAA-sine": qf.fit(z, held_out.labels, objective="greedy", curve="sine"),
    }
    sessions, nodes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, found in fits.items():
            path = export(network, found, Path(folder) / "model.onnx", shape=(1, 28, 28)).path
            sessions[name], nodes[name] = session(path), len(onnx.load(path).graph.node)
    print(f"{NETWORK}, onnxruntime {onnxruntime.__version__}, 1 thread; microseconds")
    print(f"{'batch':>5} {'file':>10} {'nodes':>5} {'p50':>8} {'p95':>8} {'p50 over plain':>14} {'95 %':>16} {'n':>6}")
    for batch in BATCHES:
        images = held_out.images[:batch].numpy()
        times = asked(sessions, images, max(20, repeats // batch))
        for name, own in times.items():
            more, low, high = difference(own, times["plain"])
            print(
                f"{batch:>5} {name:>10} {nodes[name]:>5} {np.median(own):>8.1f} {np.quantile(own, 0.95):>8.1f} "
                f"{more:>+14.1f} {low:>+7.1f} to {high:>+5.1f} {len(own):>6}"
            )


def session(path: Path) -> Any:
    """A session of onnxruntime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def asked(sessions: dict[str, Any], images: Any, repeats: int) -> dict[str, Any]:
    """Microseconds of each call (repeats,) for each session, all asked in each round, in another order each time."""
    names, order = list(sessions), np.random.default_rng(0)
    times = {name: np.empty(repeats) for name in names}
    for i in range(-repeats // 10, repeats):  # the first ones do not count
        for name in order.permutation(names):
            start = time.perf_counter_ns()
            sessions[name].run(None, {"images": images})
            if i >= 0:
                times[name][i] = (time.perf_counter_ns() - start) / 1e3
    return times


def difference(own: Any, plain: Any) -> tuple[float, float, float]:
    """Difference of the medians, and its 95 % interval over draws of rounds."""
    draws = np.random.default_rng(0).integers(0, len(own), (DRAWS, len(own)))
    found = [np.median(own[draw]) - np.median(plain[draw]) for draw in draws]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(np.median(own) - np.median(plain)), float(low), float(high)


if __name__ == "__main__":
    main()
