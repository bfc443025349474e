"""What protection costs behind the server, and what a server does under load.

python benchmarks/serve.py PROTECTED.onnx PLAIN.onnx              # latency and throughput of both, side by side
python benchmarks/serve.py PROTECTED.onnx --minutes 10            # load: each answer checked, memory watched

The files are those of `queryfoil export`, PLAIN.onnx without --fit. Servers and clients share the machine. Latency: the
requests of one client take turns between the two servers; those of several clients in rounds. Load: HTTP with JSON and
with bytes, and gRPC, batches of 1 to 4 images.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from numpy.typing import NDArray

from queryfoil import data, files, provenance
from queryfoil.deploy.kserving import pb
from queryfoil.deploy.served import about, session

CLIENTS = (1, 8, 32)
CALL = "/inference.GRPCInferenceService/ModelInfer"
HEADER = "inference-header-content-length"


@dataclass
class Server:
    """A running `queryfoil serve`."""

    process: psutil.Process
    host: str
    port: int
    name: str
    grpc: str


@contextmanager
def serving(file: Path, *options: str) -> Iterator[Server]:
    """Serve a file in a process on free ports."""
    command = [sys.executable, "-m", "queryfoil.cli", "serve", str(file), "--port", "0", "--grpc-port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.search(r"http://([^:/]+):(\d+)/v2/models/(\S+) and gRPC at (\S+);", line)
        if not found:
            raise SystemExit(f"the server did not start: {line}")
        try:
            yield Server(psutil.Process(running.pid), found[1], int(found[2]), found[3], found[4])
        finally:
            running.terminate()


@dataclass(frozen=True)
class Asked:
    """A request as bytes for each way to send it, and the scores that the file gives without a server."""

    ways: dict[str, bytes]
    scores: NDArray[np.float32]


def requests(file: Path, name: str, count: int, most: int) -> list[Asked]:
    """Requests with 1 to `most` images each: shipped ones, or noise for a model of other sizes."""
    rng, here, found = np.random.default_rng(0), session(file), []
    images = data.load("fashion-mnist", "attack").images.numpy()
    if (shape := about(file, here, unprotected=True).input_shape) != images.shape[1:]:
        images = rng.random((8, *shape), np.float32)
    for _ in range(count):
        x = images[rng.integers(len(images), size=rng.integers(1, most + 1))]
        one: dict[str, Any] = {"name": "images", "shape": list(x.shape), "datatype": "FP32"}
        raw = x.tobytes()
        text = json.dumps({"inputs": [{**one, "parameters": {"binary_data_size": len(raw)}}],
                           "parameters": {"binary_data_output": True}}).encode()  # fmt: skip
        plain = json.dumps({"inputs": [{**one, "data": x.ravel().tolist()}]}).encode()
        message = pb.ModelInferRequest(model_name=name, inputs=[one], raw_input_contents=[raw])
        ways = {
            "bytes": http(name, text + raw, len(text)),
            "json": http(name, plain),
            "grpc": message.SerializeToString(),
        }
        found.append(Asked(ways, here.run(["scores"], {"images": x})[0]))
    return found


def http(name: str, body: bytes, length: int | None = None) -> bytes:
    """An HTTP request."""
    lines = [f"POST /v2/models/{name}/infer HTTP/1.1", "host: localhost", f"content-length: {len(body)}"]
    lines += [] if length is None else [f"{HEADER}: {length}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Line:
    """A client with a connection of its own; asks one thing at a time."""

    def __init__(self, server: Server, way: str) -> None:
        self.server, self.way = server, way

    async def __aenter__(self) -> "Line":
        if self.way == "grpc":
            self.channel = grpc.aio.insecure_channel(self.server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
            self.call = self.channel.unary_unary(CALL)
        else:
            self.reader, self.writer = await asyncio.open_connection(self.server.host, self.server.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self.way == "grpc":
            await self.channel.close()
        else:
            self.writer.close()

    async def ask(self, asked: Asked) -> bytes:
        """The answer as it comes; SystemExit for a refusal."""
        if self.way == "grpc":
            answer: bytes = await self.call(asked.ways["grpc"], timeout=60)
            return answer
        self.writer.write(asked.ways[self.way])
        head = await self.reader.readuntil(b"\r\n\r\n")
        body = await self.reader.readexactly(int(re.search(rb"\r\ncontent-length: (\d+)", head)[1]))  # type: ignore[index]
        if b" 200 " not in head[:20]:
            raise SystemExit(f"refused: {body!r}")
        length = re.search(rb"inference-header-content-length: (\d+)", head)
        return body[int(length[1]) :] if length else body

    def scores(self, answer: bytes, asked: Asked) -> NDArray[np.float32]:
        """The scores of an answer."""
        if self.way == "json":
            flat = np.array(json.loads(answer)["outputs"][0]["data"], np.float32)
        else:
            raw = pb.ModelInferResponse.FromString(answer).raw_output_contents[0] if self.way == "grpc" else answer
            flat = np.frombuffer(raw, "<f4")
        return flat.reshape(asked.scores.shape)


async def turns(servers: list[Server], asked: list[list[Asked]], count: int) -> list[list[float]]:
    """Seconds of each request of one client that takes turns between servers."""
    seconds: list[list[float]] = [[] for _ in servers]
    lines = [await Line(server, "bytes").__aenter__() for server in servers]
    for i in range(count):
        for which in range(len(servers)) if i % 2 else reversed(range(len(servers))):
            start = time.perf_counter()
            await lines[which].ask(asked[which][i % len(asked[which])])
            seconds[which].append(time.perf_counter() - start)
    for line in lines:
        await line.__aexit__()
    return seconds


async def together(server: Server, asked: list[Asked], clients: int, seconds: float) -> list[float]:
    """Seconds of each request of several clients within a time."""
    found: list[float] = []
    end = time.perf_counter() + seconds

    async def client(first: int) -> None:
        async with Line(server, "bytes") as line:
            i = first
            while (start := time.perf_counter()) < end:
                await line.ask(asked[i % len(asked)])
                found.append(time.perf_counter() - start)
                i += 1

    await asyncio.gather(*(client(7 * k) for k in range(clients)))
    return found


def row(seconds: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    return {f"p{q}": 1000 * float(np.percentile(seconds, q)) for q in (50, 95, 99)}


def interval(values: list[float]) -> list[float]:
    """95 % of the medians of values drawn again."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    return [float(v) for v in np.percentile(np.median(drawn, axis=1), [2.5, 97.5])]


