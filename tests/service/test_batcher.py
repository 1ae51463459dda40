"""The way to the device. A request is a word, its work the number of its letters."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from service.batcher import Batcher
from service.cost import BatchCost
from service.errors import (
    ClientLeft,
    DeadlineExceededError,
    DeviceMemoryError,
    InvalidRequestError,
    OverloadedError,
    ServiceError,
)
from service.metrics import Metrics
from service.shapes import ShapeGrid
from service.turns import SharedDevice
from tests.service.arm_metrics import of_arm, sample

PATIENCE_S = 30.0
# A client that was there a moment ago is not asked again; so long ago is no moment.
LATELY_S = 0.01
# No deadline: far beyond everything that a test predicts.
FOREVER_S = 1e6
NO_ROUNDING = ShapeGrid(batches=(), candidates=(), lengths=())


@dataclass(frozen=True)
class Read:
    """A word that has been prepared."""

    word: str


class Stages:
    """Reads words, then answers them in upper case; keeps all batches of both stages.

    Each stage goes on only while its event is set. A word `<stage> refuses` gets an error of its
    own there, `<stage> burns` fails its whole batch, `<stage> forgets` is left out.
    `memory`: letters for which the device has room; before it fails for more it awaits
    `before_failing`.
    """

    def __init__(self) -> None:
        self.prepared: list[list[str]] = []
        self.batches: list[list[str]] = []
        self.may_prepare = asyncio.Event()
        self.may_run = asyncio.Event()
        self.may_prepare.set()
        self.may_run.set()
        self.memory = 1000
        self.before_failing: Callable[[], Awaitable[None]] | None = None

    async def prepare(self, words: Sequence[str]) -> list[Read | ServiceError]:
        self.prepared.append(list(words))
        await self.may_prepare.wait()
        _burn("prepare", words)
        return [
            InvalidRequestError(word) if word == "prepare refuses" else Read(word)
            for word in words
            if word != "prepare forgets"
        ]

    async def run(self, batch: Sequence[Read]) -> list[str | ServiceError]:
        words = [one.word for one in batch]
        self.batches.append(words)
        await self.may_run.wait()
        _burn("run", words)
        if sum(map(len, words)) > self.memory:
            if self.before_failing is not None:
                await self.before_failing()
            raise DeviceMemoryError(f"no room for {words}")
        return [
            InvalidRequestError(word) if word == "run refuses" else word.upper()
            for word in words
            if word != "run forgets"
        ]


def _burn(stage: str, words: Sequence[str]) -> None:
    if f"{stage} burns" in words:
        raise RuntimeError(f"{stage} burns")


class KnownCost(BatchCost):
    """A cost that the test knows, and changes where it likes; it learns nothing."""

    def __init__(self, *, fixed_s: float = 0.0, per_work_s: float = 0.0) -> None:
        super().__init__()
        if per_work_s:
            self.learn_from_warm_up([(n, fixed_s + per_work_s * n) for n in (1, 100)])
        self.fixed_s = fixed_s
        self.per_work_s = per_work_s

    def update(self, work: int, seconds: float) -> None:
        del work, seconds


class Client:
    """Says whether it has left, and counts how often it was asked."""

    def __init__(self) -> None:
        self.left = False
        self.asked = 0

    def has_left(self) -> bool:
        self.asked += 1
        return self.left


class Queue:
    """A batcher, its two stages and its metrics.

    `assumed_length`: history length of every word until it is prepared; then it is 1.
    """

    def __init__(
        self,
        *,
        assumed_length: int = 1,
        shapes: ShapeGrid = NO_ROUNDING,
        cost: BatchCost | None = None,
        short_s: float = 0.0,
        margin_s: float = FOREVER_S,
        max_batch_work: int = 1000,
        max_queue_work: int = 1000,
    ) -> None:
        self.stages = Stages()
        self.metrics = Metrics()
        self.cost = KnownCost() if cost is None else cost
        self.batcher = Batcher[str, Read, str](
            seat=SharedDevice().seat(1.0),
            prepare=self.stages.prepare,
            run=self.stages.run,
            size=lambda word: (len(word), assumed_length),
            prepared_size=lambda one: (len(one.word), 1),
            shapes=shapes,
            cost=self.cost,
            short_s=short_s,
            margin_s=margin_s,
            max_batch_work=max_batch_work,
            max_queue_work=max_queue_work,
            metrics=of_arm(self.metrics),
        )

    def submit(
        self, word: str, *, within_s: float = FOREVER_S, client: Client | None = None
    ) -> "asyncio.Future[tuple[str, float]]":
        has_left = Client().has_left if client is None else client.has_left
        deadline = time.perf_counter() + within_s
        return self.batcher.submit(word, deadline=deadline, has_left=has_left)

    async def begin(self, *words: str, **options: Any) -> list["asyncio.Future[tuple[str, float]]"]:
        """Submit words together and let both stages go on as far as they can."""
        answers = [self.submit(word, **options) for word in words]
        await let_run()
        return answers

    async def answer(self, word: str, **options: Any) -> str:
        (answer,) = await answers(self.submit(word, **options))
        return answer

    @asynccontextmanager
    async def busy(self, first: str = "first") -> AsyncIterator[None]:
        """Hold the device at a batch of one word while the block runs, then see it answered."""
        self.stages.may_run.clear()
        (answer,) = await self.begin(first)
        assert self.stages.batches[-1] == [first]
        try:
            yield
        finally:
            self.stages.may_run.set()
        assert await answers(answer) == [first.upper()]

    @asynccontextmanager
    async def preparing(self, first: str = "first") -> AsyncIterator[None]:
        """Hold the preparation of one word while the block runs, then see it answered."""
        self.stages.may_prepare.clear()
        (answer,) = await self.begin(first)
        assert self.stages.prepared[-1] == [first]
        try:
            yield
        finally:
            self.stages.may_prepare.set()
        assert await answers(answer) == [first.upper()]

    def dropped(self, reason: str) -> float | None:
        return self._metric("mneme_dropped_total", {"reason": reason})

    @property
    def batch_work_limit(self) -> float | None:
        return self._metric("mneme_batch_work_limit")

    @property
    def queued_work(self) -> float | None:
        return self._metric("mneme_queued_work")

    @property
    def queued_requests(self) -> float | None:
        return self._metric("mneme_queued_requests")

    def _metric(self, name: str, labels: dict[str, str] | None = None) -> float | None:
        self.metrics.text()  # whatever is measured only when somebody looks
        return sample(self.metrics, name, **(labels or {}))


async def answers(*futures: "asyncio.Future[tuple[str, float]]") -> list[str]:
    """Return the answers, without the seconds waited."""
    async with asyncio.timeout(PATIENCE_S):
        return [answer for answer, _ in await asyncio.gather(*futures)]


async def let_run() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def pass_moment(within_s: float) -> None:
    """Return when that which was due within so many seconds is late."""
    await asyncio.sleep(within_s + 0.001)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Queue]:
    queue = Queue(**options)
    queue.batcher.start()
    try:
        yield queue
    finally:
        await queue.batcher.stop()


async def test_an_idle_device_takes_a_request_at_once():
    async with running() as queue:
        assert await queue.answer("a") == "A"
        assert await queue.answer("b") == "B"
        assert queue.stages.batches == [["a"], ["b"]]


async def test_a_busy_device_lets_requests_gather_into_one_batch():
    async with running() as queue:
        async with queue.busy():
            later = [*await queue.begin("a"), *await queue.begin("b", "c")]
            assert queue.stages.batches == [["first"]]
        assert await answers(*later) == ["A", "B", "C"]
        assert queue.stages.batches == [["first"], ["a", "b", "c"]]


class TestTwoStages:
    async def test_the_next_batch_is_prepared_while_the_device_runs_one(self):
        async with running() as queue, queue.busy():
            await queue.begin("a", "b")
            assert queue.stages.prepared == [["first"], ["a", "b"]]
            assert queue.stages.batches == [["first"]]

    async def test_no_more_than_one_batch_is_prepared_ahead(self):
        """What waits longer would only grow old."""
        async with running(max_batch_work=3) as queue:
            async with queue.busy():
                later = [one for word in "abcde" for one in await queue.begin(word)]
                assert queue.stages.prepared == [["first"], ["a"], ["b"], ["c"]]
            assert await answers(*later) == list("ABCDE")
            assert queue.stages.prepared[4:] == [["d", "e"]]
            assert queue.stages.batches == [["first"], ["a", "b", "c"], ["d", "e"]]

    async def test_requests_gather_while_another_batch_is_prepared(self):
        async with running() as queue:
            async with queue.preparing():
                later = [*await queue.begin("a"), *await queue.begin("b")]
            assert await answers(*later) == ["A", "B"]
            assert queue.stages.prepared == [["first"], ["a", "b"]]

    async def test_a_preparation_has_no_more_work_than_a_batch(self):
        async with running(max_batch_work=3) as queue:
            async with queue.preparing():
                later = await queue.begin("a", "bb", "c")
            await answers(*later)
            assert queue.stages.prepared == [["first"], ["a", "bb"], ["c"]]

    async def test_work_is_known_once_a_request_is_prepared(self):
        """A history is taken for as long as it can be, until it has been read."""
        async with running(assumed_length=10, max_batch_work=12) as queue:
            async with queue.busy():
                async with held(queue.stages.may_prepare):
                    (first,) = await queue.begin("ab")
                    assert queue.queued_work == 20
                await let_run()
                assert queue.queued_work == 2
                rest = [one for word in ("c", "d") for one in await queue.begin(word)]
            await answers(first, *rest)
            assert queue.stages.batches == [["first"], ["ab", "c", "d"]]


@asynccontextmanager
async def held(may_go: asyncio.Event) -> AsyncIterator[None]:
    may_go.clear()
    try:
        yield
    finally:
        may_go.set()


class TestTold:
    async def test_the_answer_says_how_long_the_request_waited(self):
        async with running() as queue:
            async with queue.busy():
                entered = time.perf_counter()
                answer = queue.submit("a")
                await pass_moment(0.02)
            waited_s = (await answer)[1]
            assert 0.02 <= waited_s <= time.perf_counter() - entered

    async def test_its_preparation_is_no_waiting(self):
        async with running() as queue:
            entered = time.perf_counter()
            async with held(queue.stages.may_prepare):
                (answer,) = await queue.begin("a")
                await pass_moment(0.02)
            waited_s = (await answer)[1]
            assert 0 <= waited_s <= time.perf_counter() - entered - 0.02

    async def test_waiting_requests_and_their_work_are_measured_in_both_stages(self):
        """One is prepared already, one is being prepared, one waits for that."""
        async with running() as queue:
            async with queue.busy():
                ready = await queue.begin("a")
                async with held(queue.stages.may_prepare):
                    rest = [*await queue.begin("bb"), *await queue.begin("cccc")]
                    assert (queue.queued_requests, queue.queued_work) == (3, 7)
                await let_run()
                assert (queue.queued_requests, queue.queued_work) == (3, 7)
            await answers(*ready, *rest)
            assert (queue.queued_requests, queue.queued_work) == (0, 0)

    async def test_one_who_is_dropped_while_nobody_else_comes_is_not_counted_for_ever(self):
        async with running() as queue:
            (late,) = await queue.begin("late", within_s=-1.0)
            assert isinstance(late.exception(), DeadlineExceededError)
            assert (queue.queued_requests, queue.queued_work) == (0, 0)


class TestBatchLimit:
    async def test_a_batch_has_no_more_work_than_allowed(self):
        async with running(max_batch_work=3) as queue:
            async with queue.busy():
                later = await queue.begin(*"abcdefg")
            assert await answers(*later) == list("ABCDEFG")
            assert queue.stages.batches[1:] == [["a", "b", "c"], ["d", "e", "f"], ["g"]]

    async def test_all_are_padded_to_the_widest(self):
        """Two of one letter and one of three cost nine, not five."""
        async with running(max_batch_work=8) as queue:
            async with queue.busy():
                later = await queue.begin("a", "b", "ccc", "ddd")
            await answers(*later)
            assert queue.stages.batches[1:] == [["a", "b"], ["ccc", "ddd"]]

    async def test_all_are_padded_to_a_shape_of_the_grid(self):
        """Three are run as four."""
        grid = ShapeGrid(batches=(1, 2, 4), candidates=(), lengths=())
        async with running(max_batch_work=3, shapes=grid) as queue:
            async with queue.busy():
                later = await queue.begin("a", "b", "c")
            await answers(*later)
            assert queue.stages.batches[1:] == [["a", "b"], ["c"]]

    async def test_one_request_that_is_larger_runs_alone(self):
        async with running(max_batch_work=3) as queue:
            async with queue.busy():
                later = await queue.begin("a", "larger", "b")
            await answers(*later)
            assert queue.stages.batches[1:] == [["a"], ["larger"], ["b"]]

    @pytest.mark.parametrize(
        "words", [("wide", "a", "b", "c"), ("a", "wide", "b", "c")], ids=["first", "amid others"]
    )
    async def test_a_request_that_is_dropped_takes_no_room_in_a_batch(self, words):
        async with running(max_batch_work=7) as queue:
            async with queue.busy():
                later = await queue.begin(*words)
                later.pop(words.index("wide")).cancel()
            await answers(*later)
            assert queue.stages.batches[1:] == [["a", "b", "c"]]

    async def test_nor_in_a_preparation(self):
        async with running(max_batch_work=4) as queue:
            async with queue.preparing():
                gone, *later = await queue.begin("wide", "a", "b", "c")
                gone.cancel()
            await answers(*later)
            assert queue.stages.prepared[1:] == [["a", "b", "c"]]

    @pytest.mark.parametrize(
        ("short_s", "batches"),
        [(0.0, ["abc", "de"]), (13.0, ["abcd", "e"])],
        ids=["no longer than pays", "unless it is short all the same"],
    )
    async def test_a_batch_grows_no_further_than_pays(self, short_s, batches):
        """A fixed cost of a tenth: one second of ten, so three words of three seconds each."""
        cost = KnownCost(fixed_s=1.0, per_work_s=3.0)
        async with running(cost=cost, short_s=short_s) as queue:
            async with queue.busy():
                later = await queue.begin(*"abcde")
            await answers(*later)
            assert queue.stages.batches[1:] == [list(words) for words in batches]


class TestOverload:
    async def test_more_than_may_wait_is_refused(self):
        async with running(max_queue_work=4) as queue:
            async with queue.busy():
                later = await queue.begin("aa", "bb")
                with pytest.raises(OverloadedError, match="4 units of work are waiting, 4 may"):
                    queue.submit("c")
                assert queue.dropped("overloaded") == 1
            assert await answers(*later) == ["AA", "BB"]

    async def test_it_takes_requests_again_once_the_queue_is_short(self):
        async with running(max_queue_work=1) as queue:
            async with queue.busy():
                later = await queue.begin("a")
                with pytest.raises(OverloadedError):
                    queue.submit("b")
            await answers(*later)
            assert await queue.answer("b") == "B"

    async def test_an_empty_queue_takes_a_request_however_large(self):
        async with running(max_queue_work=1) as queue:
            assert await queue.answer("large") == "LARGE"
            async with queue.busy():
                later = await queue.begin("large")
            assert await answers(*later) == ["LARGE"]


class TestHopeless:
    """A batch is predicted to take a second, and a second for each letter."""

    async def test_what_cannot_be_answered_in_time_is_refused_before_it_costs_anything(self):
        async with running(cost=KnownCost(fixed_s=1.0, per_work_s=1.0)) as queue:
            async with queue.busy("five5"):
                message = r"would take .* (7[89]\d\d|8000)\.\d ms, the deadline is in 5000\.0 ms"
                with pytest.raises(OverloadedError, match=message):
                    queue.submit("a", within_s=5.0)
                await let_run()
                assert queue.dropped("hopeless") == 1
                assert queue.queued_requests == 0
            assert queue.stages.prepared == queue.stages.batches == [["five5"]]

    @pytest.mark.parametrize(
        ("waiting", "within_s", "is_taken"),
        [
            pytest.param([], 9.0, True, id="behind the batch that runs"),
            pytest.param(["bbb"], 9.0, False, id="behind those that wait, too"),
            pytest.param(["bbb"], 12.0, True, id="in one batch with those that wait"),
            pytest.param(["bbb"] * 3, 17.5, False, id="in two batches with those that wait"),
            pytest.param(["bbb"] * 3, 19.0, True, id="in two batches with time for both"),
        ],
    )
    async def test_a_request_waits_for_all_that_come_before_it(self, waiting, within_s, is_taken):
        """Six seconds for the batch that runs, and up to nine letters in the next one."""
        cost = KnownCost(fixed_s=1.0, per_work_s=1.0)
        async with running(cost=cost, max_batch_work=9) as queue, queue.busy("five5"):
            await queue.begin(*waiting)
            if is_taken:
                queue.submit("a", within_s=within_s)
            else:
                with pytest.raises(OverloadedError):
                    queue.submit("a", within_s=within_s)

    async def test_while_answers_are_late_requests_are_refused_earlier(self):
        """Nothing was predicted to take any time, and then twenty answers came too late."""
        async with running(cost=KnownCost(), margin_s=10.0) as queue:
            async with queue.busy():
                assert await queue.begin("taken", within_s=5.0)
            await _answer_late(queue, 20)
            async with queue.busy():
                with pytest.raises(OverloadedError, match=r"up to 99\d\d\.\d ms, .* 5000"):
                    queue.submit("a", within_s=5.0)

    async def test_an_idle_service_takes_a_request_whatever_the_prediction(self):
        """Or it would refuse for ever by a prediction that nothing corrects."""
        async with running(cost=KnownCost(fixed_s=1000.0)) as queue:
            for _ in range(2):
                assert await queue.answer("a", within_s=PATIENCE_S) == "A"
            assert queue.dropped("deadline") == 0

    async def test_a_batch_that_ended_early_holds_nobody_up(self):
        """Six seconds were predicted, but the device is idle again."""
        async with running(cost=KnownCost(fixed_s=1.0, per_work_s=1.0)) as queue:
            await queue.answer("five5")
            async with queue.preparing("a"):
                answer = queue.submit("b", within_s=5.0)
            assert await answers(answer) == ["B"]

    async def test_it_recovers_from_absurdly_slow_batches(self):
        """One is served at a time, and each brings the prediction down, until two are taken."""
        cost = BatchCost()
        for _ in range(200):
            cost.update(1, 100.0)
        async with running(cost=cost) as queue:
            n_alone = await _served_alone(queue, within_s=PATIENCE_S)
            assert n_alone > 0
            assert queue.dropped("hopeless") == n_alone

    async def test_it_takes_them_again_once_nobody_is_late(self):
        async with running(cost=KnownCost(), margin_s=10.0) as queue:
            await _answer_late(queue, 5)
            n_alone = await _served_alone(queue, within_s=1.0)
            assert n_alone > 0
            assert queue.dropped("hopeless") == n_alone


async def _answer_late(queue: Queue, n: int) -> None:
    """Let so many requests find nobody before them, and be answered after their deadline."""
    for _ in range(n):
        queue.stages.may_run.clear()
        (late,) = await queue.begin("late", within_s=0.05)
        await pass_moment(0.05)
        queue.stages.may_run.set()
        assert await answers(late) == ["LATE"]


async def _served_alone(queue: Queue, *, within_s: float) -> int:
    """Return how many are served one at a time until the service takes a second beside one."""
    for n in range(20_000):
        async with queue.busy("a"):
            try:
                second = queue.submit("b", within_s=within_s)
            except OverloadedError:
                continue
        assert await answers(second) == ["B"]
        return n
    raise AssertionError("it refuses for ever")


class TestDeadlines:
    async def test_a_request_past_its_deadline_is_never_prepared(self):
        async with running() as queue:
            async with queue.preparing():
                late = queue.submit("late", within_s=0.005)
                patient = queue.submit("patient")
                await pass_moment(0.005)
            with pytest.raises(DeadlineExceededError, match=r"waited \d+\.\d ms, and its deadline"):
                await late
            assert await answers(patient) == ["PATIENT"]
            assert queue.stages.prepared == [["first"], ["patient"]]
            assert queue.dropped("deadline") == 1

    @pytest.mark.parametrize("others", [[], ["patient"]], ids=["alone", "with others"])
    async def test_a_request_past_its_deadline_is_never_run(self, others):
        async with running() as queue:
            async with queue.busy():
                (late,) = await queue.begin("late", within_s=0.1)
                later = await queue.begin(*others)
                await pass_moment(0.1)
            with pytest.raises(DeadlineExceededError):
                await late
            await answers(*later)
            assert queue.stages.batches == [["first"], *([others] if others else [])]
            assert queue.dropped("deadline") == 1

    async def test_what_would_be_late_is_dropped_and_those_behind_are_served(self):
        cost = KnownCost()
        async with running(cost=cost) as queue:
            async with queue.busy():
                (hopeless,) = await queue.begin("hopeless", within_s=50.0)
                patient = await queue.begin("patient", "too")
                cost.fixed_s = 100.0
            with pytest.raises(DeadlineExceededError):
                await hopeless
            assert await answers(*patient) == ["PATIENT", "TOO"]
            assert queue.stages.batches == [["first"], ["patient", "too"]]
            assert queue.dropped("deadline") == 1

    @pytest.mark.parametrize("n", [1, 3])
    async def test_the_last_is_served_while_its_deadline_has_not_passed(self, n):
        """The prediction may be wrong, and only a run can tell."""
        cost = KnownCost()
        async with running(cost=cost) as queue:
            async with queue.busy():
                later = await queue.begin(*"abc"[:n], within_s=50.0)
                cost.fixed_s = 100.0
            assert await answers(later[-1]) == ["ABC"[n - 1]]
            assert queue.dropped("deadline") == n - 1
            for one in later[:-1]:
                assert isinstance(one.exception(), DeadlineExceededError)

    async def test_a_batch_grows_no_further_than_its_earliest_deadline_allows(self):
        """A second a letter: two within 2.5 s, and the others after them."""
        cost = KnownCost()
        async with running(cost=cost) as queue:
            async with queue.busy():
                hurried = await queue.begin("a", within_s=2.5)
                patient = await queue.begin("b", "c", "d")
                cost.per_work_s = 1.0
            assert await answers(*hurried, *patient) == ["A", "B", "C", "D"]
            assert queue.stages.batches[1:] == [["a", "b"], ["c", "d"]]

    async def test_nobody_joins_a_batch_that_would_be_late_for_him(self):
        """Two of three letters take six seconds, one of one letter takes one."""
        cost = KnownCost()
        async with running(cost=cost) as queue:
            async with queue.busy():
                patient = await queue.begin("aaa")
                hurried = await queue.begin("b", within_s=2.5)
                cost.per_work_s = 1.0
            assert await answers(*patient, *hurried) == ["AAA", "B"]
            assert queue.stages.batches[1:] == [["aaa"], ["b"]]


def cancel(answer: "asyncio.Future[Any]", client: Client) -> None:
    del client
    answer.cancel()


def leave(answer: "asyncio.Future[Any]", client: Client) -> None:
    del answer
    client.left = True


@pytest.mark.parametrize("go", [cancel, leave])
class TestClientLeft:
    """Either nobody awaits the answer any more, or the connection is closed."""

    async def test_one_who_left_is_never_prepared(self, go: Callable[..., None]):
        async with running() as queue:
            client = Client()
            async with queue.preparing():
                gone = queue.submit("gone", client=client)
                patient = queue.submit("patient")
                go(gone, client)
                await pass_moment(LATELY_S)
            assert await answers(patient) == ["PATIENT"]
            assert queue.stages.prepared == [["first"], ["patient"]]
            assert queue.dropped("client left") == 1
            assert queue.queued_requests == queue.queued_work == 0
            assert gone.cancelled() or isinstance(gone.exception(), ClientLeft)

    async def test_one_who_left_is_never_run(self, go: Callable[..., None]):
        async with running() as queue:
            client = Client()
            async with queue.busy():
                (gone,) = await queue.begin("gone", client=client)
                (patient,) = await queue.begin("patient")
                go(gone, client)
                await pass_moment(LATELY_S)
            assert await answers(patient) == ["PATIENT"]
            assert queue.stages.batches == [["first"], ["patient"]]
            assert queue.dropped("client left") == 1
            assert queue.queued_requests == queue.queued_work == 0
            assert gone.cancelled() or isinstance(gone.exception(), ClientLeft)

    async def test_one_who_leaves_while_the_batch_runs_disturbs_nobody(
        self, go: Callable[..., None]
    ):
        async with running() as queue:
            client = Client()
            async with held(queue.stages.may_run):
                gone, patient = queue.submit("gone", client=client), queue.submit("patient")
                await let_run()
                assert queue.stages.batches == [["gone", "patient"]]
                go(gone, client)
                await pass_moment(LATELY_S)
            assert await answers(patient) == ["PATIENT"]
            assert await queue.answer("next") == "NEXT"

    async def test_one_who_leaves_while_he_is_prepared_disturbs_nobody(
        self, go: Callable[..., None]
    ):
        async with running() as queue:
            client = Client()
            async with held(queue.stages.may_prepare):
                gone, patient = queue.submit("gone", client=client), queue.submit("patient")
                await let_run()
                go(gone, client)
                await pass_moment(LATELY_S)
            assert await answers(patient) == ["PATIENT"]
            assert queue.stages.batches == [["patient"]]
            assert gone.cancelled() or isinstance(gone.exception(), ClientLeft)


async def test_a_client_is_asked_before_each_stage():
    async with running() as queue:
        client = Client()
        async with queue.busy():
            async with held(queue.stages.may_prepare):
                first = queue.submit("a")
                await let_run()
                answer = queue.submit("b", client=client)
                await pass_moment(LATELY_S)
                assert client.asked == 0
            await let_run()
            assert queue.stages.prepared == [["first"], ["a"], ["b"]]
            assert client.asked == 1
            await pass_moment(LATELY_S)
        assert await answers(first, answer) == ["A", "B"]
        assert client.asked == 2


class TestLent:
    async def test_it_is_lent_at_once_when_it_is_idle(self):
        async with running() as queue:
            async with queue.batcher.lend(0.0):
                assert queue.stages.batches == []
            assert await queue.answer("a") == "A"

    async def test_no_batch_runs_while_it_is_lent(self):
        """But the next one is prepared, and grows."""
        async with running() as queue:
            async with queue.batcher.lend(0.0):
                later = [*await queue.begin("a"), *await queue.begin("b")]
                assert queue.stages.prepared == [["a"], ["b"]]
                assert queue.stages.batches == []
            assert await answers(*later) == ["A", "B"]
            assert queue.stages.batches == [["a", "b"]]

    async def test_it_is_not_lent_while_a_batch_runs(self):
        async with running() as queue:
            async with queue.busy():
                borrower = asyncio.create_task(borrow(queue, "lent"))
                await let_run()
                assert queue.stages.batches == [["first"]]
            await borrower
            assert queue.stages.batches == [["first"], ["lent"]]

    async def test_batches_and_a_borrower_take_turns(self):
        """Whoever is there all the time keeps nobody else from it."""
        async with running(max_batch_work=1) as queue:
            async with queue.busy():
                later = [one for word in "ab" for one in await queue.begin(word)]
                borrower = asyncio.create_task(borrow(queue, "lent", "lent again"))
                await let_run()
            await asyncio.gather(answers(*later), borrower)
            assert queue.stages.batches == [["first"], ["lent"], ["a"], ["lent again"], ["b"]]

    async def test_a_borrower_that_fails_gives_it_back(self):
        async with running() as queue:
            with pytest.raises(RuntimeError, match="broken"):
                async with queue.batcher.lend(0.0):
                    raise RuntimeError("broken")
            assert await queue.answer("a") == "A"

    async def test_a_borrower_that_gives_up_waiting_is_forgotten(self):
        async with running() as queue:
            async with queue.busy():
                borrower = asyncio.create_task(borrow(queue, "lent", expected_s=FOREVER_S))
                await let_run()
                borrower.cancel()
                await asyncio.gather(borrower, return_exceptions=True)
                later = await queue.begin("a", within_s=PATIENCE_S)
            assert await answers(*later) == ["A"]
            assert queue.stages.batches == [["first"], ["a"]]

    async def test_a_request_is_admitted_by_the_time_for_which_it_is_lent(self):
        async with running() as queue:
            async with queue.batcher.lend(10.0):
                first = queue.submit("first", within_s=5.0)
                with pytest.raises(OverloadedError, match="the deadline is in"):
                    queue.submit("hopeless", within_s=5.0)
                patient = queue.submit("patient", within_s=50.0)
            assert await answers(first, patient) == ["FIRST", "PATIENT"]
            assert queue.dropped("hopeless") == 1

    async def test_and_by_the_time_of_those_who_wait_for_it(self):
        async with running() as queue:
            async with queue.busy():
                borrower = asyncio.create_task(borrow(queue, "lent", expected_s=10.0))
                await let_run()
                with pytest.raises(OverloadedError, match="the deadline is in"):
                    queue.submit("hopeless", within_s=5.0)
                patient = queue.submit("patient", within_s=50.0)
            await borrower
            assert await answers(patient) == ["PATIENT"]

    async def test_what_is_hopeless_by_the_time_it_comes_back_is_never_run(self):
        async with running() as queue:
            async with queue.batcher.lend(0.0):
                (late,) = await queue.begin("late", within_s=0.05)
                await pass_moment(0.05)
            with pytest.raises(DeadlineExceededError):
                await late
            assert queue.stages.batches == []

    async def test_the_time_for_which_it_was_lent_is_no_batchs(self):
        """Or every batch would be predicted to take so long."""
        cost = RecordingCost()
        async with running(cost=cost) as queue:
            async with queue.batcher.lend(0.0):
                (answer,) = await queue.begin("a")
                await pass_moment(1.0)
            await answers(answer)
            assert [seconds < 1.0 for seconds in cost.measured_s] == [True]


class RecordingCost(KnownCost):
    """Keeps what batches took."""

    def __init__(self) -> None:
        super().__init__()
        self.measured_s: list[float] = []

    def update(self, work: int, seconds: float) -> None:
        del work
        self.measured_s.append(seconds)


async def borrow(queue: Queue, *names: str, expected_s: float = 0.0) -> None:
    """Have the device for one turn after the other, and note them among the batches."""
    for name in names:
        async with queue.batcher.lend(expected_s):
            queue.stages.batches.append([name])
            await asyncio.sleep(0)


class TestErrors:
    @pytest.mark.parametrize("stage", ["prepare", "run"])
    async def test_an_error_for_one_request_is_its_own(self, stage):
        async with running() as queue:
            async with queue.busy():
                refused, good = await queue.begin(f"{stage} refuses", "good")
            with pytest.raises(InvalidRequestError, match="refuses"):
                await refused
            assert await answers(good) == ["GOOD"]

    async def test_an_error_of_the_preparation_does_not_wait_for_the_device(self):
        async with running() as queue, queue.busy():
            (refused,) = await queue.begin("prepare refuses")
            assert isinstance(refused.exception(), InvalidRequestError)
            assert queue.queued_requests == 0

    @pytest.mark.parametrize("failure", ["burns", "forgets"])
    @pytest.mark.parametrize("stage", ["prepare", "run"])
    async def test_a_batch_that_fails_fails_all_its_requests_and_no_other(self, stage, failure):
        """Also when a stage answers fewer than it was asked: somebody would wait for ever."""
        async with running() as queue:
            async with queue.busy():
                later = await queue.begin("neighbour", f"{stage} {failure}")
            async with asyncio.timeout(PATIENCE_S):
                found = await asyncio.gather(*later, return_exceptions=True)
            assert all(isinstance(one, RuntimeError | AssertionError) for one in found)
            assert await queue.answer("next") == "NEXT"
            assert queue.queued_requests == 0

    async def test_requests_that_wait_when_it_stops_are_cancelled(self):
        """In each stage, and before each."""
        queue = Queue()
        queue.batcher.start()
        queue.stages.may_run.clear()
        found = [*await queue.begin("runs"), *await queue.begin("ready")]
        queue.stages.may_prepare.clear()
        found += [*await queue.begin("prepares"), *await queue.begin("waits")]
        await queue.batcher.stop()
        assert [answer.cancelled() for answer in found] == [True] * 4
        assert queue.stages.batches == [["runs"]]
        assert queue.stages.prepared == [["runs"], ["ready"], ["prepares"]]


async def test_no_more_than_ten_thousand_wait_however_little_their_work():
    async with running(max_queue_work=10**9) as queue:
        async with queue.busy("a"):
            waiting = [queue.submit("b") for _ in range(9_999)]
            with pytest.raises(OverloadedError, match="10,000 requests are waiting"):
                queue.submit("c")
            assert queue.dropped("overloaded") == 1
        await asyncio.gather(*waiting)
        assert await queue.answer("d") == "D"


class TestOutOfMemory:
    """The device has memory for so many letters at a time."""

    async def test_a_batch_that_does_not_fit_is_run_in_parts(self):
        async with running() as queue:
            queue.stages.memory = 3
            async with queue.busy("a"):
                later = await queue.begin(*"bcdefghi")
            assert await answers(*later) == list("BCDEFGHI")
            assert queue.stages.batches == [
                ["a"],
                list("bcdefghi"),
                list("bcde"),
                list("bc"),
                list("de"),
                list("fg"),
                list("hi"),
            ]

    async def test_the_largest_batch_is_smaller_from_then_on(self):
        async with running(max_batch_work=8) as queue:
            queue.stages.memory = 4
            async with queue.busy("a"):
                first = await queue.begin(*"bcdefghi")
                assert queue.batch_work_limit == 8
            await answers(*first)
            assert queue.batch_work_limit == 4
            async with queue.busy("j"):
                later = await queue.begin(*"klmnop")
            assert await answers(*later) == list("KLMNOP")
            assert queue.stages.batches[-2:] == [list("klmn"), list("op")]

    async def test_one_request_that_does_not_fit_alone_hears_of_it_and_nobody_else(self):
        async with running() as queue:
            queue.stages.memory = 3
            async with queue.busy("a"):
                b, large, c = await queue.begin("b", "larger", "c")
            assert await answers(b, c) == ["B", "C"]
            with pytest.raises(DeviceMemoryError):
                await large

    async def test_who_cannot_wait_for_the_parts_is_dropped_and_others_are_not(self):
        async with running() as queue:
            queue.stages.memory = 2
            # Within its deadline when the device takes it, it is not any more after the failure.
            queue.stages.before_failing = lambda: pass_moment(0.05)
            async with queue.busy("a"):
                (late,) = await queue.begin("bb", within_s=0.05)
                (patient,) = await queue.begin("cc")
            assert await answers(patient) == ["CC"]
            with pytest.raises(DeadlineExceededError):
                await late
            assert queue.dropped("deadline") == 1

    async def test_what_a_failure_took_is_not_learned_from(self):
        cost = BatchCost()
        cost.learn_from_warm_up([(1, 0.001), (100, 0.1)])
        async with running(cost=cost) as queue:
            queue.stages.memory = 0
            with pytest.raises(DeviceMemoryError):
                await queue.answer("a")
            assert cost.predict(50) == pytest.approx(0.05)

    async def test_nothing_waits_when_all_are_answered(self):
        async with running() as queue:
            queue.stages.memory = 2
            async with queue.busy("a"):
                later = await queue.begin(*"bcdef")
            await answers(*later)
            assert (queue.queued_work, queue.queued_requests) == (0, 0)
