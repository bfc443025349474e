"""The command `queryfoil serve`."""

import os
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from queryfoil.terminal import console, errors, plainly

METRICS = "PROMETHEUS_MULTIPROC_DIR"  # read by the metrics' library when it is imported
TOKEN = "QUERYFOIL_TOKEN"
LOOPBACK = ("127.", "::1", "localhost")


@plainly
def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX file that `queryfoil export --to onnx` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of HTTP; 0 is any free one.")] = 8080,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of gRPC; 0 is any free one.")] = 8081,
    grpc: Annotated[bool, typer.Option("--grpc/--no-grpc", help="Serve gRPC beside HTTP, or HTTP alone.")] = True,
    name: Annotated[str | None, typer.Option(help="Name of the model in the routes; the file's if left out.")] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that answer HTTP; limits are for each. gRPC has one of its own.")
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Cores that one answer may use; others are for others.")] = 1,
    max_body: Annotated[
        int | None, typer.Option(min=1, help="Bytes of a request; what --max-batch images need, up to 64 MiB.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Images in a request.")] = 32,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests in hand at once; others get a 503.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds for a request to come in and be answered.")] = 30.0,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a line `NAME TOKEN` for each client, who sends `Authorization: Bearer TOKEN`. One token "
            f"can also come in the environment variable {TOKEN}. Without any, whoever reaches the server may ask."
        ),
    ] = None,
    decimals: Annotated[
        int | None, typer.Option("--round", min=1, max=6, help="Show probabilities of so many decimals.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", min=1, help="Show the probabilities of so many classes alone; the others share what is left."
        ),
    ] = None,
    query_log: Annotated[
        Path | None, typer.Option(help="Folder for a log of the queries, without images: see docs/watch.md.")
    ] = None,
    unprotected: Annotated[
        bool, typer.Option("--unprotected", help="Serve a file without a defense, as for a comparison.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug (a line a request), info, warning or error.")] = "info",
) -> None:
    """Serve a protected model over the Open Inference Protocol (v2): HTTP and gRPC, health, metadata, metrics.

    Stops on Ctrl-C after the requests in hand. docs/deploy.md has more.
    """
    with ExitStack() as until_stopped:
        if workers > 1:
            folder = tempfile.TemporaryDirectory(prefix="queryfoil-metrics-")
            os.environ[METRICS] = until_stopped.enter_context(folder)
        try:
            from queryfoil.deploy.limits import Limits
            from queryfoil.deploy.model import ProtectedModel
            from queryfoil.deploy.serve import Address, Server
        except ModuleNotFoundError as error:
            raise ValueError(
                f"serving needs the package {error.name}, which is not installed; install queryfoil[serve]"
            ) from None
        from queryfoil.deploy.logs import LEVELS
        from queryfoil.deploy.tokens import Tokens

        if log_level not in LEVELS:
            raise ValueError(f"expected --log-level {', '.join(LEVELS)}, but got {log_level!r}")
        called = name or file.stem
        if not re.fullmatch(r"[A-Za-z0-9._-]+", called):
            raise ValueError(f"expected a name of letters, digits, '.', '_' and '-', but got {called!r}; pass --name")
        given = os.environ.pop(TOKEN, None)
        if given is not None and token_file is not None:
            raise ValueError(f"expected --token-file or {TOKEN}, but got both; put all tokens into the file")
        tokens = Tokens.read(token_file) if token_file else Tokens.parse(given) if given is not None else None
        model = ProtectedModel(
            called, file, max_batch=max_batch, threads=threads, unprotected=unprotected, decimals=decimals,
            top_k=top_k, query_log=query_log,
        )  # fmt: skip
        limits = Limits.of(
            model.about, max_body=max_body, max_batch=max_batch, max_concurrent=max_concurrent, timeout=timeout
        )
        if tokens is None and not host.startswith(LOOPBACK):
            errors.print(
                f"warning: whoever reaches {host} may ask, as there is no token; pass --token-file or set {TOKEN}",
                style="yellow", markup=False, soft_wrap=True,
            )  # fmt: skip

        def ready(http: str, rpc: str | None) -> None:
            defense = f"protected by {model.about.defense}" if model.about.defense else "UNPROTECTED"
            also = f" and gRPC at {rpc}" if rpc else ""
            who = f"tokens of {len(tokens.digests)}" if tokens else "no token"
            console.print(
                f"serving {file} ({defense}; {model.about.output}; {who}) at http://{http}/v2/models/{called}{also}; "
                "Ctrl-C stops",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip

        place = Address(host, port, grpc_port if grpc else None)
        Server(place, limits, tokens, workers, log_level, ready).start([model])
        console.print("stopped", markup=False)
