"""Gathers requests into batches before one device; it knows neither HTTP nor models.

Two stages, each of which takes what is there as soon as it is free, without a timer:

    submit -> [queue] -> prepare (reads histories) -> [ready] -> run (the device) -> answer

While the device runs one batch, the next one is being prepared; what is ready waits for the device
and grows into a larger batch. Batches are measured in work, and so is the queue. Between two
batches the device may be lent to something else, and it may be shared with other batchers.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Generic, TypeVar

from service.cost import BatchCost, Margin
from service.errors import (
    ClientLeft,
    DeadlineExceededError,
    DeviceMemoryError,
    OverloadedError,
    ServiceError,
)
from service.logs import log_event
from service.memory_limit import MemoryLimit
from service.metrics import ArmMetrics
from service.shapes import ShapeGrid
from service.turns import Seat

RequestT = TypeVar("RequestT")
PreparedT = TypeVar("PreparedT")
AnswerT = TypeVar("AnswerT")
InT = TypeVar("InT")
OutT = TypeVar("OutT")

_log = logging.getLogger(__name__)

# (candidates, history length) of a request.
Size = tuple[int, int]
# How much of the running mean of preparation times the latest one is.
_LATEST_SHARE = 0.05
# A client that was there so many seconds ago still is.
_ASKED_EVERY_S = 0.002
# Requests that one arm may hold: small ones have next to no work, and a shadow's nobody waits for.
_MOST_INSIDE = 10_000
# Of the admitted requests, no more shall be answered after their deadline.
_LATE_SHARE = 0.005


def _stays() -> bool:
    return False


@dataclass(slots=True, eq=False, kw_only=True)
class _Pending(Generic[RequestT, PreparedT, AnswerT]):
    request: RequestT
    size: Size
    work: int
    deadline: float
    entered: float
    has_left: Callable[[], bool]
    answer: "asyncio.Future[tuple[AnswerT, float]]"
    asked: float
    prepared: PreparedT | None = None
    preparation_s: float = 0.0


@dataclass(kw_only=True, eq=False)
class _Line(Generic[RequestT, PreparedT, AnswerT]):
    """Requests in order of arrival, and their work."""

    pending: "deque[_Pending[RequestT, PreparedT, AnswerT]]" = field(default_factory=deque)
    work: int = 0
    grew: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, pending: _Pending[RequestT, PreparedT, AnswerT]) -> None:
        self.pending.append(pending)
        self.work += pending.work
        self.grew.set()

    def take(self) -> _Pending[RequestT, PreparedT, AnswerT]:
        pending = self.pending.popleft()
        self.work -= pending.work
        return pending

    def put_back(self, batch: "list[_Pending[RequestT, PreparedT, AnswerT]]") -> None:
        self.pending.extendleft(reversed(batch))
        self.work += sum(pending.work for pending in batch)


class Batcher(Generic[RequestT, PreparedT, AnswerT]):
    """The way of requests to one device.

    `seat`: its place at the device.
    `prepare`, `run`: take a batch, one batch at a time each, and give as many results in the same
    order; an error they raise answers the whole batch, but for a DeviceMemoryError of `run` in a
    batch of several.
    `size`, `prepared_size`: candidates and history length, before and after preparation.
    `shapes`: what batches are padded to; their work is that of the padded shape.
    `cost`: learns what batches take, and predicts it.
    `short_s`: a batch that takes no longer may always grow. `margin_s`: the most that is kept free
    before a deadline because predictions err.
    `max_batch_work`: of a batch, unless one request alone is larger; less for a while after a batch
    for which the device had no memory, whose requests are run in smaller ones.
    `max_queue_work`: of all that wait.
    """

    def __init__(
        self,
        *,
        seat: Seat,
        prepare: Callable[[Sequence[RequestT]], Awaitable[Sequence[PreparedT | ServiceError]]],
        run: Callable[[Sequence[PreparedT]], Awaitable[Sequence[AnswerT | ServiceError]]],
        size: Callable[[RequestT], Size],
        prepared_size: Callable[[PreparedT], Size],
        shapes: ShapeGrid,
        cost: BatchCost,
        short_s: float,
        margin_s: float,
        max_batch_work: int,
        max_queue_work: int,
        metrics: ArmMetrics,
    ) -> None:
        self._seat = seat
        self._prepare = prepare
        self._run = run
        self._size = size
        self._prepared_size = prepared_size
        self._shapes = shapes
        self._cost = cost
        self._short_s = short_s
        self._max_batch_work = MemoryLimit(max_batch_work)
        self._max_queue_work = max_queue_work
        self._metrics = metrics
        self._queue: _Line[RequestT, PreparedT, AnswerT] = _Line()
        self._ready: _Line[RequestT, PreparedT, AnswerT] = _Line()
        self._device_took = asyncio.Event()
        self._awaited_turns_s = 0.0
        self._n_inside = 0
        self._preparing_work = 0
        self._n_preparing = 0
        self._preparation_s = 0.0
        self._margin = Margin(late_share=_LATE_SHARE, largest_s=margin_s)
        self._workers: list[asyncio.Task[None]] = []
        seat.waiting_s = self._waiting_s
        self._end_counting = metrics.before_scrape(self._count_waiting)

    def start(self) -> None:
        """Begin to take requests, within the running event loop."""
        self._workers = [
            asyncio.create_task(self._prepare_batches()),
            asyncio.create_task(self._run_batches()),
        ]

    async def stop(self) -> None:
        """End the workers and leave the device; requests that wait are cancelled."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for line in (self._queue, self._ready):
            while line.pending:
                line.take().answer.cancel()
        self._count_waiting()
        self._end_counting()
        self._seat.leave()

    def submit(
        self, request: RequestT, *, deadline: float, has_left: Callable[[], bool] = _stays
    ) -> "asyncio.Future[tuple[AnswerT, float]]":
        """Return the answer to come, with the seconds that the request waited for its turns.

        `deadline`: on the clock of `time.perf_counter`; the answer must be there by then.
        `has_left`: asked before the request costs anything; nobody waits any more when it is true.

        Raises OverloadedError at once when the queue is full or when the deadline cannot be met.
        The answer may be DeadlineExceededError, ClientLeft, or the error that `prepare` or
        `run` gave for this request.
        """
        now = time.perf_counter()
        size = self._size(request)
        work = self._shapes.round_up(1, *size).work
        if self._n_inside:  # a request that finds nobody before it is taken whatever it takes
            self._refuse_what_cannot_be_met(work, now, deadline)
        # Not `_Pending[...]`: that would cost more than all of its fields.
        pending: _Pending[RequestT, PreparedT, AnswerT] = _Pending(
            request=request,
            size=size,
            work=work,
            deadline=deadline,
            entered=now,
            asked=now,
            has_left=has_left,
            answer=asyncio.get_running_loop().create_future(),
        )
        self._n_inside += 1
        pending.answer.add_done_callback(lambda _: self._left(pending))
        self._queue.put(pending)
        return pending.answer

    @asynccontextmanager
    async def lend(self, expected_s: float) -> AsyncIterator[None]:
        """Wait until the device is free, and keep batches from it while the block runs.

        `expected_s`: seconds of the turn; requests that arrive meanwhile are admitted by it.
        """
        self._awaited_turns_s += expected_s
        try:
            await self._seat.acquire()
        finally:
            self._awaited_turns_s -= expected_s
        self._seat.expect(expected_s)
        try:
            yield
        finally:
            self._seat.release()

    def _left(self, pending: _Pending[RequestT, PreparedT, AnswerT]) -> None:
        self._n_inside -= 1
        answer = pending.answer
        if not answer.cancelled() and answer.exception() is None:
            # Called when the one who waits is: what the event loop adds is in it.
            self._margin.update(is_late=time.perf_counter() > pending.deadline)

    def _predicted_end(self, work: int, now: float) -> float:
        waiting = self._waiting_work() + work
        n_batches = min(self._n_inside + 1, ceil(waiting / max(1.0, self._batch_limit())))
        own_s = self._cost.predict(waiting, batches=n_batches)
        free = self._seat.free_at(now, own_s) + self._awaited_turns_s
        return max(now + self._preparation_s, free) + own_s

    def _refuse_what_cannot_be_met(self, work: int, now: float, deadline: float) -> None:
        waiting = self._waiting_work()
        if waiting and waiting + work > self._max_queue_work:
            self._metrics.count_dropped("overloaded")
            raise OverloadedError(
                f"{waiting:,} units of work are waiting, {self._max_queue_work:,} may wait"
            )
        if self._n_inside >= _MOST_INSIDE:
            self._metrics.count_dropped("overloaded")
            raise OverloadedError(f"{self._n_inside:,} requests are waiting, as many as may wait")
        predicted_end = self._predicted_end(work, now)
        if predicted_end + self._margin.value_s > deadline:
            self._metrics.count_dropped("hopeless")
            taken_s = predicted_end + self._margin.value_s - now
            raise OverloadedError(
                f"the answer would take up to {1000 * taken_s:.1f} ms, the deadline is in "
                f"{1000 * (deadline - now):.1f} ms"
            )

    def _waiting_work(self) -> int:
        return self._queue.work + self._preparing_work + self._ready.work

    def _waiting_s(self) -> float:
        waiting = self._waiting_work()
        return self._awaited_turns_s + (self._cost.predict(waiting) if waiting else 0.0)

    def _count_waiting(self) -> None:
        self._metrics.batch_work_limit.set(self._max_batch_work.value)
        self._metrics.queued_work.set(self._waiting_work())
        self._metrics.queued_requests.set(
            len(self._queue.pending) + self._n_preparing + len(self._ready.pending)
        )

    def _batch_limit(self) -> float:
        return min(self._max_batch_work.value, self._cost.worthwhile_work(self._short_s))

    async def _prepare_batches(self) -> None:
        while True:
            await self._queue.grew.wait()
            self._queue.grew.clear()
            # One turn of the event loop: what has arrived together is prepared together.
            await asyncio.sleep(0)
            while self._queue.pending:
                # More than the device's next batch need not be ready: it would only grow old.
                while self._ready.pending and self._ready.work >= self._batch_limit():
                    self._device_took.clear()
                    await self._device_took.wait()
                if batch := self._take_from_queue():
                    await self._prepare_batch(batch)
                else:
                    self._count_waiting()

    async def _run_batches(self) -> None:
        while True:
            await self._ready.grew.wait()
            self._ready.grew.clear()
            while self._ready.pending:
                # Before the batch is taken: it grows while the device is lent, and what has
                # become hopeless by then is dropped.
                async with self._seat:
                    batch = self._take_from_ready()
                    self._device_took.set()
                    self._count_waiting()
                    if batch:
                        await self._run_batch(batch)

    def _take_from_queue(self) -> list[_Pending[RequestT, PreparedT, AnswerT]]:
        batch: list[_Pending[RequestT, PreparedT, AnswerT]] = []
        now = time.perf_counter()
        work = 0
        while self._queue.pending:
            if batch and work + self._queue.pending[0].work > self._max_batch_work.value:
                break
            pending = self._queue.take()
            if self._is_wanted(pending, now):
                batch.append(pending)
                work += pending.work
        return batch

    def _take_from_ready(self) -> list[_Pending[RequestT, PreparedT, AnswerT]]:
        """Take the device's next batch: as large as pays, and as all in it can wait for."""
        batch: list[_Pending[RequestT, PreparedT, AnswerT]] = []
        now = time.perf_counter()
        limit = self._batch_limit()
        candidates, length, work = 0, 0, 0
        earliest = float("inf")
        while self._ready.pending:
            pending = self._ready.pending[0]
            wider = (max(candidates, pending.size[0]), max(length, pending.size[1]))
            larger = self._shapes.round_up(len(batch) + 1, *wider).work
            ends = now + self._cost.predict(larger)
            if batch and (larger > limit or ends > min(earliest, pending.deadline)):
                if self._is_wanted(pending, now):
                    break
                self._ready.take()
                continue
            self._ready.take()
            # Somebody is always served, be the prediction as bad as it may: it learns from that.
            is_last_hope = not (batch or self._ready.pending or self._queue.pending)
            if self._is_wanted(pending, now if is_last_hope else ends):
                batch.append(pending)
                (candidates, length), work = wider, larger
                earliest = min(earliest, pending.deadline)
        self._seat.expect(self._cost.predict(work))
        return batch

    def _is_wanted(
        self, pending: _Pending[RequestT, PreparedT, AnswerT], answered_by: float
    ) -> bool:
        if pending.answer.done() or self._has_left(pending):
            self._metrics.count_dropped("client left")
            if not pending.answer.done():
                pending.answer.set_exception(ClientLeft())
            return False
        if answered_by > pending.deadline:
            self._metrics.count_dropped("deadline")
            waited_ms = 1000 * (time.perf_counter() - pending.entered)
            pending.answer.set_exception(
                DeadlineExceededError(
                    f"the request waited {waited_ms:.1f} ms, and its deadline cannot be met"
                )
            )
            return False
        return True

    def _has_left(self, pending: _Pending[RequestT, PreparedT, AnswerT]) -> bool:
        now = time.perf_counter()
        if now - pending.asked < _ASKED_EVERY_S:
            return False
        pending.asked = now
        return pending.has_left()

    async def _prepare_batch(self, batch: list[_Pending[RequestT, PreparedT, AnswerT]]) -> None:
        started = time.perf_counter()
        self._preparing_work = sum(pending.work for pending in batch)
        self._n_preparing = len(batch)
        prepared = await self._results(self._prepare, batch, [one.request for one in batch])
        self._preparing_work = self._n_preparing = 0
        taken_s = time.perf_counter() - started
        self._preparation_s += _LATEST_SHARE * (taken_s - self._preparation_s)
        for pending, one in zip(batch, prepared, strict=True):
            if pending.answer.done():
                continue
            if isinstance(one, BaseException):
                pending.answer.set_exception(one)
                continue
            pending.prepared = one
            pending.preparation_s = taken_s
            pending.size = self._prepared_size(one)
            pending.work = self._shapes.round_up(1, *pending.size).work
            self._ready.put(pending)
        self._count_waiting()

    async def _run_batch(self, batch: list[_Pending[RequestT, PreparedT, AnswerT]]) -> None:
        started = time.perf_counter()
        ready = [pending.prepared for pending in batch if pending.prepared is not None]
        answers = await self._results(self._run, batch, ready)
        taken_s = time.perf_counter() - started
        widest = (max(one.size[0] for one in batch), max(one.size[1] for one in batch))
        work = self._shapes.round_up(len(batch), *widest).work
        if isinstance(answers[0], DeviceMemoryError):  # it was one run: all of them have it
            self._ask_for_less(work)
            if len(batch) > 1:
                # Taken again, they are fewer; and who cannot wait for that is told so.
                self._ready.put_back(batch)
                return
        else:
            self._cost.update(work, taken_s)
        for pending, answer in zip(batch, answers, strict=True):
            if pending.answer.done():  # the client left while its batch ran
                continue
            if isinstance(answer, BaseException):
                pending.answer.set_exception(answer)
            else:
                waited_s = started - pending.entered - pending.preparation_s
                pending.answer.set_result((answer, waited_s))

    def _ask_for_less(self, failed_work: int) -> None:
        if self._max_batch_work.lower(failed_work):
            log_event(
                _log,
                logging.WARNING,
                "device-out-of-memory",
                arm=self._metrics.arm,
                version=self._metrics.version,
                failed_work=failed_work,
                max_batch_work=self._max_batch_work.value,
            )

    async def _results(
        self,
        stage: Callable[[Sequence[InT]], Awaitable[Sequence[OutT | ServiceError]]],
        batch: list[_Pending[RequestT, PreparedT, AnswerT]],
        inputs: Sequence[InT],
    ) -> Sequence[OutT | BaseException]:
        try:
            results = await stage(inputs)
            assert len(results) == len(batch), f"{len(results)} results of {len(batch)} requests"
        except asyncio.CancelledError:
            for pending in batch:
                pending.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, every waiter must hear of it
            return [error] * len(batch)
        return results
