"""Scores batches of requests in two stages: histories and encoding, then one run of the model.

Shapes: B requests, C candidates, L history length.
"""

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from contract.catalogue import UNKNOWN_ROW
from contract.encoding import ModelInputs, encode, stack_candidates
from contract.records import RECORD_BYTES, history_in_time_order
from service.device import is_out_of_memory
from service.errors import (
    CorruptHistoryError,
    DeviceMemoryError,
    HistoryUnavailableError,
    ModelFailedError,
    ServiceError,
)
from service.history import HistoryStore
from service.metrics import ArmMetrics
from service.model import Model
from service.shapes import Shape

PickedT = TypeVar("PickedT")
ResultT = TypeVar("ResultT")
ArgumentTs = TypeVarTuple("ArgumentTs")

_DEVICE_NICE = 5
_NOT_FINITE = "the model gave a score that is not a finite number"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One user's candidates. `candidates`: int64 item ids [C]; `ranking_time`: unix seconds;
    `history`: records that came with the request, None to read them from Redis.
    """

    user_id: str
    candidates: NDArray[np.int64]
    ranking_time: int
    history: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An encoded request: rows [n], buckets [n, G] of its n behaviors, rows [C] of its candidates.

    `fetch_s`, `encode_s`: seconds that its batch took. `began`: when its batch did, on the clock of
    `time.perf_counter`.
    """

    history_items: NDArray[np.int64]
    history_buckets: NDArray[np.int64]
    candidate_items: NDArray[np.int64]
    unknown_candidates: int
    degraded: bool
    began: float
    fetch_s: float
    encode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores float32 [C] in the order asked, and where the time went (seconds by stage).

    `began`: when its batch was read, `ended`: when its batch was run, on the clock of
    `time.perf_counter`.
    """

    scores: NDArray[np.float32]
    history_length: int
    unknown_candidates: int
    degraded: bool
    began: float
    fetch_s: float
    encode_s: float
    infer_s: float
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """Scores float32 [C], and the weights float32 [C, P, n] of n behaviors in each of P passes."""

    scores: NDArray[np.float32]
    weights: NDArray[np.float32]
    infer_s: float


class _Read(NamedTuple):
    """A history that is scored with. `degraded`: empty, because Redis did not give the user's."""

    records: bytes
    degraded: bool = False


class _Run(NamedTuple):
    """One run of the model: scores float32 [B, C], padded; `cells` as they were run."""

    scores: NDArray[np.float32]
    cells: int
    started: float
    ended: float


