"""Gathers requests into batches while the device is busy; it knows neither HTTP nor models.

No timer: an idle device takes what is there at once, a busy one lets the queue grow into a
larger batch. Batches are measured in work, and so is the queue.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.errors import DeadlineExceededError, OverloadedError, ServiceError
from service.metrics import Metrics

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


@dataclass(slots=True, kw_only=True)
class _Pending(Generic[RequestT, AnswerT]):
    request: RequestT
    width: int
    deadline: float
    entered: float
    answer: "asyncio.Future[tuple[AnswerT, float]]"


class Batcher(Generic[RequestT, AnswerT]):
    """One queue before one device.

    `run`: answers a batch, one batch at a time; an error it raises answers the whole batch.
    `width`: a request's own work (its candidates); a batch of B requests costs B times its widest
    request times `unit_work` (the history length), since all are padded to the widest.
    `max_batch_work`: of a batch, unless one request alone is larger. `max_queue_work`: of all
    that wait.
    """

    def __init__(
        self,
        run: Callable[[Sequence[RequestT]], Awaitable[Sequence[AnswerT | ServiceError]]],
        *,
        width: Callable[[RequestT], int],
        unit_work: int,
        max_batch_work: int,
        max_queue_work: int,
        metrics: Metrics,
    ) -> None:
        self._run = run
        self._width = width
        self._unit_work = unit_work
        self._max_batch_work = max_batch_work
        self._max_queue_work = max_queue_work
        self._metrics = metrics
        self._queue: deque[_Pending[RequestT, AnswerT]] = deque()
        self._queued_work = 0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take requests, within the running event loop."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End the worker; requests that wait are cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        while self._queue:
            self._queue.popleft().answer.cancel()

    async def submit(self, request: RequestT, *, deadline: float) -> tuple[AnswerT, float]:
        """Return the answer and the seconds that the request waited in the queue.

        `deadline`: on the clock of `time.perf_counter`; scoring must have begun by then. Raises
        OverloadedError, DeadlineExceededError, or the error that `run` gave for this request.
        """
        width = self._width(request)
        work = width * self._unit_work
        # A request that finds an empty queue is taken however large it is.
        if self._queue and self._queued_work + work > self._max_queue_work:
            self._metrics.dropped.labels("overloaded").inc()
            raise OverloadedError(
                f"{self._queued_work:,} units of work are waiting, "
                f"{self._max_queue_work:,} may wait"
            )
        pending = _Pending[RequestT, AnswerT](
            request=request,
            width=width,
            deadline=deadline,
            entered=time.perf_counter(),
            answer=asyncio.get_running_loop().create_future(),
        )
        self._queue.append(pending)
        self._count(work)
        self._arrived.set()
        return await pending.answer

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._take():
                await self._answer(batch)

    def _take(self) -> list[_Pending[RequestT, AnswerT]]:
        """Take the next batch off the queue; late requests and those nobody awaits are dropped."""
        batch: list[_Pending[RequestT, AnswerT]] = []
        widest = 0
        now = time.perf_counter()
        while self._queue:
            first = self._queue[0]
            is_live = not first.answer.done() and now <= first.deadline
            widened = max(widest, first.width)
            work = (len(batch) + 1) * widened * self._unit_work
            if is_live and batch and work > self._max_batch_work:
                break
            self._queue.popleft()
            self._count(-first.width * self._unit_work)
            if first.answer.done():
                self._metrics.dropped.labels("client left").inc()
            elif now > first.deadline:
                self._metrics.dropped.labels("deadline").inc()
                waited_ms = 1000 * (now - first.entered)
                first.answer.set_exception(
                    DeadlineExceededError(f"the request waited {waited_ms:.1f} ms in the queue")
                )
            else:
                batch.append(first)
                widest = widened
        return batch

    async def _answer(self, batch: Sequence[_Pending[RequestT, AnswerT]]) -> None:
        taken = time.perf_counter()
        answers: Sequence[AnswerT | BaseException]
        try:
            answers = await self._run([pending.request for pending in batch])
            assert len(answers) == len(batch), f"{len(answers)} answers to {len(batch)} requests"
        except asyncio.CancelledError:
            for pending in batch:
                pending.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, every waiter must hear of it
            answers = [error] * len(batch)
        for pending, answer in zip(batch, answers, strict=True):
            if pending.answer.done():  # the client left while its batch ran
                continue
            if isinstance(answer, BaseException):
                pending.answer.set_exception(answer)
            else:
                pending.answer.set_result((answer, taken - pending.entered))

    def _count(self, work: int) -> None:
        self._queued_work += work
        self._metrics.queued_work.set(self._queued_work)