def compare(
    protected: Path, plain: Path, seconds: float, rounds: int, clients: Sequence[int], requests_each: int
) -> list[dict[str, Any]]:
    """Latency and throughput of both, for each number of clients."""
    rows = []
    with serving(protected) as first, serving(plain, "--unprotected") as second:
        pair = [first, second]
        asked = [requests(file, server.name, 64, 1) for file, server in ((protected, first), (plain, second))]
        for many in clients:
            times: list[list[float]] = [[], []]
            medians, rates = [], []
            for _ in range(rounds):
                if many == 1:
                    now = asyncio.run(turns(pair, asked, requests_each))
                else:
                    now = [asyncio.run(together(*part, many, seconds)) for part in zip(pair, asked, strict=True)]
                medians.append([1000 * statistics.median(one) for one in now])
                rates.append([len(one) / (sum(one) / many) for one in now])
                for all_times, new in zip(times, now, strict=True):
                    all_times += new
            more = [a - b for a, b in medians]
            both = {"protected": row(times[0]), "plain": row(times[1])}
            more_ms, ratio = statistics.median(more), statistics.median(a / b for a, b in medians)
            rate, throughput = [statistics.median(r) for r in zip(*rates, strict=True)], [a / b for a, b in rates]
            low, high = interval(more)
            rows.append({
                "clients": many, **both, "p50_more_ms": more_ms, "p50_more_ms_interval": [low, high],
                "p50_ratio": ratio, "requests_per_second": rate,
                "throughput_ratio": statistics.median(throughput), "n": len(times[0]),
            })  # fmt: skip
            each = "; ".join(f"{q} {both['protected'][q]:.2f} and {both['plain'][q]:.2f} ms" for q in both["plain"])
            print(
                f"{many:3} clients: {each}; p50 {more_ms:+.3f} ms ({low:+.3f} to {high:+.3f}), ratio {ratio:.4f}; "
                f"{rate[0]:.0f} and {rate[1]:.0f} requests/s, ratio {statistics.median(throughput):.3f}; "
                f"n = {len(times[0])}",
                flush=True,
            )
    return rows


