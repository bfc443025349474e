"""Speed of AAA on logits: the exact solver in PyTorch, ONNX and NumPy against 100 Adam steps, and the shipped network.

All in one run, one after another in each round; a figure is the median of the rounds, a ratio the median of the
rounds' ratios. Normal logits of standard deviation 3, float32, linear curve, tau 6. Where one round takes longer than
`--seconds`, there is just one, with no other before it.

python benchmarks/disguise.py [--classes 10 100 1000 21841] [--batches 1 8 64 1024 4096] [--seconds 15]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from queryfoil import disguise, models
from queryfoil.defenses.calibration import Fit
from queryfoil.deploy import numpy_aaa
from queryfoil.deploy.export import export

CLASSES, BATCHES = (10, 100, 1000, 21841), (1, 8, 64, 1024, 4096)
ROUNDS = 50


def seconds(function: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def session(classes: int) -> Any:
    """The exact solver as an ONNX file, on as many threads as torch has."""
    found = Fit("linear", 6.0, 1.0, 5.0, 1.0, "exact", 100, 0.1, classes, 100, 1.0, 0.1, 0.1, 0.1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = export(None, found, Path(folder) / "aaa.onnx").path
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def forward(network: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Answers of a network in parts of 128 images."""
    for part in torch.split(images, 128):
        network(part)


def measure(calls: dict[str, Callable[[], object]], allowed: float) -> list[dict[str, float]]:
    """Seconds of each call in each round; the first round does not count if there are others."""
    first = {name: seconds(call) for name, call in calls.items()}
    rounds = min(ROUNDS, int(allowed / sum(first.values())))
    return [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)] or [first]


def main() -> None:
    """Print a line for each number of classes and batch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seconds", type=float, default=15, help="for each line")
    given = parser.parse_args()
    network = models.load("fashion-resnet")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    print(
        f"{'K':>5} {'B':>4} {'Adam ms':>9} | {'PyTorch':>8} {'ONNX':>8} {'NumPy ms':>8} | {'Adam/PyTorch':>12} "
        f"{'/ONNX':>7} {'/NumPy':>7} | {'PyTorch/forward':>15} {'rounds':>6}"
    )
    for classes in given.classes:
        onnx = session(classes)
        for batch in given.batches:
            generator = torch.Generator().manual_seed(classes)
            z = 3 * torch.randn(batch, classes, generator=generator)
            images, values = torch.rand(batch, 1, 28, 28, generator=generator), z.numpy()
            calls: dict[str, Callable[[], object]] = {
                "adam": lambda z=z: disguise(z, solver="adam"),  # type: ignore[misc]
                "torch": lambda z=z: disguise(z),  # type: ignore[misc]
                "onnx": lambda values=values, onnx=onnx: onnx.run(None, {"scores": values}),  # type: ignore[misc]
                "numpy": lambda values=values: numpy_aaa.disguise(values, "linear", 6.0, 1.0, 5.0, 1.0),  # type: ignore[misc]
                "forward": lambda images=images: forward(network, images),  # type: ignore[misc]
            }
            with torch.inference_mode():
                runs = measure(calls, given.seconds)
            ms = {name: 1e3 * statistics.median(run[name] for run in runs) for name in calls}
            adam = {name: statistics.median(run["adam"] / run[name] for run in runs) for name in calls}
            share = statistics.median(run["torch"] / run["forward"] for run in runs)
            print(
                f"{classes:>5} {batch:>4} {ms['adam']:>9.1f} | {ms['torch']:>8.2f} {ms['onnx']:>8.2f} "
                f"{ms['numpy']:>8.2f} | {adam['torch']:>12.0f} {adam['onnx']:>7.0f} {adam['numpy']:>7.0f} | "
                f"{100 * share:>13.2f} % {len(runs):>6}",
                flush=True,
            )


if __name__ == "__main__":
    main()
