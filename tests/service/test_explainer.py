"""Explanations: one run between two batches, one after the other, until when."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from service.errors import (
    ClientLeft,
    CorruptHistoryError,
    DeadlineExceededError,
    DeviceMemoryError,
    HistoryUnavailableError,
    ModelFailedError,
    NotExplainableError,
    OverloadedError,
)
from service.explainer import Explained, Explainer
from service.metrics import Metrics
from service.scorer import BatchScorer, DeviceThread, ScoreRequest
from tests.service.arm_metrics import of_arm, sample
from tests.service.dummy_model import HISTORY_LENGTH, PASSES, DummyModel, score_of
from tests.service.histories import NOW, records, steps
from tests.service.live_service import PATIENCE_S


class Device:
    """Is lent to whoever asks, at once; keeps how often, and how many had it at a time."""

    def __init__(self) -> None:
        self.n_lent = self.n_inside = self.most_inside = 0

    @asynccontextmanager
    async def lend(self, expected_s: float) -> AsyncIterator[None]:
        assert 0 <= expected_s < PATIENCE_S
        self.n_lent += 1
        self.n_inside += 1
        self.most_inside = max(self.most_inside, self.n_inside)
        yield
        self.n_inside -= 1


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def make_explainer(store, device, metrics) -> Iterator[Any]:
    thread = DeviceThread()

    def make(model: Any, *, history: Any = store, on_redis_failure: Any = "refuse") -> Explainer:
        scorer = BatchScorer(
            model, history, of_arm(metrics), device=thread, on_redis_failure=on_redis_failure
        )
        return Explainer(scorer, lend=device.lend, metrics=of_arm(metrics))

    yield make
    thread.shutdown()


async def ask(
    explainer: Explainer,
    *candidates: int,
    user_id: str = "ann",
    history: bytes | None = None,
    within_s: float = PATIENCE_S,
    has_left: bool = False,
) -> Explained:
    async def left() -> bool:
        return has_left

    return await explainer.explain(
        ScoreRequest(
            user_id=user_id,
            candidates=np.array(candidates or (1,), dtype=np.int64),
            ranking_time=NOW,
            history=history,
        ),
        deadline=time.perf_counter() + within_s,
        has_left=left,
    )


class TestExplain:
    async def test_every_behavior_has_a_weight_for_each_candidate_and_pass(
        self, make_explainer, redis, device
    ):
        redis.set("history:ann", records((5, NOW - 2), (7, NOW - 1)))
        found = await ask(make_explainer(DummyModel(explains=True)), 3, 91)
        assert found.scores.tolist() == [
            score_of(3, behaviors=2, oldest=5, day=0),
            score_of(99, behaviors=2, oldest=5, day=0),
        ]
        assert found.weights.tolist() == [
            [[305, 307], [305.5, 307.5], [306, 308]],
            [[9905, 9907], [9905.5, 9907.5], [9906, 9908]],
        ]
        assert found.item_ids.tolist() == [5, 7]
        assert found.times.tolist() == [NOW - 2, NOW - 1]
        assert found.known.tolist() == [True, False]
        assert not found.degraded
        assert list(found.seconds) == ["fetch", "encode", "infer", "queue"]
        assert device.n_lent == 1

    async def test_no_behavior_has_none(self, make_explainer):
        found = await ask(make_explainer(DummyModel(explains=True)), 3, user_id="nobody")
        assert found.scores.tolist() == [score_of(3)]
        assert found.weights.shape == (1, PASSES, 0)
        assert found.item_ids.tolist() == []

    async def test_it_tells_of_what_the_model_reads_and_no_more(self, make_explainer, redis):
        redis.set("history:ann", records(*steps(*range(1, 13), start=NOW - 20)))
        found = await ask(make_explainer(DummyModel(explains=True)))
        assert found.item_ids.tolist() == list(range(13 - HISTORY_LENGTH, 13))

    async def test_a_history_that_came_along_is_read_and_not_redis(
        self, make_explainer, away_store
    ):
        explainer = make_explainer(DummyModel(explains=True), history=away_store)
        found = await ask(explainer, history=records((9, NOW)))
        assert found.item_ids.tolist() == [9]

    async def test_one_is_made_after_the_other(self, make_explainer, device):
        model = DummyModel(explains=True)
        explainer = make_explainer(model)
        with model.held():
            asked = [asyncio.create_task(ask(explainer, n)) for n in (1, 2, 3)]
            await asyncio.to_thread(model.wait_until_busy)
        assert [(await one).scores.tolist() for one in asked] == [[1.0], [2.0], [3.0]]
        assert (device.n_lent, device.most_inside) == (3, 1)

    async def test_no_more_than_sixteen_wait(self, make_explainer, metrics):
        model = DummyModel(explains=True)
        explainer = make_explainer(model)
        with model.held():
            asked = [asyncio.create_task(ask(explainer, 1)) for _ in range(16)]
            await asyncio.to_thread(model.wait_until_busy)
            with pytest.raises(OverloadedError, match="16 explanations are waiting"):
                await ask(explainer, 1)
        assert [(await one).scores.tolist() for one in asked] == [[1.0]] * 16
        assert sample(metrics, "mneme_dropped_total", reason="overloaded") == 1
        assert (await ask(explainer, 1)).scores.tolist() == [1.0]

    async def test_one_that_does_not_fit_is_told_so(self, make_explainer):
        model = DummyModel(explains=True)
        model.memory = 0
        with pytest.raises(DeviceMemoryError, match="1 requests with 2 candidates"):
            await ask(make_explainer(model), 1, 2)


class TestRefused:
    async def test_a_model_without_an_explain_graph_before_anything_is_read(
        self, make_explainer, away_store
    ):
        with pytest.raises(NotExplainableError, match="the bundle of dummy-1 has no explain graph"):
            await ask(make_explainer(DummyModel(), history=away_store))

    async def test_a_corrupt_history(self, make_explainer, redis):
        redis.set("history:ann", b"x" * 13)
        with pytest.raises(CorruptHistoryError, match="the history of user 'ann' cannot be read"):
            await ask(make_explainer(DummyModel(explains=True)))

    async def test_a_history_that_cannot_be_read(self, make_explainer, away_store):
        with pytest.raises(HistoryUnavailableError):
            await ask(make_explainer(DummyModel(explains=True), history=away_store))

    async def test_or_it_is_cold_where_the_operator_says_so(self, make_explainer, away_store):
        model = DummyModel(explains=True)
        explainer = make_explainer(model, history=away_store, on_redis_failure="cold")
        assert (await ask(explainer)).degraded

    async def test_a_weight_or_score_that_is_no_number(self, make_explainer):
        model = DummyModel(explains=True)
        model.answers_with = float("nan")
        with pytest.raises(ModelFailedError, match="not a finite number"):
            await ask(make_explainer(model))

    async def test_a_model_that_raises_and_the_next_request_is_answered(self, make_explainer):
        model = DummyModel(explains=True)
        explainer = make_explainer(model)
        model.fails_with = RuntimeError("CUDA error")
        with pytest.raises(ModelFailedError, match="CUDA error"):
            await ask(explainer)
        model.fails_with = None
        assert (await ask(explainer, 4)).scores.tolist() == [score_of(4)]

    async def test_one_who_left_or_waited_too_long_costs_no_run(self, make_explainer, metrics):
        model = DummyModel(explains=True)
        explainer = make_explainer(model)
        with pytest.raises(ClientLeft):
            await ask(explainer, has_left=True)
        with pytest.raises(DeadlineExceededError, match="passed while others were explained"):
            await ask(explainer, within_s=-1)
        assert model.runs == []
        for reason in ("client left", "deadline"):
            assert sample(metrics, "mneme_dropped_total", reason=reason) == 1