async def load(server: Server, asked: list[Asked], clients: int, minutes: float) -> dict[str, Any]:
    """Ask for some minutes; how many answers were right, and the server's memory in MB, every 10 seconds."""
    counts: Counter[str] = Counter()
    memory: list[float] = []
    end = time.monotonic() + 60 * minutes

    async def client(k: int) -> None:
        rng = np.random.default_rng(k)
        async with Line(server, ("bytes", "json", "grpc", "bytes")[k % 4]) as line:
            while time.monotonic() < end:
                one = asked[rng.integers(len(asked))]
                scores = line.scores(await line.ask(one), one)
                counts["requests"] += 1
                counts["images"] += len(scores)
                counts["equal bit for bit"] += int(np.array_equal(scores, one.scores))
                counts["wrong"] += int(not np.allclose(scores, one.scores, rtol=0, atol=1e-5))

    async def watch() -> None:
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(10, left))
            memory.append(server.process.memory_info().rss / 1e6)
            print(f"{end - time.monotonic():5.0f} s left: {dict(counts)}, {memory[-1]:.1f} MB", flush=True)

    await asyncio.gather(watch(), *(client(k) for k in range(clients)))
    warm = memory[min(6, len(memory) // 4)]  # after a minute
    grown = memory[-1] / warm - 1
    return {**counts, "memory_mb": memory, "memory_after_a_minute": warm, "memory_grown": grown}


def main() -> None:
    """Compare two files, or load one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protected", type=Path)
    parser.add_argument("plain", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, help="load instead of comparison")
    parser.add_argument("--clients", type=int, nargs="+", help="of the comparison, 1, 8 and 32; of the load, 32")
    parser.add_argument("--requests", type=int, default=500, help="of the single client, to each, in a round")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round of the comparison")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--options", default="", help="of `queryfoil serve` for the load, such as '--query-log DIR'")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if (chosen.minutes is None) != (chosen.plain is not None):
        parser.error("expected a second file for a comparison, or --minutes for a load")
    if chosen.minutes is None:
        found: Any = compare(
            chosen.protected, chosen.plain, chosen.seconds, chosen.rounds, chosen.clients or CLIENTS, chosen.requests
        )
    else:
        with serving(chosen.protected, *chosen.options.split()) as server:
            asked = requests(chosen.protected, server.name, 256, 4)
            found = asyncio.run(load(server, asked, (chosen.clients or [32])[0], chosen.minutes))
        print(
            f"{found['requests']:,} requests, {found['wrong']} wrong, {found['equal bit for bit']:,} bit for bit; "
            f"memory {found['memory_after_a_minute']:.1f} MB after a minute, {found['memory_mb'][-1]:.1f} MB at the end"
            f" ({100 * found['memory_grown']:+.1f} %)"
        )
    if chosen.out:
        files.write_text(chosen.out, json.dumps({"found": found, "versions": provenance.versions()}, indent=1) + "\n")
    if chosen.minutes is not None and (found["wrong"] or found["memory_grown"] > 0.05):
        raise SystemExit("a wrong answer, or memory that grows")


if __name__ == "__main__":
    main()
