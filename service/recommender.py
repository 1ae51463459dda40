"""Ranks the whole catalogue for one user at a time, block by block between the batches of /score.

Every block is a run of the same graph with B = 1 request. The user's vector is computed anew in
each: next to tens of thousands of candidates it costs little.

Shapes: C items of a block, N items in general.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import numpy as np
from numpy.typing import NDArray

from contract.catalogue import FIRST_ROW
from contract.records import RECORD
from service.errors import (
    ClientLeft,
    DeadlineExceededError,
    DeviceMemoryError,
    NotRecommendableError,
    OverloadedError,
)
from service.logs import log_event
from service.memory_limit import MemoryLimit
from service.metrics import ArmMetrics
from service.scorer import BatchScorer, Prepared, ScoreRequest

# Rows and their scores.
_Best = tuple[NDArray[np.int64], NDArray[np.float32]]

_log = logging.getLogger(__name__)

_NONE = np.empty(0, dtype=np.int64)
# The first run allocates; the second one tells what a block takes.
_WARM_RUNS = 2
# How much of a running mean the latest block is.
_LATEST_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RecommendRequest:
    """The `k` best items for a user at `ranking_time` (unix seconds).

    `exclude_seen`: without those that stand in the stored history.
    """

    user_id: str
    k: int
    exclude_seen: bool
    ranking_time: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommended:
    """Item ids int64 [N] and their scores float32 [N], best first, and where the time went.

    `seconds`: by stage; `queue` is the waiting for the device, `infer` all runs together.
    """

    item_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    history_length: int
    degraded: bool
    seconds: dict[str, float]


class Recommender:
    """The way of a catalogue to the device.

    `lend`: gives the device for one block, of which it is told the expected seconds. `block_items`:
    the most items of one run; all runs have one size, so that what was allocated is used again, but
    for a smaller one while the device has no memory for it.
    """

    def __init__(
        self,
        scorer: BatchScorer,
        *,
        lend: Callable[[float], AbstractAsyncContextManager[None]],
        block_items: int,
        metrics: ArmMetrics,
    ) -> None:
        self._scorer = scorer
        self._catalogue = scorer.model.catalogue
        self._lend = lend
        self._metrics = metrics
        self._n_items = len(self._catalogue)
        # Blocks of one size that waste nothing in the last one.
        n_blocks = max(1, ceil(self._n_items / block_items))
        self._block_items = MemoryLimit(max(1, ceil(self._n_items / n_blocks)))
        # One request after the other: side by side, all of them would be late.
        self._turn = asyncio.Lock()
        self._n_inside = 0
        # Running means of a block: on the device, and with the wait for it. 0 before the first.
        self._run_s = 0.0
        self._block_s = 0.0

    async def warm_up(self) -> None:
        """Run a block as wide as a full history, where the model can recommend at all."""
        if self._scorer.model.manifest.score_kind != "affinity" or not self._n_items:
            return
        features = self._scorer.model.manifest.features
        nobody = Prepared(
            history_items=np.zeros(features.history_length, dtype=np.int64),
            history_buckets=np.zeros(
                (features.history_length, len(features.granularities)), dtype=np.int64
            ),
            candidate_items=_NONE,
            unknown_candidates=0,
            degraded=False,
            began=0.0,
            fetch_s=0.0,
            encode_s=0.0,
        )
        n_run = 0
        while n_run < _WARM_RUNS:
            rows_C = self._rows(0)
            try:
                _, self._run_s = await self._scorer.run_alone(
                    replace(nobody, candidate_items=rows_C), len
                )
                n_run += 1
            except DeviceMemoryError:
                if len(rows_C) == 1:
                    raise
                self._ask_for_less(len(rows_C))
        self._block_s = self._run_s

    async def recommend(
        self,
        request: RecommendRequest,
        *,
        deadline: float,
        has_left: Callable[[], Awaitable[bool]],
    ) -> Recommended:
        """Return the best items of the catalogue; of equal scores the smaller item id comes first.

        `deadline`: on the clock of `time.perf_counter`. `has_left`: asked before every block.

        Raises NotRecommendableError for a model of click probabilities, OverloadedError at once
        when the deadline cannot be met, DeadlineExceededError and ClientLeft between two blocks,
        and what reading the history and running the model raise.
        """
        manifest = self._scorer.model.manifest
        if manifest.score_kind != "affinity":
            raise NotRecommendableError(
                f"{manifest.model_name} gives the {manifest.score_kind} of a click on a candidate, "
                "reading the history anew for each: a catalogue is ranked by models whose scores "
                "are affinities"
            )
        self._refuse_what_cannot_be_met(deadline)
        self._n_inside += 1
        try:
            return await self._recommend(request, deadline, has_left)
        finally:
            self._n_inside -= 1

    async def _recommend(
        self,
        request: RecommendRequest,
        deadline: float,
        has_left: Callable[[], Awaitable[bool]],
    ) -> Recommended:
        user, records = await self._scorer.prepare_alone(
            ScoreRequest(
                user_id=request.user_id, candidates=_NONE, ranking_time=request.ranking_time
            ),
            whole=request.exclude_seen,
        )
        seen_rows = self._rows_of(records) if request.exclude_seen else _NONE
        blocks: list[_Best] = []
        waited_s = infer_s = 0.0
        asked = time.perf_counter()
        first = 0
        async with self._turn:
            waited_s += time.perf_counter() - asked
            while first < self._n_items:
                await self._check_wanted(first, deadline, has_left)
                began = time.perf_counter()
                rows_C = self._rows(first)
                pick = partial(
                    _best_of_block,
                    rows_C,
                    first_row=FIRST_ROW + first,
                    k=request.k,
                    seen_rows=seen_rows,
                )
                try:
                    async with self._lend(self._run_s):
                        waited_s += time.perf_counter() - began
                        best, run_s = await self._scorer.run_alone(
                            replace(user, candidate_items=rows_C), pick
                        )
                except DeviceMemoryError:
                    if len(rows_C) == 1:
                        raise
                    self._ask_for_less(len(rows_C))
                    continue
                first += len(rows_C)
                blocks.append(best)
                infer_s += run_s
                self._run_s = _mean(self._run_s, run_s)
                self._block_s = _mean(self._block_s, time.perf_counter() - began)
        rows_N, scores_N = _best_of_all(blocks, request.k)
        return Recommended(
            item_ids=self._catalogue.item_ids[rows_N - FIRST_ROW],
            scores=scores_N,
            history_length=len(user.history_items),
            degraded=user.degraded,
            seconds={
                "fetch": user.fetch_s,
                "encode": user.encode_s,
                "infer": infer_s,
                "queue": waited_s,
            },
        )

    def _rows(self, first: int) -> NDArray[np.int64]:
        """Return the rows [C] of the block that scores the catalogue from `first` on.

        The last one begins early enough to be as long as all others: what stands in the one before
        too is scored twice.
        """
        size = min(self._block_items.value, self._n_items)
        first = min(first, self._n_items - size)
        return np.arange(FIRST_ROW + first, FIRST_ROW + first + size)

    def _n_blocks_from(self, first: int) -> int:
        return ceil((self._n_items - first) / self._block_items.value)

    def _ask_for_less(self, n_items: int) -> None:
        if self._block_items.lower(n_items):
            log_event(
                _log,
                logging.WARNING,
                "device-out-of-memory",
                arm=self._metrics.arm,
                version=self._metrics.version,
                failed_items=n_items,
                block_items=self._block_items.value,
            )

    def _rows_of(self, records: bytes) -> NDArray[np.int64]:
        return self._catalogue.rows(np.frombuffer(records, dtype=RECORD)["item"])

    def _refuse_what_cannot_be_met(self, deadline: float) -> None:
        # Who finds nobody before him is taken whatever it takes: a prediction that has gone wrong
        # must meet the truth again.
        if not self._n_inside:
            return
        left_s = deadline - time.perf_counter()
        predicted_s = (self._n_inside + 1) * self._n_blocks_from(0) * self._block_s
        if predicted_s > left_s:
            self._metrics.count_dropped("hopeless")
            raise OverloadedError(
                f"the answer would take up to {1000 * predicted_s:.1f} ms, the deadline is in "
                f"{1000 * left_s:.1f} ms"
            )

    async def _check_wanted(
        self, first: int, deadline: float, has_left: Callable[[], Awaitable[bool]]
    ) -> None:
        if await has_left():
            self._metrics.count_dropped("client left")
            raise ClientLeft
        n_blocks = self._n_blocks_from(first)
        predicted_s = n_blocks * self._block_s if self._n_inside > 1 else 0.0
        if time.perf_counter() + predicted_s > deadline:
            self._metrics.count_dropped("deadline")
            raise DeadlineExceededError(
                f"{n_blocks} of {self._n_blocks_from(0)} blocks of the catalogue are not scored, "
                "and the deadline cannot be met"
            )


def highest(scores_N: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the places of the `k` highest scores, ascending; all places where there are fewer.

    Of equal scores the first are taken. Scores must not be NaN.

    >>> highest(np.array([3.0, 1.0, 3.0, 2.0, 3.0], dtype=np.float32), 2).tolist()
    [0, 2]
    """
    if k >= len(scores_N):
        return np.arange(len(scores_N))
    # argpartition alone would take any of those that equal the k-th.
    kth = np.partition(scores_N, -k)[-k]
    above = np.flatnonzero(scores_N > kth)
    equal = np.flatnonzero(scores_N == kth)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _best_of_block(
    rows_C: NDArray[np.int64],
    scores_C: NDArray[np.float32],
    *,
    first_row: int,
    k: int,
    seen_rows: NDArray[np.int64],
) -> _Best:
    """Return the best of contiguous rows, ascending: from `first_row` on, none of `seen_rows`."""
    n_before = first_row - int(rows_C[0])
    rows_N, scores_N = rows_C[n_before:], scores_C[n_before:]
    seen_here = seen_rows[(seen_rows >= first_row) & (seen_rows <= rows_N[-1])]
    if seen_here.size:
        scores_N = scores_N.copy()
        scores_N[seen_here - first_row] = -np.inf
    places = highest(scores_N, k)
    places = places[scores_N[places] > -np.inf]
    return rows_N[places], scores_N[places]


def _best_of_all(blocks: Sequence[_Best], k: int) -> _Best:
    """Return the best of all blocks, best first, and the smaller row first where they are equal."""
    rows_N = np.concatenate([rows for rows, _ in blocks])
    scores_N = np.concatenate([scores for _, scores in blocks])
    places = highest(scores_N, k)
    # Rows ascend from block to block, and a stable sort keeps them so.
    places = places[np.argsort(-scores_N[places], kind="stable")]
    return rows_N[places], scores_N[places]


def _mean(mean: float, latest: float) -> float:
    return mean + _LATEST_SHARE * (latest - mean) if mean else latest
