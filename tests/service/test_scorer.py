"""A batch from Redis to scores: who is scored by what, and whose error is whose."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from service.errors import (
    CorruptHistoryError,
    DeviceMemoryError,
    HistoryUnavailableError,
    ModelFailedError,
)
from service.metrics import Metrics
from service.model import OnnxModel
from service.scorer import BatchScorer, DeviceThread, Prepared, Scored, ScoreRequest
from service.shapes import ShapeGrid
from tests.service.arm_metrics import of_arm, sample
from tests.service.dummy_model import (
    HISTORY_LENGTH,
    OUT_OF_MEMORY,
    UNKNOWN,
    DummyModel,
    score_of,
)
from tests.service.histories import DAY_S, NOW, records, steps
from tests.service.tiny_bundle import ITEM_IDS

FAILED_FETCHES = ("mneme_redis_failures_total", {"operation": "fetch"})


def request(
    user_id: str, *candidates: int, at: int = NOW, history: bytes | None = None
) -> ScoreRequest:
    return ScoreRequest(
        user_id=user_id,
        candidates=np.array(candidates or (1,), dtype=np.int64),
        ranking_time=at,
        history=history,
    )


@pytest.fixture
def model() -> DummyModel:
    return DummyModel()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def make_scorer(model, metrics) -> Iterator[Any]:
    with DeviceThread() as device:

        def make(store, model=model, on_redis_failure="refuse", **options: Any) -> BatchScorer:
            return BatchScorer(
                model,
                store,
                of_arm(metrics),
                device=device,
                on_redis_failure=on_redis_failure,
                **options,
            )

        yield make


@pytest.fixture
def scorer(make_scorer, store) -> BatchScorer:
    scorer: BatchScorer = make_scorer(store)
    return scorer


async def score(scorer: BatchScorer, requests: Sequence[ScoreRequest]) -> list[Any]:
    """Prepare the requests, run those that could be, and return all outcomes in their order."""
    prepared = await scorer.prepare(requests)
    ready = [one for one in prepared if isinstance(one, Prepared)]
    scored = iter(await scorer.run(ready) if ready else [])
    return [next(scored) if isinstance(one, Prepared) else one for one in prepared]


def scores(answer: object) -> list[float]:
    assert isinstance(answer, Scored), answer
    found: list[float] = answer.scores.tolist()
    return found


def corrupt_count(metrics: Metrics) -> float | None:
    return sample(metrics, "mneme_corrupt_histories_total")


class TestScores:
    async def test_each_request_gets_its_own_in_the_order_asked(self, scorer, redis):
        """Different histories, candidates and ranking times in one batch."""
        redis.set("history:ann", records((5, NOW - 9 * DAY_S), (7, NOW - DAY_S)))
        redis.set("history:bob", records((9, NOW)))
        ann, nobody, bob = await score(
            scorer,
            [request("ann", 3, 1, 2), request("nobody", 4), request("bob", 6, 6, at=NOW + DAY_S)],
        )
        assert scores(ann) == [
            score_of(3, behaviors=2, oldest=5, day=1),
            score_of(1, behaviors=2, oldest=5, day=1),
            score_of(2, behaviors=2, oldest=5, day=1),
        ]
        assert scores(nobody) == [score_of(4)]
        assert scores(bob) == [score_of(6, behaviors=1, oldest=9, day=1)] * 2
        assert [a.history_length for a in (ann, nobody, bob)] == [2, 0, 1]

    async def test_the_same_user_twice_in_a_batch_is_scored_twice_and_read_once(
        self, scorer, redis
    ):
        redis.set("history:ann", records((5, NOW)))
        redis.config_resetstat()
        first, second = await score(scorer, [request("ann", 1), request("ann", 2, 3)])
        assert scores(first) == [score_of(1, behaviors=1, oldest=5)]
        assert scores(second) == [score_of(c, behaviors=1, oldest=5) for c in (2, 3)]
        assert redis.info("commandstats")["cmdstat_getrange"]["calls"] == 1

    async def test_the_model_sees_the_newest_behaviors_only(self, scorer, redis):
        redis.set("history:ann", records(*steps(*range(1, HISTORY_LENGTH + 4))))
        (answer,) = await score(scorer, [request("ann", 1)])
        assert scores(answer) == [score_of(1, behaviors=HISTORY_LENGTH, oldest=4)]
        assert answer.history_length == HISTORY_LENGTH

    async def test_a_history_of_the_request_replaces_the_stored_one(self, scorer, redis):
        redis.set("history:ann", records((5, NOW)))
        given = records(*steps(*range(11, 11 + HISTORY_LENGTH + 1)))
        empty, full, stored = await score(
            scorer, [request("ann", history=b""), request("ann", history=given), request("ann")]
        )
        assert scores(empty) == [score_of(1)]
        assert scores(full) == [score_of(1, behaviors=HISTORY_LENGTH, oldest=12)]
        assert scores(stored) == [score_of(1, behaviors=1, oldest=5)]

    async def test_unknown_items_are_counted_and_scored_as_the_unknown_item(self, scorer, redis):
        redis.set("history:ann", records((2**63 - 1, NOW)))
        ann, bob = await score(scorer, [request("ann", 1, 91, 2**63 - 1), request("bob", 90)])
        assert scores(ann) == [
            score_of(c, behaviors=1, oldest=UNKNOWN) for c in (1, UNKNOWN, UNKNOWN)
        ]
        assert [ann.unknown_candidates, bob.unknown_candidates] == [2, 0]

    async def test_a_behavior_in_the_future_has_no_age(self, scorer, redis):
        redis.set("history:ann", records((5, NOW + 3 * DAY_S)))
        (answer,) = await score(scorer, [request("ann")])
        assert scores(answer) == [score_of(1, behaviors=1, oldest=5, day=0)]

    async def test_a_batch_is_one_run_as_wide_as_its_longest(self, scorer, redis, model, metrics):
        redis.set("history:ann", records(*steps(1, 2, 3)))
        await score(scorer, [request("ann", 1), request("bob", 1, 2)])
        (run,) = model.runs
        assert run.history_items.shape == (2, 3)
        assert run.candidate_items.shape == (2, 2)
        assert sample(metrics, "mneme_batch_requests_sum") == 2
        assert sample(metrics, "mneme_batch_requests_count") == 1

    async def test_the_time_of_each_stage_is_told(self, scorer):
        began = time.perf_counter()
        (answer,) = await score(scorer, [request("ann")])
        assert min(answer.fetch_s, answer.encode_s, answer.infer_s) > 0
        assert began + answer.infer_s < answer.ended <= time.perf_counter()


class TestStages:
    async def test_preparing_runs_nothing(self, scorer, redis, model, metrics):
        redis.set("history:ann", records(*steps(1, 2, 3)))
        (one,) = await scorer.prepare([request("ann", 7, 91)])
        assert [len(one.history_items), len(one.history_buckets)] == [3, 3]
        assert [one.unknown_candidates, one.degraded] == [1, False]
        assert model.runs == []
        assert sample(metrics, "mneme_batch_requests_count") == 0

    async def test_what_was_prepared_in_several_batches_is_run_in_one(self, scorer, redis, model):
        redis.set("history:ann", records(*steps(5, 6, 7)))
        redis.set("history:bob", records((9, NOW)))
        (ann,) = await scorer.prepare([request("ann", 1, 2, at=NOW + 2)])
        nobody, bob = await scorer.prepare([request("nobody", 3), request("bob", 4)])
        answers = await scorer.run([bob, ann, nobody])
        assert [scores(answer) for answer in answers] == [
            [score_of(4, behaviors=1, oldest=9)],
            [score_of(c, behaviors=3, oldest=5) for c in (1, 2)],
            [score_of(3)],
        ]
        assert model.batch_sizes == [3]

    @pytest.mark.parametrize(
        ("history", "length"),
        [
            pytest.param(None, HISTORY_LENGTH, id="as long as can be, until it is read"),
            pytest.param(b"", 1, id="given, empty"),
            pytest.param(records(*steps(1, 2, 3)), 3, id="given"),
            pytest.param(records(*steps(*range(1, 20))), HISTORY_LENGTH, id="given, too long"),
        ],
    )
    async def test_a_request_counts_what_it_can_cost(self, scorer, history, length):
        assert scorer.size(request("ann", 1, 2, history=history)) == (2, length)

    @pytest.mark.parametrize("n", [0, 1, 3, HISTORY_LENGTH + 5])
    async def test_and_what_it_does_cost_once_it_is_prepared(self, scorer, redis, n):
        redis.set("history:ann", records(*steps(*range(1, n + 1))))
        (one,) = await scorer.prepare([request("ann", 1, 2)])
        assert scorer.prepared_size(one) == (2, min(max(1, n), HISTORY_LENGTH))


class TestAlone:
    """A request that joins no batch."""

    @pytest.mark.parametrize("whole", [False, True], ids=["what the model reads", "all"])
    async def test_its_records_are_told_and_the_newest_of_them_encoded(self, scorer, redis, whole):
        stored = records(*steps(*range(1, 2 * HISTORY_LENGTH + 1)))
        redis.set("history:ann", stored)
        one, read = await scorer.prepare_alone(request("ann"), whole=whole)
        assert read == (stored if whole else stored[-12 * HISTORY_LENGTH :])
        (batched,) = await scorer.prepare([request("ann")])
        np.testing.assert_array_equal(one.history_items, batched.history_items)
        np.testing.assert_array_equal(one.history_buckets, batched.history_buckets)

    async def test_it_is_scored_in_a_run_of_its_own_of_which_a_part_is_picked(self, scorer):
        one, _ = await scorer.prepare_alone(request("ann", 3, 1, 2), whole=False)
        picked, seconds = await scorer.run_alone(one, lambda scores_C: scores_C[1:].tolist())
        assert picked == [score_of(1), score_of(2)]
        assert seconds > 0

    async def test_no_metric_of_batches_counts_it(self, scorer, metrics):
        one, _ = await scorer.prepare_alone(request("ann"), whole=False)
        await scorer.run_alone(one, len)
        assert sample(metrics, "mneme_batch_requests_count") == 0
        assert sample(metrics, "mneme_batch_work_count") == 0
        for stage in ("fetch", "encode", "infer"):
            count = "mneme_stage_seconds_count"
            assert sample(metrics, count, stage=stage) == 0

    async def test_a_score_that_is_no_number_is_never_picked_from(self, scorer, model):
        model.answers_with = float("nan")
        one, _ = await scorer.prepare_alone(request("ann"), whole=False)
        with pytest.raises(ModelFailedError, match="not a finite number"):
            await scorer.run_alone(one, len)

    async def test_a_corrupt_history_is_raised_and_counted(self, scorer, redis, metrics):
        redis.set("history:ann", records((0, NOW)))
        with pytest.raises(CorruptHistoryError, match="an item id below 1"):
            await scorer.prepare_alone(request("ann"), whole=True)
        assert corrupt_count(metrics) == 1


class TestRoundedShapes:
    async def test_a_batch_is_padded_to_a_shape_of_the_models(self, scorer, redis, model):
        """And each request still gets its own scores."""
        model.shapes = ShapeGrid(batches=(1, 4), candidates=(5, 10), lengths=(2, 6))
        redis.set("history:ann", records(*steps(5, 6, 7)))
        ann, bob = await score(scorer, [request("ann", 1, 2, at=NOW + 2), request("bob", 3)])
        (run,) = model.runs
        assert run.history_items.shape == (4, 6)
        assert run.history_buckets.shape == (4, 6, 1)
        assert run.candidate_items.shape == (4, 5)
        assert scores(ann) == [score_of(c, behaviors=3, oldest=5) for c in (1, 2)]
        assert scores(bob) == [score_of(3)]

    async def test_the_cells_of_a_batch_and_those_that_are_padding_are_counted(
        self, scorer, redis, model, metrics
    ):
        model.shapes = ShapeGrid(batches=(1, 4), candidates=(5, 10), lengths=(2, 6))
        redis.set("history:ann", records(*steps(5, 6, 7)))
        await score(scorer, [request("ann", 1, 2, at=NOW + 2), request("bob", 3)])
        assert sample(metrics, "mneme_batch_work_sum") == 4 * 5 * 6
        assert sample(metrics, "mneme_padded_cells_total") == 4 * 5 * 6 - 2 * 3
        assert sample(metrics, "mneme_candidates_total") == 3

    async def test_padding_does_not_change_the_scores_of_a_real_model(
        self, good_bundle, store, make_scorer
    ):
        model = OnnxModel(good_bundle)
        rng = np.random.default_rng(1)
        requests = [
            request(
                f"user {b}",
                *rng.choice(ITEM_IDS, 1 + 3 * b),
                at=NOW + DAY_S,
                history=records(*steps(*rng.choice(ITEM_IDS, b).tolist())),
            )
            for b in range(5)
        ]
        found = []
        for sizes in ((), (16,)):
            model.shapes = ShapeGrid(batches=sizes, candidates=sizes, lengths=sizes)
            scorer = make_scorer(store, model=model)
            found.append([scores(answer) for answer in await score(scorer, requests)])
            # Alone, each has another exact shape still.
            found.append([scores((await score(scorer, [one]))[0]) for one in requests])
        exact, *others = found
        for other in others:
            for scores_C, expected_C in zip(other, exact, strict=True):
                np.testing.assert_allclose(scores_C, expected_C, atol=1e-6)
        assert len({round(score, 6) for row in exact for score in row}) > 5


class TestCorruptHistories:
    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            pytest.param(b"x" * 13, "13 bytes is not a whole number", id="length"),
            pytest.param(b"\x01" * (12 * HISTORY_LENGTH + 7), "103 bytes is not", id="long"),
            pytest.param(records((5, NOW), (0, NOW)), "an item id below 1", id="item 0"),
            pytest.param(records((-5, NOW)), "an item id below 1", id="negative item"),
        ],
    )
    async def test_only_their_user_hears_of_it(self, scorer, redis, metrics, value, reason):
        redis.set("history:ann", value)
        redis.set("history:bob", records((9, NOW)))
        bob, ann, nobody = await score(
            scorer, [request("bob", 3), request("ann"), request("nobody", 4)]
        )
        assert isinstance(ann, CorruptHistoryError)
        assert "the history of user 'ann' cannot be read" in ann.detail
        assert reason in ann.detail
        assert scores(bob) == [score_of(3, behaviors=1, oldest=9)]
        assert scores(nobody) == [score_of(4)]
        assert corrupt_count(metrics) == 1

    async def test_what_the_model_does_not_read_is_not_judged(self, scorer, redis):
        old = [(0, NOW), *steps(*range(1, HISTORY_LENGTH + 1))]
        redis.set("history:ann", records(*old))
        (answer,) = await score(scorer, [request("ann")])
        assert scores(answer) == [score_of(1, behaviors=HISTORY_LENGTH, oldest=1)]

    async def test_a_batch_of_nothing_else_costs_no_run(self, scorer, redis, model):
        redis.rpush("history:ann", "x")
        (answer,) = await score(scorer, [request("ann")])
        assert isinstance(answer, CorruptHistoryError)
        assert model.runs == []


class TestRedisAway:
    async def test_requests_that_need_it_fail_and_others_do_not(
        self, make_scorer, away_store, metrics
    ):
        scorer = make_scorer(away_store)
        ann, bob = await score(scorer, [request("ann"), request("bob", history=records((5, NOW)))])
        assert isinstance(ann, HistoryUnavailableError)
        assert metrics.registry.get_sample_value(*FAILED_FETCHES) == 1
        assert scores(bob) == [score_of(1, behaviors=1, oldest=5)]

    async def test_or_are_scored_cold_where_the_operator_says_so(self, make_scorer, away_store):
        scorer = make_scorer(away_store, on_redis_failure="cold")
        ann, bob = await score(
            scorer, [request("ann", 3), request("bob", history=records((5, NOW)))]
        )
        assert scores(ann) == [score_of(3)]
        assert scores(bob) == [score_of(1, behaviors=1, oldest=5)]
        assert [ann.degraded, bob.degraded] == [True, False]

    async def test_requests_with_their_own_history_do_not_ask_it(self, make_scorer, away_store):
        (answer,) = await score(make_scorer(away_store), [request("ann", history=b"")])
        assert not answer.degraded


class TestModelFailures:
    async def test_a_model_that_raises_fails_the_batch(self, scorer, model):
        model.fails_with = RuntimeError("CUDA error")
        with pytest.raises(ModelFailedError, match="the model failed: CUDA error"):
            await score(scorer, [request("ann")])

    async def test_scores_of_another_shape_fail_the_batch(self, scorer, model):
        """Or a request would get fewer scores than it has candidates."""
        model.forgets_a_candidate = True
        with pytest.raises(ModelFailedError, match="shape"):
            await score(scorer, [request("ann", 1, 2)])

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    async def test_a_score_that_is_no_number_is_an_error(self, scorer, model, number):
        model.answers_with = number
        (answer,) = await score(scorer, [request("ann")])
        assert isinstance(answer, ModelFailedError)
        assert answer.detail == "the model gave a score that is not a finite number"

    async def test_the_next_batch_is_scored_again(self, scorer, model):
        model.fails_with = RuntimeError("CUDA error")
        with pytest.raises(ModelFailedError):
            await score(scorer, [request("ann")])
        model.fails_with = None
        (answer,) = await score(scorer, [request("ann", 7)])
        assert scores(answer) == [score_of(7)]


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "error", [OUT_OF_MEMORY, MemoryError("no array")], ids=["onnxruntime", "numpy"]
    )
    async def test_it_is_told_apart_from_a_model_that_fails(self, scorer, model, metrics, error):
        model.fails_with = error
        message = "no memory for a run of 2 requests with 3 candidates and 1 behaviors each"
        with pytest.raises(DeviceMemoryError, match=message):
            await score(scorer, [request("ann", 1, 2, 3), request("bob", 1)])
        assert sample(metrics, "mneme_device_memory_failures_total") == 1

    async def test_arrays_that_cannot_be_made_are_no_less(self, scorer, model, monkeypatch):
        def inputs(shape):
            raise MemoryError(shape)

        monkeypatch.setattr(model, "inputs", inputs)
        with pytest.raises(DeviceMemoryError):
            await score(scorer, [request("ann")])

    async def test_nor_is_an_explanation(self, make_scorer, store, metrics):
        model = DummyModel(explains=True)
        model.fails_with = OUT_OF_MEMORY
        scorer = make_scorer(store, model=model)
        one, _ = await scorer.prepare_alone(request("ann", 1, 2), whole=False)
        with pytest.raises(DeviceMemoryError, match="1 requests with 2 candidates and 1 behaviors"):
            await scorer.explain_alone(one)
        assert sample(metrics, "mneme_device_memory_failures_total") == 1


class TestDeviceThread:
    """What a watchdog asks of it."""

    async def test_a_run_is_told_from_the_next_and_from_none(self):
        with DeviceThread() as device:
            seen = []
            for _ in range(2):
                await device.run(lambda: seen.append(device.running_since))
            assert None not in seen
            assert len(set(seen)) == 2
            assert device.running_since is None

    async def test_failures_in_a_row_are_counted_but_for_want_of_memory(self):
        def fail(error: Exception) -> None:
            raise error

        with DeviceThread() as device:
            counts, rows = [], set()
            for error in (ModelFailedError("a"), DeviceMemoryError("b"), ModelFailedError("c")):
                with pytest.raises(type(error)):
                    await device.run(fail, error)
                counts.append(device.failures)
                rows.add(device.failing_since)
            await device.run(int)
            counts.append(device.failures)
            assert counts == [1, 1, 2, 0]
            assert len(rows) == 1
            assert (device.failing_since, device.running_since) == (None, None)
