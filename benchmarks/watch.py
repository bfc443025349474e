"""What the query log finds: attackers and honest clients of a protected network, recorded and judged.

python benchmarks/watch.py --out DIR [--defense terraces] [--clients 10] [--pictures 5] [--budget 500] [--seed 0]
python benchmarks/watch.py --out DIR --tune     # other attacks, images and seeds: what the thresholds are chosen on
python benchmarks/watch.py --speed 100000       # what the log costs an image, and the report a row

fashion-resnet behind what `fit` finds on the calibration images. Each attacker asks about `pictures` images one after
the other, up to `budget` queries each (L-inf 16/255; L2 2.0 where an attack knows nothing else), as a client of its
own. DIR gets the log, and watch.json with all numbers.
"""

import argparse
import io
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import queryfoil as qf
from queryfoil import data, files, metrics, models, provenance
from queryfoil.deploy.grouping import read
from queryfoil.deploy.querylog import QueryLog
from queryfoil.deploy.watch import ATTACK, LOOK, Client, watch
from queryfoil.oracle import Model

ATTACKS = ("square", "signhunter", "simba", "nes", "rays", "hopskipjump", "border_walk")
TUNING = ("bandits", "blind_square", "signopt", "surfree", "rambo", "cgba")
DEFENSES = ("terraces", "aaa", "none")
BATCH = 16  # images of an honest client in a request: less to wait for
Bytes = NDArray[np.uint8]
Draw = np.random.Generator


def moved(image: Bytes, rng: Draw, most: int) -> Bytes:
    """Cut and padded by up to `most` pixels, as another crop."""
    down, right = rng.integers(-most, most + 1, 2)
    padded = np.pad(image, ((0, 0), (most, most), (most, most)), mode="edge")
    height, width = image.shape[1:]
    cut: Bytes = padded[:, most + down : most + down + height, most + right : most + right + width]
    return cut


def lit(image: Bytes, factor: float) -> Bytes:
    """Brighter or darker."""
    return np.asarray(np.clip(np.rint(image * factor), 0, 255), np.uint8)


def grainy(image: Bytes, rng: Draw, sd: float) -> Bytes:
    """With a sensor's noise of so many levels."""
    return np.clip(np.rint(image + rng.normal(0, sd, image.shape)), 0, 255).astype(np.uint8)


def compressed(image: Bytes, quality: int) -> Bytes:
    """As JPEG."""
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))[None]


def variant(image: Bytes, rng: Draw) -> Bytes:
    """What a person or a program makes of a picture: cropped, lit, mirrored, compressed."""
    image = moved(image, rng, 2) if rng.random() < 0.6 else image
    image = lit(image, rng.uniform(0.8, 1.2)) if rng.random() < 0.6 else image
    image = image[:, :, ::-1] if rng.random() < 0.2 else image
    return compressed(image, int(rng.integers(50, 96))) if rng.random() < 0.6 else image


