"""Scores a batch of requests: histories from Redis, encoding, one run of the model.

Shapes: B requests, C candidates, L history length.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from contract.catalogue import UNKNOWN_ROW
from contract.encoding import ModelInputs, encode, stack_candidates
from contract.records import RECORD_BYTES
from service.errors import (
    CorruptHistoryError,
    HistoryUnavailableError,
    ModelFailedError,
    ServiceError,
)
from service.history import HistoryStore
from service.metrics import Metrics
from service.model import Model


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
class Scored:
    """Scores float32 [C] in the order asked, and where the time went (seconds by stage)."""

    scores: NDArray[np.float32]
    history_length: int
    unknown_candidates: int
    degraded: bool
    seconds: dict[str, float] = field(default_factory=dict)


class BatchScorer:
    """Scores batches with one model on one device.

    `on_redis_failure`: "refuse" fails every request that needs Redis, "cold" scores it with an
    empty history.
    """

    def __init__(
        self,
        model: Model,
        history: HistoryStore,
        metrics: Metrics,
        *,
        on_redis_failure: Literal["refuse", "cold"],
    ) -> None:
        self.model = model
        self._history = history
        self._metrics = metrics
        self._cold = on_redis_failure == "cold"
        # One thread for the device: runs never overlap, and the event loop stays free.
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    def close(self) -> None:
        """End the device's thread after the run in flight."""
        self._device.shutdown()

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Scored | ServiceError]:
        """Return an answer for each request; one that fails does not fail the others."""
        started = time.perf_counter()
        histories, degraded = await self._histories(requests)
        fetched = time.perf_counter()
        answers: list[Scored | ServiceError] = [
            history if isinstance(history, ServiceError) else ModelFailedError("not scored")
            for history in histories
        ]
        readable = [b for b, history in enumerate(histories) if isinstance(history, bytes)]
        raw = [history for history in histories if isinstance(history, bytes)]
        if raw:
            inputs, corrupt_B = self._encode([requests[b] for b in readable], raw)
            encoded = time.perf_counter()
            scores_BC = await self._infer(inputs)
            inferred = time.perf_counter()
            seconds = {
                "fetch": fetched - started,
                "encode": encoded - fetched,
                "infer": inferred - encoded,
            }
            finite_BC = np.isfinite(scores_BC)
            for row, b in enumerate(readable):
                answers[b] = self._answer(
                    requests[b],
                    scores_BC[row],
                    n_behaviors=len(raw[row]) // RECORD_BYTES,
                    is_corrupt=bool(corrupt_B[row]),
                    is_finite=bool(finite_BC[row].all()),
                    candidate_rows_C=inputs.candidate_items[row],
                    degraded=degraded and requests[b].history is None,
                    seconds=seconds,
                )
        self._metrics.batch_requests.observe(len(requests))
        n_corrupt = sum(isinstance(answer, CorruptHistoryError) for answer in answers)
        self._metrics.corrupt_histories.inc(n_corrupt)
        return answers

    async def _histories(
        self, requests: Sequence[ScoreRequest]
    ) -> tuple[list[bytes | ServiceError], bool]:
        length = self.model.manifest.features.history_length
        asked = [request.user_id for request in requests if request.history is None]
        users = list(dict.fromkeys(asked))
        degraded = False
        found: dict[str, bytes | ServiceError] = {}
        try:
            found.update(zip(users, await self._history.fetch(users, length), strict=True))
        except HistoryUnavailableError as error:
            degraded = self._cold
            found = dict.fromkeys(users, b"" if self._cold else error)
        return [
            found[request.user_id]
            if request.history is None
            else request.history[-RECORD_BYTES * length :]
            for request in requests
        ], degraded

    def _encode(
        self, requests: Sequence[ScoreRequest], histories: Sequence[bytes]
    ) -> tuple[ModelInputs, NDArray[np.bool_]]:
        # Padding contributes nothing to a score, so a batch is as wide as its longest history.
        longest = max(len(raw) for raw in histories) // RECORD_BYTES
        return encode(
            histories,
            stack_candidates([request.candidates for request in requests]),
            np.array([request.ranking_time for request in requests], dtype=np.int64),
            self.model.catalogue,
            self.model.manifest.features,
            length=max(1, longest),
        )

    async def _infer(self, inputs: ModelInputs) -> NDArray[np.float32]:
        loop = asyncio.get_running_loop()
        try:
            scores_BC = await loop.run_in_executor(self._device, self.model.run, inputs)
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise ModelFailedError(f"the model failed: {error}") from error
        if scores_BC.shape != inputs.candidate_items.shape:
            raise ModelFailedError(
                f"the model gave scores of shape {scores_BC.shape}, expected "
                f"{inputs.candidate_items.shape}"
            )
        return scores_BC

    def _answer(
        self,
        request: ScoreRequest,
        scores_C: NDArray[np.float32],
        *,
        n_behaviors: int,
        is_corrupt: bool,
        is_finite: bool,
        candidate_rows_C: NDArray[np.int64],
        degraded: bool,
        seconds: dict[str, float],
    ) -> Scored | ServiceError:
        if is_corrupt:
            return CorruptHistoryError(
                f"the history of user {request.user_id!r} cannot be read: it holds an item id "
                "below 1"
            )
        if not is_finite:
            return ModelFailedError("the model gave a score that is not a finite number")
        return Scored(
            scores=scores_C[: len(request.candidates)],
            history_length=n_behaviors,
            unknown_candidates=int((candidate_rows_C == UNKNOWN_ROW).sum()),
            degraded=degraded,
            seconds=seconds,
        )