class BatchScorer:
    """Scores batches with one model on one device.

    `device`: the device's one thread. `history_length`: behaviors that the model
    is given at most, None for all that it reads. `on_redis_failure`: "refuse" fails every request
    that needs Redis, "cold" scores it with an empty history. `fetch_timeout_s`,
    `fetch_alone_timeout_s`: seconds that reading a batch's histories, or that of a request alone,
    may take, where Redis' own time is longer.
    """

    def __init__(
        self,
        model: Model,
        history: HistoryStore,
        metrics: ArmMetrics,
        *,
        device: "DeviceThread",
        on_redis_failure: Literal["refuse", "cold"],
        history_length: int | None = None,
        fetch_timeout_s: float = math.inf,
        fetch_alone_timeout_s: float = math.inf,
    ) -> None:
        self.model = model
        self._history = history
        self._metrics = metrics
        self._length = history_length or model.manifest.features.history_length
        self._cold = on_redis_failure == "cold"
        self._device = device
        self._fetch_timeout_s = fetch_timeout_s
        self._fetch_alone_timeout_s = fetch_alone_timeout_s

    async def warm_up(self, max_work: int) -> list[tuple[int, float]]:
        """Run the shapes that will be served; return (work, seconds) of each.

        In the device's own thread: onnxruntime keeps captured CUDA graphs for each thread.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._device, self.model.warm_up, max_work)

    def size(self, request: ScoreRequest) -> tuple[int, int]:
        """Return the candidates and the most behaviors that a request can have."""
        length = self._length
        if request.history is not None:
            length = min(length, len(request.history) // RECORD_BYTES)
        return len(request.candidates), max(1, length)

    def prepared_size(self, prepared: Prepared) -> tuple[int, int]:
        """Return the candidates and behaviors of an encoded request; at least one behavior."""
        return len(prepared.candidate_items), max(1, len(prepared.history_items))

    async def prepare(self, requests: Sequence[ScoreRequest]) -> list[Prepared | ServiceError]:
        """Read and encode the histories; one that fails does not fail the others."""
        started = time.perf_counter()
        histories = await self._histories(requests)
        fetch_s = time.perf_counter() - started
        self._metrics.observe_stage("fetch", fetch_s)
        outcome: list[Prepared | ServiceError] = [
            history if isinstance(history, ServiceError) else ModelFailedError("not encoded")
            for history in histories
        ]
        readable = [b for b, history in enumerate(histories) if isinstance(history, _Read)]
        if readable:
            read = [history for history in histories if isinstance(history, _Read)]
            asked = [requests[b] for b in readable]
            encoded, encode_s = self._encode(asked, read, started, fetch_s)
            self._metrics.observe_stage("encode", encode_s)
            for b, one in zip(readable, encoded, strict=True):
                outcome[b] = one
        n_corrupt = sum(isinstance(one, CorruptHistoryError) for one in outcome)
        if n_corrupt:
            self._metrics.corrupt_histories.inc(n_corrupt)
        return outcome

    async def prepare_alone(self, request: ScoreRequest, *, whole: bool) -> tuple[Prepared, bytes]:
        """Read and encode the history of a request that joins no batch.

        Returns it with the records that were read: all that is stored where `whole`, otherwise
        what the model reads of them. Raises CorruptHistoryError or HistoryUnavailableError.
        """
        started = time.perf_counter()
        length = self._history.longest if whole else self._length
        stored = await self._stored(request, length)
        fetch_s = time.perf_counter() - started
        try:
            if isinstance(stored, ServiceError):
                raise stored
            newest = stored.records[-RECORD_BYTES * self._length :]
            read = _Read(newest, degraded=stored.degraded)
            (one,), _ = self._encode([request], [read], started, fetch_s)
            if isinstance(one, ServiceError):
                raise one
        except CorruptHistoryError:
            self._metrics.corrupt_histories.inc()
            raise
        return one, stored.records if whole else history_in_time_order(newest)

    async def run_alone(
        self, one: Prepared, pick: Callable[[NDArray[np.float32]], PickedT]
    ) -> tuple[PickedT, float]:
        """Score an encoded request in a run of its own; return `pick` of its scores [C], and the
        seconds of both.

        `pick` runs in the device's thread, and not in the event loop: there may be many scores.
        Raises ModelFailedError unless all of them are finite, DeviceMemoryError where there is no
        memory for so many candidates.
        """
        return await self._device.run(self._infer_alone, one, pick)

    async def explain_alone(self, one: Prepared) -> Weighed:
        """Score an encoded request by the explain graph, which the model must have.

        Raises ModelFailedError unless scores and weights are finite, and DeviceMemoryError.
        """
        return await self._device.run(self._explain, one)

    async def run(self, batch: Sequence[Prepared]) -> list[Scored | ServiceError]:
        """Score encoded requests in one run of the model.

        Raises DeviceMemoryError where there is no memory for so many of them, ModelFailedError
        where the model fails.
        """
        scores_BC, cells, started, ended = await self._device.run(self._infer, batch)
        infer_s = ended - started
        self._metrics.observe_stage("infer", infer_s)
        self._count(batch, cells)
        all_finite = bool(np.isfinite(scores_BC).all())
        return [
            Scored(
                scores=scores_C,
                history_length=len(one.history_items),
                unknown_candidates=one.unknown_candidates,
                degraded=one.degraded,
                began=one.began,
                fetch_s=one.fetch_s,
                encode_s=one.encode_s,
                infer_s=infer_s,
                ended=ended,
            )
            if all_finite or bool(np.isfinite(scores_C).all())
            else ModelFailedError(_NOT_FINITE)
            for one, scores_C in (
                (one, scores_BC[b, : len(one.candidate_items)]) for b, one in enumerate(batch)
            )
        ]

    def _count(self, batch: Sequence[Prepared], cells: int) -> None:
        metrics = self._metrics
        filled = sum(len(one.candidate_items) * len(one.history_items) for one in batch)
        metrics.batch_requests.observe(len(batch))
        metrics.batch_work.observe(cells)
        metrics.padding.inc(cells - filled)
        metrics.candidates.inc(sum(len(one.candidate_items) for one in batch))

    async def _histories(self, requests: Sequence[ScoreRequest]) -> list[_Read | ServiceError]:
        users = list(dict.fromkeys(one.user_id for one in requests if one.history is None))
        fetched = await self._history.fetch(users, self._length, timeout_s=self._fetch_timeout_s)
        if any(isinstance(one, HistoryUnavailableError) for one in fetched):
            self._metrics.fetch_failures.inc()
        found = dict(zip(users, map(self._by_policy, fetched), strict=True))
        return [
            found[request.user_id]
            if request.history is None
            else _Read(request.history[-RECORD_BYTES * self._length :])
            for request in requests
        ]

    async def _stored(self, request: ScoreRequest, length: int) -> _Read | ServiceError:
        if request.history is not None:
            return _Read(request.history[-RECORD_BYTES * length :])
        (fetched,) = await self._history.fetch(
            [request.user_id], length, timeout_s=self._fetch_alone_timeout_s
        )
        if isinstance(fetched, HistoryUnavailableError):
            self._metrics.fetch_failures.inc()
        return self._by_policy(fetched)

    def _by_policy(
        self, fetched: bytes | CorruptHistoryError | HistoryUnavailableError
    ) -> _Read | ServiceError:
        if isinstance(fetched, bytes):
            return _Read(fetched)
        if self._cold and isinstance(fetched, HistoryUnavailableError):
            return _Read(b"", degraded=True)
        return fetched

    def _encode(
        self,
        requests: Sequence[ScoreRequest],
        read: Sequence[_Read],
        began: float,
        fetch_s: float,
    ) -> tuple[list[Prepared | ServiceError], float]:
        started = time.perf_counter()
        histories = [one.records for one in read]
        lengths = [len(raw) // RECORD_BYTES for raw in histories]
        # Padding contributes nothing to a score, so a batch is as wide as its longest history.
        inputs, corrupt_B = encode(
            histories,
            stack_candidates([request.candidates for request in requests]),
            np.array([request.ranking_time for request in requests], dtype=np.int64),
            self.model.catalogue,
            self.model.manifest.features,
            length=max(1, *lengths),
        )
        n_unknown_B = (inputs.candidate_items == UNKNOWN_ROW).sum(axis=1).tolist()
        is_corrupt_B = corrupt_B.tolist()
        width = inputs.history_items.shape[1]
        encode_s = time.perf_counter() - started
        encoded: list[Prepared | ServiceError] = [
            CorruptHistoryError(
                f"the history of user {request.user_id!r} cannot be read: it holds an item id "
                "below 1"
            )
            if is_corrupt_B[b]
            else Prepared(
                history_items=inputs.history_items[b, width - lengths[b] :],
                history_buckets=inputs.history_buckets[b, width - lengths[b] :],
                candidate_items=inputs.candidate_items[b, : len(request.candidates)],
                unknown_candidates=n_unknown_B[b],
                degraded=read[b].degraded,
                began=began,
                fetch_s=fetch_s,
                encode_s=encode_s,
            )
            for b, request in enumerate(requests)
        ]
        return encoded, encode_s

    def _infer_alone(
        self, one: Prepared, pick: Callable[[NDArray[np.float32]], PickedT]
    ) -> tuple[PickedT, float]:
        started = time.perf_counter()
        scores_C = self._infer([one]).scores[0, : len(one.candidate_items)]
        if not np.isfinite(scores_C).all():
            raise ModelFailedError(_NOT_FINITE)
        return pick(scores_C), time.perf_counter() - started

    def _explain(self, one: Prepared) -> Weighed:
        started = time.perf_counter()
        assert self.model.explain is not None, "asked of a model that cannot"
        # A graph reads one behavior at least: padding where there is none.
        n_padding = int(not len(one.history_items))
        inputs = ModelInputs(
            history_items=np.pad(one.history_items, (n_padding, 0))[None],
            history_buckets=np.pad(one.history_buckets, ((n_padding, 0), (0, 0)))[None],
            candidate_items=one.candidate_items[None],
        )
        try:
            scores_BC, weights_BCPL = self.model.explain(inputs)
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            shape = Shape(1, len(one.candidate_items), n_padding + len(one.history_items))
            raise self._failure(error, shape) from error
        if not (np.isfinite(scores_BC).all() and np.isfinite(weights_BCPL).all()):
            raise ModelFailedError(_NOT_FINITE)
        return Weighed(
            scores=scores_BC[0],
            weights=weights_BCPL[0, :, :, n_padding:],
            infer_s=time.perf_counter() - started,
        )

    def _infer(self, batch: Sequence[Prepared]) -> _Run:
        """Pad the batch to a shape of the model's and run it, in the device's thread."""
        started = time.perf_counter()
        shape = self.model.shapes.round_up(
            len(batch),
            max(len(one.candidate_items) for one in batch),
            max(1, *(len(one.history_items) for one in batch)),
        )
        try:
            inputs = self.model.inputs(shape)
            for b, one in enumerate(batch):
                first = shape.length - len(one.history_items)
                inputs.history_items[b, first:] = one.history_items
                inputs.history_buckets[b, first:] = one.history_buckets
                inputs.candidate_items[b, : len(one.candidate_items)] = one.candidate_items
            scores_BC = self.model.run(inputs)
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise self._failure(error, shape) from error
        if scores_BC.shape != (shape.batch, shape.candidates):
            raise ModelFailedError(
                f"the model gave scores of shape {scores_BC.shape}, expected "
                f"{(shape.batch, shape.candidates)}"
            )
        return _Run(scores_BC, shape.work, started, time.perf_counter())

    def _failure(self, error: Exception, shape: Shape) -> ServiceError:
        if not is_out_of_memory(error):
            return ModelFailedError(f"the model failed: {error}")
        self._metrics.device_memory_failures.inc()
        return DeviceMemoryError(
            f"the device has no memory for a run of {shape.batch:,} requests with "
            f"{shape.candidates:,} candidates and {shape.length:,} behaviors each"
        )


class DeviceThread(ThreadPoolExecutor):
    """The one thread of a device: runs never overlap, and the event loop stays free.

    All models of a device share it: onnxruntime keeps captured CUDA graphs for each thread.

    `running_since`: when the present run began, on the clock of `time.perf_counter`; None between
    two. `failures`: runs in a row that failed, but for want of memory; `failing_since`: when the
    first of them did, None where the latest run did not fail. A warm-up, which takes what it takes,
    is no run.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1, thread_name_prefix="device", initializer=_step_back)
        self.running_since: float | None = None
        self.failing_since: float | None = None
        self.failures = 0

    def run(
        self, job: Callable[[*ArgumentTs], ResultT], *arguments: *ArgumentTs
    ) -> "asyncio.Future[ResultT]":
        """Return the result to come of a job in this thread, from within the event loop."""
        return asyncio.get_running_loop().run_in_executor(self, self._run, job, *arguments)

    def _run(self, job: Callable[[*ArgumentTs], ResultT], *arguments: *ArgumentTs) -> ResultT:
        self.running_since = time.perf_counter()
        try:
            result = job(*arguments)
        except DeviceMemoryError:
            raise
        except Exception:  # whatever it is: it is counted, and goes on to who asked
            if not self.failures:
                self.failing_since = time.perf_counter()
            self.failures += 1
            raise
        else:
            self.failing_since, self.failures = None, 0
            return result
        finally:
            self.running_since = None


def _step_back() -> None:
    """Let the event loop go first where it shares a core with the device's thread.

    A request that waits to be read is not seen, and so no prediction knows of it.
    """
    thread = threading.get_native_id()
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, nice + _DEVICE_NICE)