def singles(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """Each picture once: 200 queries."""
    yield from images[rng.permutation(len(images))[:200]]


def repeats(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """Pictures asked again, up to 8 times each: 60 pictures."""
    for image in images[rng.permutation(len(images))[:60]]:
        yield from [image] * int(rng.integers(1, 9))


def albums(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """Six crops, exposures and compressions of each picture: 40 pictures."""
    for image in images[rng.permutation(len(images))[:40]]:
        yield from (variant(image, rng) for _ in range(6))


def augmented(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """Test-time augmentation: 32 variants of each picture, 12 pictures."""
    for image in images[rng.permutation(len(images))[:12]]:
        yield from (variant(image, rng) for _ in range(32))


def slider(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """An exposure slider, pulled from dark to bright in 25 steps: 8 pictures."""
    for image in images[rng.permutation(len(images))[:8]]:
        yield from (lit(image, factor) for factor in np.linspace(0.5, 1.5, 25))


def conveyor(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """A camera over a conveyor belt: 12 frames of each of 30 things, moving, with noise."""
    for image in images[rng.permutation(len(images))[:30]]:
        for step in range(12):
            shifted = np.roll(image, step - 6, axis=2)
            yield grainy(lit(shifted, 1 + 0.02 * rng.normal()), rng, 2)


def panning(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """A hand-held camera before one thing: 300 frames that drift by pixels, with noise and flicker."""
    image, at = images[rng.integers(len(images))], np.zeros(2, np.int64)
    for _ in range(300):
        at = np.clip(at + rng.integers(-1, 2, 2), -4, 4)
        shifted = np.roll(image, tuple(at), axis=(1, 2))
        yield grainy(lit(shifted, 1 + 0.02 * rng.normal()), rng, 3)


def monitor(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """A monitor that asks about the same ten pictures again and again: 500 queries."""
    chosen = images[rng.permutation(len(images))[:10]]
    yield from (chosen[i % 10] for i in range(500))


def fixed(images: Bytes, rng: Draw) -> Iterator[Bytes]:
    """A fixed camera before a scene that never changes: 300 frames with a sensor's noise."""
    image = images[rng.integers(len(images))]
    yield from (grainy(lit(image, 1 + 0.01 * rng.normal()), rng, 2) for _ in range(300))


HONEST: tuple[Callable[[Bytes, Draw], Iterator[Bytes]], ...] = (
    singles, repeats, albums, augmented, slider, conveyor, panning, monitor, fixed,
)  # fmt: skip


class Logged:
    """A model as a service has it: what it answers to a client is logged."""

    def __init__(self, model: Model, log: QueryLog, client: str) -> None:
        self.model, self.log, self.client = model, log, client

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scores = self.model(x)
        self.log.add(self.client, x.numpy(), scores.numpy(), "logits")
        return scores


def victim(defense: str) -> torch.nn.Module:
    """fashion-resnet, behind the defense."""
    model: torch.nn.Module = models.load("fashion-resnet")
    held_out = data.load("fashion-mnist", "calibration")
    if defense == "none":
        return model
    with torch.inference_mode():
        logits = model(held_out.images)
    objective = {"terraces": "worst-case", "aaa": "greedy"}[defense]
    return qf.protect(model, qf.fit(logits, held_out.labels, objective=objective))


def record(log: QueryLog, model: torch.nn.Module, chosen: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Let all clients ask; gives for each its kind and, of an attacker, how its attacks ended."""
    images = data.load("fashion-mnist", "calibration" if chosen.tune else "attack")
    levels = (images.images * 255).round().byte().numpy()
    clients: dict[str, dict[str, Any]] = {}
    for kind, stream in enumerate(HONEST):
        for number in range(chosen.clients):
            name, rng = f"{stream.__name__}-{number}", np.random.default_rng([chosen.seed, kind, number])
            ask = Logged(model, log, name)
            frames = np.stack(list(stream(levels, rng)))
            for start in range(0, len(frames), BATCH):
                ask(torch.from_numpy(frames[start : start + BATCH]).float() / 255)
            clients[name] = {"kind": stream.__name__, "honest": True}
        print(f"{stream.__name__}: {(stream.__doc__ or '').strip()}", flush=True)
    with torch.inference_mode():
        right = (model(images.images).argmax(1) == images.labels).nonzero().squeeze(1)
    for kind, attack in enumerate(TUNING if chosen.tune else ATTACKS):
        norm = "linf" if "linf" in qf.ATTACKS[attack].norms else "l2"
        eps = 16 / 255 if norm == "linf" else 2.0
        for number in range(chosen.clients):
            rng = np.random.default_rng([chosen.seed, 1000 + kind, number])
            name, fooled = f"{attack}-{number}", []
            for i in right[rng.permutation(len(right))[: chosen.pictures]].tolist():
                x, y = images.images[i : i + 1], images.labels[i : i + 1]
                settings: dict[str, Any] = {"norm": norm, "eps": eps, "budget": chosen.budget, "seed": chosen.seed + i}
                result = qf.attack(Logged(model, log, name), x, y, attack, **settings)
                fooled.append(min(int(result.fooled_at[0]), chosen.budget + 1))
            clients[name] = {"kind": attack, "honest": False, "fooled_at": fooled}
        print(f"{attack}: attacked", flush=True)
    return clients


def judge(folder: Path, clients: dict[str, dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """A row for each kind of client: how many are found, after how many queries, and how much is a near-duplicate."""
    found: dict[str, list[Client]] = {}
    for client in watch(read(folder)).clients:
        found.setdefault(clients[client.name]["kind"], []).append(client)
    rows = []
    for kind in dict.fromkeys(about["kind"] for about in clients.values()):
        those = found[kind]
        attackers, look = (sum(client.level == level for client in those) for level in (ATTACK, LOOK))
        since = sorted(client.since for client in those if client.since is not None)
        fooled = [q for client in those for q in clients[client.name].get("fooled_at", ())]
        before = sum(
            sum(q <= budget and end <= (client.since or 10**9) for q, end in _ends(clients[client.name], budget))
            for client in those
        )
        first = {"median": statistics.median(since), "most": since[-1], "least": since[0]} if since else None
        rows.append(
            {
                "kind": kind,
                "honest": clients[those[0].name]["honest"],
                "clients": len(those),
                "queries": sum(client.queries for client in those),
                "attack": attackers,
                "attack_interval": metrics.wilson(attackers, len(those)),
                "look": look,
                "first": first,
                "near_duplicates": sum(client.near for client in those) / sum(client.queries for client in those),
                "pictures_attacked": len(fooled),
                "pictures_fooled": sum(q <= budget for q in fooled),
                "fooled_before": before,
            }
        )
    return rows


def _ends(about: dict[str, Any], budget: int) -> list[tuple[int, int]]:
    """For each attacked picture, the query that fooled it, and the number of the client's last query about it."""
    fooled = about.get("fooled_at", [])
    ends = np.cumsum([min(q, budget) for q in fooled]).tolist() if fooled else []
    return list(zip(fooled, ends, strict=True))


def show(rows: list[dict[str, Any]]) -> None:
    """Print a line for each kind."""
    for row in rows:
        first, (low, high) = row["first"], row["attack_interval"]
        after = f" after {first['median']:.0f} queries ({first['least']} to {first['most']})" if first else ""
        fooled = "" if row["honest"] else f"; {row['pictures_fooled']} of {row['pictures_attacked']} pictures fooled, "
        fooled += "" if row["honest"] else f"{row['fooled_before']} of them before"
        print(
            f"{row['kind']:12} {row['attack']:3} of {row['clients']} look like an attack ({100 * low:.0f}–"
            f"{100 * high:.0f} %), {row['look']} to look at{after}; {100 * row['near_duplicates']:.1f} % of "
            f"{row['queries']:,} queries near-duplicates{fooled}"
        )


def speed(rows: int) -> None:
    """What `add` takes an image, and a report of so many rows of 50 clients, who ask about 10 variants of an image."""
    rng = np.random.default_rng(0)
    for shape, batch, times in (((1, 28, 28), 1, 4000), ((1, 28, 28), 32, 300), ((3, 224, 224), 1, 300)):
        x = rng.random((batch, *shape)).astype(np.float32)
        scores = rng.normal(size=(batch, 10)).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            log, took = QueryLog(folder, rows=10**6), []
            for _ in range(times):
                start = time.perf_counter()
                log.add("client", x, scores, "logits")
                took.append((time.perf_counter() - start) / batch)
        median, high = 1e6 * statistics.median(took), 1e6 * float(np.quantile(took, 0.95))
        print(f"add {batch} x {shape}: {median:.0f} microseconds an image (95 % below {high:.0f})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        log = QueryLog(folder)
        for i in range(rows // 100):
            seeds = np.repeat(rng.random((10, 1, 28, 28)).astype(np.float32), 10, axis=0)
            x = np.clip(seeds + rng.normal(0, 0.02, seeds.shape).astype(np.float32), 0, 1)
            log.add(f"client {i % 50}", x, rng.normal(size=(100, 10)).astype(np.float32), "logits")
        log.close()
        size = sum(path.stat().st_size for path in Path(folder).glob("*.parquet"))
        clock = [time.perf_counter()]
        queries = read(folder)
        clock.append(time.perf_counter())
        found = watch(queries)
        clock.append(time.perf_counter())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{len(queries):,} rows of {size / len(queries):.0f} bytes: read and compared in {clock[1] - clock[0]:.1f} "
            f"s, judged in {clock[2] - clock[1]:.1f} s ({len(found.clients)} clients); most memory {peak:,.0f} MiB"
        )


def main() -> None:
    """Record, judge, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a new folder")
    parser.add_argument("--defense", choices=DEFENSES, default="terraces")
    parser.add_argument("--clients", type=int, default=10, help="of each kind")
    parser.add_argument("--pictures", type=int, default=5, help="that each attacker attacks")
    parser.add_argument("--budget", type=int, default=500, help="queries a picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="on other attacks and images")
    parser.add_argument(
        "--speed", type=int, metavar="ROWS", help="measure the cost instead, of a report of so many rows"
    )
    chosen = parser.parse_args()
    if chosen.speed:
        speed(chosen.speed)
        return
    if chosen.out is None or (chosen.out.exists() and any(chosen.out.glob("queries-*"))):
        raise ValueError(f"expected --out, a folder without a query log, but got {chosen.out}")
    log = QueryLog(chosen.out)
    clients = record(log, victim(chosen.defense), chosen)
    log.close()
    rows = judge(chosen.out, clients, chosen.budget)
    show(rows)
    settings = {key: value for key, value in vars(chosen).items() if key not in ("out", "speed")}
    content = {"settings": settings, "rows": rows, "clients": clients, "versions": provenance.versions()}
    files.write_text(chosen.out / "watch.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
