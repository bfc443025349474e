"""The model of a service: images to the scores that are shown, behind any KServe server."""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from queryfoil.deploy.coarse import coarse
from queryfoil.deploy.drift import Drift
from queryfoil.deploy.kserving import InferOutput, InferRequest, InferResponse, InvalidInput, Model
from queryfoil.deploy.limits import CLIENT
from queryfoil.deploy.metrics import Metrics
from queryfoil.deploy.served import INPUT, OUTPUT, about, session
from queryfoil.deploy.tensors import RefusedError, Sent, images
from queryfoil.deploy.wire import check_outputs

log = logging.getLogger(__name__)


class Log(Protocol):
    """What the query log has to do."""

    def add(self, client: str, images: NDArray[np.float32], scores: NDArray[np.float32], output: str) -> None: ...
    def close(self) -> None: ...


class InvalidError(InvalidInput):  # type: ignore[misc]
    """A refusal as KServe knows it."""

    def __init__(self, refusal: RefusedError) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class ProtectedModel(Model):  # type: ignore[misc]
    """A file of `queryfoil export --to onnx` as a model of KServe: `ModelServer().start([ProtectedModel(...)])`.

    name: in the routes. file: its graph has nothing but what is shown. max_batch: images a request. threads: cores that
    one answer may use; as many answers are computed at once as there are cores for. unprotected: take a file without a
    defense. decimals, top_k: show coarser probabilities (see `coarse`). query_log: folder for `QueryLog`.

    ValueError for a file that is not such a one, and for settings that it cannot have.
    """

    def __init__(
        self,
        name: str,
        file: str | Path,
        *,
        max_batch: int = 32,
        threads: int = 1,
        unprotected: bool = False,
        decimals: int | None = None,
        top_k: int | None = None,
        query_log: str | Path | None = None,
    ) -> None:
        super().__init__(name)
        self.settings = {
            "max_batch": max_batch, "threads": threads, "unprotected": unprotected, "decimals": decimals,
            "top_k": top_k, "query_log": query_log,
        }  # fmt: skip
        self.file, self.max_batch, self.threads, self.folder = Path(file), max_batch, threads, query_log
        self._session = session(self.file, threads)
        self.about = about(self.file, self._session, unprotected)
        self._coarse = coarse(self.about, decimals, top_k)
        self._pool = ThreadPoolExecutor(max(1, cores() // threads), "answer")
        self.metrics = Metrics(self.about)
        self._drift = Drift(self.about.shown_margins, self.about.output) if self.about.shown_margins else None
        self._log: Log | None = None if query_log is None else _query_log(query_log)
        self.load()

    def __reduce__(self) -> Any:  # a session cannot go to another process, but its file can
        return _again, (self.name, self.file, self.settings)

    @property
    def defense(self) -> str:
        """The name of the defense, "none" without one."""
        return self.about.defense or "none"

    @property
    def platform(self) -> str:
        """What a client is told about the model beside names and shapes: the defense's name."""
        return f"queryfoil_{self.defense}"

    def get_input_types(self) -> list[dict[str, Any]]:
        """Name, datatype and shape of the input."""
        return [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self.about.input_shape]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Name, datatype and shape of the output."""
        return [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, self.about.classes]}]

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        """An `InferRequest` with images to an `InferResponse` with their scores; `InvalidInput` for any other."""
        if not isinstance(payload, InferRequest):
            raise InvalidInput("expected a request of the Open Inference Protocol, version 2")
        sent = []
        for one in payload.inputs:
            raw = one._raw_data  # of a binary tensor
            sent.append(Sent(one.name, one.datatype, one.shape, one.data if raw is None else raw))
        try:
            check_outputs([one.name for one in payload.request_outputs or []])
            scores = await self._answer(images(sent, self.about, self.max_batch))
        except RefusedError as refusal:
            raise InvalidError(refusal) from None
        output = InferOutput(OUTPUT, list(scores.shape), "FP32")
        output.set_data_from_numpy(scores)  # as bytes: KServe makes of them what the client wants
        return InferResponse(
            payload.id or "", self.name, [output], use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )  # fmt: skip

    async def _answer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores (N, K) as they are shown, computed in a thread; stopped where nobody waits any more."""
        running = onnxruntime.RunOptions()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._shown, x, CLIENT.get(), running)
        except asyncio.CancelledError:
            running.terminate = True
            raise

    def _shown(self, x: NDArray[np.float32], client: str, running: Any) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = self._session.run([OUTPUT], {INPUT: x}, running)[0]
        finite = np.isfinite(scores).all(1)
        if not finite.all():
            raise RefusedError(
                "scores", f"the model has no finite scores for image {int(finite.argmin())} of the request"
            )
        if self._drift is not None and self._drift.add(scores):
            self.metrics.drift.labels(self.defense).set(self._drift.value or 0)
        if self._coarse is not None:
            scores = self._coarse(scores)
        self.metrics.images.inc(len(x))
        if self._log is not None:
            try:
                self._log.add(client, x, scores, self.about.output)
            except OSError as error:  # an answer is not lost for the log's sake
                self.metrics.unlogged.inc(len(x))
                log.error("the query log cannot be written: %s", error.strerror or type(error).__name__)
        return scores

    def close(self) -> None:
        """Wait for what is being computed, and write what the query log still holds."""
        self._pool.shutdown()
        if self._log is not None:
            self._log.close()


def _again(name: str, file: Path, settings: dict[str, Any]) -> ProtectedModel:
    return ProtectedModel(name, file, **settings)


def _query_log(folder: str | Path) -> Log:
    from queryfoil.deploy.querylog import QueryLog  # only where it is asked for: it needs pyarrow

    return QueryLog(folder)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
