"""The queue before the device. A request is a word, its work the number of its letters."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.batcher import Batcher
from service.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ServiceError,
)
from service.metrics import Metrics

PATIENCE_S = 5.0


class Device:
    """Answers a word in upper case; keeps all batches; runs only while `may_run` is set.

    Words in `refused` get an error of their own, those in `deadly` fail their whole batch, those
    in `forgotten` get no answer at all.
    """

    refused = frozenset({"refused"})
    deadly = frozenset({"deadly"})
    forgotten = frozenset({"forgotten"})

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.may_run = asyncio.Event()
        self.may_run.set()

    async def run(self, words: Sequence[str]) -> list[str | ServiceError]:
        self.batches.append(list(words))
        await self.may_run.wait()
        if self.deadly & set(words):
            raise RuntimeError("the device burns")
        return [
            InvalidRequestError("refused") if word in self.refused else word.upper()
            for word in words
            if word not in self.forgotten
        ]


class Queue:
    """A batcher, its device and its metrics; requests begin as tasks and join the queue at once."""

    def __init__(self, **limits: int) -> None:
        self.device = Device()
        self.metrics = Metrics()
        self.batcher = Batcher[str, str](
            self.device.run,
            width=len,
            metrics=self.metrics,
            **{"unit_work": 1, "max_batch_work": 1000, "max_queue_work": 1000, **limits},
        )

    async def submit(self, word: str, *, within_s: float = PATIENCE_S) -> str:
        async with asyncio.timeout(PATIENCE_S):
            answer, _ = await self.batcher.submit(word, deadline=time.perf_counter() + within_s)
            return answer

    async def begin(self, *words: str, **options: Any) -> list["asyncio.Task[str]"]:
        """Submit each word in a task of its own; return when all of them have entered."""
        tasks = [asyncio.create_task(self.submit(word, **options)) for word in words]
        await _let_run()
        return tasks

    @asynccontextmanager
    async def busy(self, first: str = "first") -> AsyncIterator[None]:
        """Hold the device at a batch of one word while the block runs, then see it answered."""
        self.device.may_run.clear()
        (task,) = await self.begin(first)
        assert self.device.batches[-1] == [first]
        try:
            yield
        finally:
            self.device.may_run.set()
        assert await task == first.upper()

    def dropped(self, reason: str) -> float | None:
        return self.metrics.registry.get_sample_value("mneme_dropped_total", {"reason": reason})

    @property
    def queued_work(self) -> float | None:
        return self.metrics.registry.get_sample_value("mneme_queued_work")


async def _let_run() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def running(**limits: int) -> AsyncIterator[Queue]:
    queue = Queue(**limits)
    queue.batcher.start()
    try:
        yield queue
    finally:
        await queue.batcher.stop()


async def test_an_idle_device_takes_a_request_at_once():
    async with running() as queue:
        assert await queue.submit("a") == "A"
        assert await queue.submit("b") == "B"
        assert queue.device.batches == [["a"], ["b"]]


async def test_a_busy_device_lets_requests_gather_into_one_batch():
    async with running() as queue:
        async with queue.busy():
            tasks = await queue.begin("a", "b", "c")
            assert queue.device.batches == [["first"]]
        assert await asyncio.gather(*tasks) == ["A", "B", "C"]
        assert queue.device.batches == [["first"], ["a", "b", "c"]]


async def test_the_answer_says_how_long_the_request_waited():
    async with running() as queue:
        async with queue.busy():
            task = asyncio.create_task(
                queue.batcher.submit("a", deadline=time.perf_counter() + PATIENCE_S)
            )
            await asyncio.sleep(0.02)
        assert 0.02 <= (await task)[1] < PATIENCE_S


class TestBatchLimit:
    async def test_a_batch_has_no_more_work_than_allowed(self):
        async with running(max_batch_work=6, unit_work=2) as queue:
            async with queue.busy():
                tasks = await queue.begin(*"abcdefg")
            assert await asyncio.gather(*tasks) == list("ABCDEFG")
            assert queue.device.batches[1:] == [["a", "b", "c"], ["d", "e", "f"], ["g"]]

    async def test_all_are_padded_to_the_widest(self):
        """Two of one letter and one of three cost nine, not five."""
        async with running(max_batch_work=8) as queue:
            async with queue.busy():
                tasks = await queue.begin("a", "b", "ccc", "ddd")
            await asyncio.gather(*tasks)
            assert queue.device.batches[1:] == [["a", "b"], ["ccc", "ddd"]]

    async def test_one_request_that_is_larger_runs_alone(self):
        async with running(max_batch_work=3) as queue:
            async with queue.busy():
                tasks = await queue.begin("a", "larger", "b")
            await asyncio.gather(*tasks)
            assert queue.device.batches[1:] == [["a"], ["larger"], ["b"]]

    async def test_a_request_that_is_dropped_takes_no_room_in_a_batch(self):
        async with running(max_batch_work=4) as queue:
            async with queue.busy():
                (gone,) = await queue.begin("wide")
                tasks = await queue.begin("a", "b", "c")
                gone.cancel()
                await _let_run()
            await asyncio.gather(*tasks)
            assert queue.device.batches[1:] == [["a", "b", "c"]]


class TestOverload:
    async def test_more_than_may_wait_is_refused(self):
        async with running(max_queue_work=4) as queue:
            async with queue.busy():
                tasks = await queue.begin("aa", "bb")
                with pytest.raises(OverloadedError, match="4 units of work are waiting, 4 may"):
                    await queue.submit("c")
                assert queue.dropped("overloaded") == 1
            assert await asyncio.gather(*tasks) == ["AA", "BB"]

    async def test_it_takes_requests_again_once_the_queue_is_short(self):
        async with running(max_queue_work=1) as queue:
            async with queue.busy():
                (task,) = await queue.begin("a")
                with pytest.raises(OverloadedError):
                    await queue.submit("b")
            await task
            assert await queue.submit("b") == "B"

    async def test_an_empty_queue_takes_a_request_however_large(self):
        async with running(max_queue_work=1) as queue:
            assert await queue.submit("large") == "LARGE"

    async def test_the_waiting_work_is_measured(self):
        async with running(unit_work=10) as queue:
            async with queue.busy():
                tasks = await queue.begin("a", "bb")
                assert queue.queued_work == 30
            await asyncio.gather(*tasks)
            assert queue.queued_work == 0


class TestDropped:
    async def test_a_request_past_its_deadline_is_never_run(self):
        async with running() as queue:
            async with queue.busy():
                (late,) = await queue.begin("late", within_s=0.001)
                (patient,) = await queue.begin("patient")
                await asyncio.sleep(0.005)
            with pytest.raises(DeadlineExceededError, match=r"waited \d+\.\d ms in the queue"):
                await late
            assert await patient == "PATIENT"
            assert queue.device.batches == [["first"], ["patient"]]
            assert queue.dropped("deadline") == 1

    async def test_a_request_that_nobody_awaits_is_never_run(self):
        async with running() as queue:
            async with queue.busy():
                gone, patient = await queue.begin("gone", "patient")
                gone.cancel()
                await _let_run()
            assert await patient == "PATIENT"
            assert queue.device.batches == [["first"], ["patient"]]
            assert queue.dropped("client left") == 1
            assert queue.queued_work == 0

    async def test_one_who_leaves_while_the_batch_runs_disturbs_nobody(self):
        async with running() as queue:
            queue.device.may_run.clear()
            gone, patient = await queue.begin("gone", "patient")
            assert queue.device.batches == [["gone", "patient"]]
            gone.cancel()
            await _let_run()
            queue.device.may_run.set()
            assert await patient == "PATIENT"
            assert await queue.submit("next") == "NEXT"


class TestErrors:
    async def test_an_error_for_one_request_is_its_own(self):
        async with running() as queue:
            async with queue.busy():
                refused, good = await queue.begin("refused", "good")
            with pytest.raises(InvalidRequestError, match="refused"):
                await refused
            assert await good == "GOOD"

    @pytest.mark.parametrize("word", ["deadly", "forgotten"])
    async def test_a_batch_that_fails_fails_all_its_requests_and_no_other(self, word):
        """Also when the device answers fewer than it was asked: somebody would wait for ever."""
        async with running() as queue:
            async with queue.busy():
                tasks = await queue.begin("neighbour", word)
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(answers[1], Exception)
            assert not isinstance(answers[1], TimeoutError), "nobody answered"
            assert await queue.submit("next") == "NEXT"

    async def test_requests_that_wait_when_it_stops_are_cancelled(self):
        queue = Queue()
        queue.batcher.start()
        queue.device.may_run.clear()
        running_, waiting = [*await queue.begin("running"), *await queue.begin("waiting")]
        await queue.batcher.stop()
        answers = await asyncio.gather(running_, waiting, return_exceptions=True)
        assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)
        assert queue.device.batches == [["running"]]
