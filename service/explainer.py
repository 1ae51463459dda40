"""Tells why: what each behavior weighed in the scores of a few candidates, one user at a time.

An explanation is one run of the bundle's explain graph, between two batches of `/score`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from contract.catalogue import UNKNOWN_ROW
from contract.records import RECORD
from service.errors import (
    ClientLeft,
    DeadlineExceededError,
    NotExplainableError,
    OverloadedError,
)
from service.metrics import ArmMetrics
from service.scorer import BatchScorer, ScoreRequest

# Those who wait hold their histories as they sent them.
_MOST_INSIDE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """Scores float32 [C], and the weights float32 [C, P, n] of n behaviors in each of P passes.

    `item_ids`, `times` [n]: the behaviors, oldest first. `known` [C]: whether the catalogue holds a
    candidate. `seconds`: by stage; `queue` is the waiting for other explanations and for the
    device.
    """

    scores: NDArray[np.float32]
    weights: NDArray[np.float32]
    item_ids: NDArray[np.int64]
    times: NDArray[np.uint32]
    known: NDArray[np.bool_]
    degraded: bool
    seconds: dict[str, float]


class Explainer:
    """The way of an explanation to the device. `lend`: gives the device for one run, of which it is
    told the expected seconds.
    """

    def __init__(
        self,
        scorer: BatchScorer,
        *,
        lend: Callable[[float], AbstractAsyncContextManager[None]],
        metrics: ArmMetrics,
    ) -> None:
        self._scorer = scorer
        self._lend = lend
        self._metrics = metrics
        # One after the other: those who look must not crowd out those who are served.
        self._turn = asyncio.Lock()
        self._places = asyncio.Semaphore(_MOST_INSIDE)
        self._run_s = 0.0

    async def explain(
        self,
        request: ScoreRequest,
        *,
        deadline: float,
        has_left: Callable[[], Awaitable[bool]],
    ) -> Explained:
        """Return the scores of a request and what they are made of.

        `deadline`: on the clock of `time.perf_counter`. `has_left`: asked before anything is read.

        Raises NotExplainableError where the bundle has no explain graph, OverloadedError at once
        where many wait already, DeadlineExceededError and ClientLeft when the turn comes too late,
        and what reading the history and the run raise.
        """
        if self._scorer.model.explain is None:
            manifest = self._scorer.model.manifest
            raise NotExplainableError(
                f"the bundle of {manifest.model_version} has no explain graph: exported from IMN "
                "by this version, it has one"
            )
        if self._places.locked():
            self._metrics.count_dropped("overloaded")
            raise OverloadedError(f"{_MOST_INSIDE} explanations are waiting, as many as may wait")
        async with self._places:
            return await self._explain(request, deadline, has_left)

    async def _explain(
        self, request: ScoreRequest, deadline: float, has_left: Callable[[], Awaitable[bool]]
    ) -> Explained:
        arrived = time.perf_counter()
        async with self._turn:
            await self._check_wanted(deadline, has_left)
            waited_s = time.perf_counter() - arrived
            one, records = await self._scorer.prepare_alone(request, whole=False)
            began = time.perf_counter()
            async with self._lend(self._run_s):
                waited_s += time.perf_counter() - began
                weighed = await self._scorer.explain_alone(one)
            self._run_s = weighed.infer_s
        behaviors = np.frombuffer(records, dtype=RECORD)
        return Explained(
            scores=weighed.scores,
            weights=weighed.weights,
            item_ids=behaviors["item"],
            times=behaviors["time"],
            known=one.candidate_items != UNKNOWN_ROW,
            degraded=one.degraded,
            seconds={
                "fetch": one.fetch_s,
                "encode": one.encode_s,
                "infer": weighed.infer_s,
                "queue": waited_s,
            },
        )

    async def _check_wanted(self, deadline: float, has_left: Callable[[], Awaitable[bool]]) -> None:
        if await has_left():
            self._metrics.count_dropped("client left")
            raise ClientLeft
        if time.perf_counter() > deadline:
            self._metrics.count_dropped("deadline")
            raise DeadlineExceededError("the deadline passed while others were explained")
