"""How the engine's own time and memory grow with images, queries, pixels and classes.

Attacks on a model that costs nothing and is never fooled, so that what is measured is the attack and the engine. Time
is the lower of two runs at each size; the exponent is the slope of its logarithm over that of the size, by least
squares: 1 is growth in proportion, below 1 a share that does not grow. Peak memory is that of a process of its own for
each number of images, less that of one with a single image.

python benchmarks/growth.py [--attack square signhunter simba nes bandits]
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from queryfoil.attacks import build
from queryfoil.oracle import quantize
from queryfoil.run import run
from queryfoil.task import Task

USUAL = {"images": 256, "queries": 50, "pixels": 28 * 28, "classes": 10}
SIZES = {
    "images": (128, 256, 512, 1024, 2048),
    "queries": (25, 50, 100, 200, 400),
    "pixels": (14 * 14, 28 * 28, 56 * 56, 112 * 112, 224 * 224),
    "classes": (10, 100, 1000, 10000),
}
MEMORY = (1, 1000, 2000, 4000, 8000)


class Nothing:
    """Scores (n, K) whose class 0 leads by a little that the first pixel decides."""

    output = "logits"

    def __init__(self, classes: int) -> None:
        self.scores = torch.zeros(1, classes)

    def __call__(self, x: Tensor) -> Tensor:
        scores = self.scores.repeat(len(x), 1)
        scores[:, 0] = 1 + x[:, 0, 0, 0]
        return scores


def attack(name: str, images: int, queries: int, pixels: int, classes: int) -> float:
    """Seconds of an attack on so many images, of which none falls."""
    side = round(pixels**0.5)
    x = quantize(torch.rand(images, 1, side, side, generator=torch.Generator().manual_seed(0)))
    task = Task.create(x, torch.zeros(images, dtype=torch.int64), eps=8 / 255)
    start = time.perf_counter()
    run(build(name), Nothing(classes), task, queries)
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each attack and size, and for the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attack", nargs="+", default=["square", "signhunter", "simba", "nes", "bandits"])
    parser.add_argument("--memory", type=int, help="print the peak memory in MiB of Square on so many images, and stop")
    asked = parser.parse_args()
    if asked.memory is not None:
        attack("square", asked.memory, 5, USUAL["pixels"], USUAL["classes"])
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        if peak is None:
            raise SystemExit("expected the peak memory in /proc/self/status, as Linux shows it")
        print(int(peak[1]) / 1024)
        return
    for name in asked.attack:
        attack(name, **USUAL)  # warm up
        for what, sizes in SIZES.items():
            seconds = [min(attack(name, **USUAL | {what: size}) for _ in range(2)) for size in sizes]
            slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
            texts = ", ".join(f"{size}: {1000 * t:.0f} ms" for size, t in zip(sizes, seconds, strict=True))
            print(f"{name}, {what}: exponent {slope:.2f} ({texts})", flush=True)
    peaks = [
        float(subprocess.run([sys.executable, __file__, "--memory", str(n)], capture_output=True, check=True).stdout)
        for n in MEMORY
    ]
    more = [peak - peaks[0] for peak in peaks[1:]]
    slope = np.polyfit(np.log(MEMORY[1:]), np.log(more), 1)[0]
    print(f"memory beyond one image's {peaks[0]:.0f} MiB: exponent {slope:.2f}, {more} MiB for {MEMORY[1:]} images")


if __name__ == "__main__":
    main()
