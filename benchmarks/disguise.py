"""Speed of AAA on logits: the exact solver against 100 Adam steps, and against the shipped network's forward.

All in one run and interleaved; a figure is the median of the repeats, a ratio the median of the pairs.

python benchmarks/disguise.py
"""

import statistics
import time
from collections.abc import Callable

import torch

from queryfoil import disguise, models

BATCH = 1024


def seconds(function: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each number of classes."""
    model = models.load("fashion-resnet")
    images = torch.rand(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    print(f"B = {BATCH}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'K':>5} {'exact ms':>9} {'Adam ms':>9} {'Adam/exact':>10} {'exact/forward':>14}")
    with torch.inference_mode():
        for classes in (10, 100, 1000):
            logits = 3 * torch.randn(BATCH, classes, generator=torch.Generator().manual_seed(classes))
            runs = []
            for _ in range(8):
                # the exact solver is timed over several calls: one is too short for the clock
                exact = min(seconds(lambda z=logits: disguise(z)) for _ in range(10))  # type: ignore[misc]
                adam = seconds(lambda z=logits: disguise(z, solver="adam"))  # type: ignore[misc]
                forward = min(
                    seconds(lambda: [model(images[i : i + 128]) for i in range(0, BATCH, 128)]) for _ in range(2)
                )
                runs.append((exact, adam, adam / exact, exact / forward))
            exact, adam, ratio, share = (statistics.median(column) for column in zip(*runs[1:], strict=True))
            print(f"{classes:>5} {1e3 * exact:>9.2f} {1e3 * adam:>9.1f} {ratio:>10.0f} {100 * share:>12.2f} %")


if __name__ == "__main__":
    main()
