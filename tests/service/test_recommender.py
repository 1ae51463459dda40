"""The ranking of a whole catalogue: which items, in which order, in which blocks, until when."""

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
    NotRecommendableError,
    OverloadedError,
)
from service.metrics import Metrics
from service.model import OnnxModel
from service.recommender import Recommended, Recommender, RecommendRequest, highest
from service.scorer import BatchScorer, DeviceThread, Prepared, Scored, ScoreRequest
from tests.service.arm_metrics import of_arm, sample
from tests.service.dummy_model import HISTORY_LENGTH, KNOWN_ITEMS, DummyModel, score_of
from tests.service.histories import DAY_S, NOW, records, steps
from tests.service.live_service import PATIENCE_S
from tests.service.tiny_bundle import ITEM_IDS, change_manifest

EVERYTHING = 1000
TIES = [3.0, 1.0, 3.0, 2.0, 3.0, 1.0]


class TableModel(DummyModel):
    """Scores a candidate by a table of its own, whatever the history. `table`: of items 1 .. 90."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = np.concatenate([[0, 0], table]).astype(np.float32)

    def run(self, inputs):
        super().run(inputs)
        return self.table[inputs.candidate_items]


class Device:
    """Is lent to whoever asks, at once; keeps how long it was asked for."""

    def __init__(self) -> None:
        self.expected_s: list[float] = []

    @asynccontextmanager
    async def lend(self, expected_s: float) -> AsyncIterator[None]:
        self.expected_s.append(expected_s)
        yield


class Client:
    """Leaves, or lingers for a second, when it has been asked so often; neither unless said."""

    def __init__(
        self, *, leaves_after: float = float("inf"), lingers_after: float = float("inf")
    ) -> None:
        self._asked = 0
        self._leaves_after = leaves_after
        self._lingers_after = lingers_after

    async def has_left(self) -> bool:
        self._asked += 1
        if self._asked > self._lingers_after:
            await asyncio.sleep(1.0)
        return self._asked > self._leaves_after


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def make_recommender(store, device, metrics) -> Iterator[Any]:
    thread = DeviceThread()

    def make(
        model: Any, *, block_items: int = 30, history: Any = store, on_redis_failure: Any = "refuse"
    ) -> Recommender:
        scorer = BatchScorer(
            model, history, of_arm(metrics), device=thread, on_redis_failure=on_redis_failure
        )
        return Recommender(
            scorer, lend=device.lend, block_items=block_items, metrics=of_arm(metrics)
        )

    yield make
    thread.shutdown()


async def ask(
    recommender: Recommender,
    user_id: str = "ann",
    k: int = EVERYTHING,
    *,
    exclude_seen: bool = False,
    at: int = NOW,
    within_s: float = PATIENCE_S,
    client: Client | None = None,
) -> Recommended:
    return await recommender.recommend(
        RecommendRequest(user_id=user_id, k=k, exclude_seen=exclude_seen, ranking_time=at),
        deadline=time.perf_counter() + within_s,
        has_left=(client or Client()).has_left,
    )


def dropped(metrics: Metrics, reason: str) -> float | None:
    return sample(metrics, "mneme_dropped_total", reason=reason)


def ranked(table: Any, k: int) -> list[int]:
    """Return the items of a table of scores, by plain sorting."""
    return [item for item, _ in sorted(enumerate(table, 1), key=lambda x: (-x[1], x[0]))][:k]


class TestHighest:
    @pytest.mark.parametrize(
        ("k", "places"),
        [
            (1, [0]),
            (2, [0, 2]),
            (3, [0, 2, 4]),
            (4, [0, 2, 3, 4]),
            (5, [0, 1, 2, 3, 4]),
            (6, [0, 1, 2, 3, 4, 5]),
            (7, [0, 1, 2, 3, 4, 5]),
        ],
    )
    def test_of_equal_scores_the_first_are_taken(self, k, places):
        assert highest(np.array(TIES, dtype=np.float32), k).tolist() == places

    def test_a_zero_below_zero_equals_the_other(self):
        assert highest(np.array([-0.0, 0.0, -0.0], dtype=np.float32), 2).tolist() == [0, 1]

    def test_what_is_left_out_comes_last(self):
        scores = np.array([-np.inf, -5.0, -np.inf, -7.0], dtype=np.float32)
        assert highest(scores, 2).tolist() == [1, 3]

    @pytest.mark.parametrize("seed", range(5))
    def test_they_are_those_of_plain_sorting(self, seed):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, 20, 200).astype(np.float32)
        for k in (1, 2, 10, 100, 199, 200, 201):
            assert [place + 1 for place in highest(scores, k)] == sorted(ranked(scores, k))


class TestBlocks:
    @pytest.mark.parametrize("block_items", [1, 7, 29, 30, 31, 45, 89, 90, 91, 65_536])
    @pytest.mark.parametrize("k", [1, 3, 31, 89, 90])
    async def test_the_ranking_is_that_of_plain_sorting(self, make_recommender, block_items, k):
        """A third of the scores are equal to another: across blocks, too."""
        table = np.random.default_rng(block_items).integers(0, 60, KNOWN_ITEMS)
        found = await ask(make_recommender(TableModel(table), block_items=block_items), k=k)
        assert found.item_ids.tolist() == ranked(table, k)
        assert found.scores.tolist() == table[found.item_ids - 1].tolist()

    @pytest.mark.parametrize(
        ("block_items", "n_blocks", "size"),
        [(90, 1, 90), (91, 1, 90), (89, 2, 45), (30, 3, 30), (29, 4, 23), (7, 13, 7), (1, 90, 1)],
    )
    async def test_all_runs_are_of_one_size_and_as_few_as_can_be(
        self, make_recommender, device, block_items, n_blocks, size
    ):
        """One request, no padding, and every item in at least one."""
        model = DummyModel()
        await ask(make_recommender(model, block_items=block_items))
        assert [run.candidate_items.shape for run in model.runs] == [(1, size)] * n_blocks
        scored = np.unique(np.concatenate([run.candidate_items[0] for run in model.runs]))
        assert scored.tolist() == list(range(2, KNOWN_ITEMS + 2))
        assert len(device.expected_s) == n_blocks

    @pytest.mark.parametrize("block_items", [7, 90])
    async def test_equal_scores_are_ordered_by_item_id(self, make_recommender, block_items):
        model = DummyModel()
        model.answers_with = 0.5
        found = await ask(make_recommender(model, block_items=block_items), k=10)
        assert found.item_ids.tolist() == list(range(1, 11))

    async def test_the_history_is_read_once_and_seen_by_every_block(self, make_recommender, redis):
        redis.set("history:ann", records((5, NOW - DAY_S), (7, NOW)))
        redis.config_resetstat()
        found = await ask(make_recommender(DummyModel()), at=NOW + DAY_S)
        items = range(KNOWN_ITEMS, 0, -1)
        assert found.item_ids.tolist() == list(items)
        assert found.scores.tolist() == [
            score_of(item, behaviors=2, oldest=5, day=1) for item in items
        ]
        assert found.history_length == 2
        assert redis.info("commandstats")["cmdstat_getrange"]["calls"] == 1

    async def test_requests_are_ranked_one_after_the_other(self, make_recommender):
        """Side by side, all of them would be late."""
        model = DummyModel()
        recommender = make_recommender(model)
        await asyncio.gather(*(ask(recommender, f"user {n}") for n in range(3)))
        first_rows = [int(run.candidate_items[0, 0]) for run in model.runs]
        assert first_rows == [2, 32, 62] * 3

    async def test_the_device_is_asked_for_as_long_as_a_block_takes(self, make_recommender, device):
        model = DummyModel()
        model.takes_s = 0.02
        await ask(make_recommender(model))
        assert device.expected_s[0] == 0.0
        assert all(0.02 <= seconds < PATIENCE_S for seconds in device.expected_s[1:])

    async def test_the_time_of_each_stage_is_told(self, make_recommender):
        model = DummyModel()
        model.takes_s = 0.01
        found = await ask(make_recommender(model))
        assert list(found.seconds) == ["fetch", "encode", "infer", "queue"]
        assert found.seconds["infer"] >= 3 * 0.01
        assert min(found.seconds.values()) >= 0

    async def test_it_ranks_as_a_real_model_scores(self, bundle, make_recommender, store, metrics):
        change_manifest(bundle, score_kind="affinity")
        model = OnnxModel(bundle)
        history = records(*steps(*ITEM_IDS[3:9].tolist()))
        await store.append({"ann": history})
        found = await ask(make_recommender(model, block_items=17), at=NOW + DAY_S)
        with DeviceThread() as thread:
            scorer = BatchScorer(
                model,
                store,
                of_arm(metrics),
                device=thread,
                on_redis_failure="refuse",
            )
            (one,) = await scorer.prepare(
                [ScoreRequest(user_id="ann", candidates=ITEM_IDS, ranking_time=NOW + DAY_S)]
            )
            assert isinstance(one, Prepared)
            (scored,) = await scorer.run([one])
        assert isinstance(scored, Scored)
        assert sorted(found.item_ids.tolist()) == ITEM_IDS.tolist()
        assert (np.diff(found.scores) <= 0).all()
        of_item = dict(zip(ITEM_IDS.tolist(), scored.scores.tolist(), strict=True))
        np.testing.assert_allclose(
            found.scores, [of_item[item] for item in found.item_ids.tolist()], atol=1e-6
        )
        assert len(np.unique(found.scores)) > 5


class TestSeenItems:
    @pytest.mark.parametrize("block_items", [7, 90])
    async def test_they_are_left_out(self, make_recommender, redis, block_items):
        """Twice seen or unknown to the catalogue makes no difference."""
        redis.set("history:ann", records(*steps(90, 88, 90, 2**63 - 1, 3)))
        recommender = make_recommender(DummyModel(), block_items=block_items)
        found = await ask(recommender, k=4, exclude_seen=True)
        assert found.item_ids.tolist() == [89, 87, 86, 85]
        assert (await ask(recommender, k=4)).item_ids.tolist() == [90, 89, 88, 87]

    async def test_those_that_the_model_does_not_read_any_more_too(self, make_recommender, redis):
        seen = range(90, 90 - 2 * HISTORY_LENGTH, -1)
        redis.set("history:ann", records(*steps(*seen)))
        found = await ask(make_recommender(DummyModel()), k=2, exclude_seen=True)
        assert found.item_ids.tolist() == [74, 73]
        assert found.history_length == HISTORY_LENGTH
        oldest_read = seen[HISTORY_LENGTH]
        assert found.scores.tolist() == [
            score_of(item, behaviors=HISTORY_LENGTH, oldest=oldest_read) for item in (74, 73)
        ]

    @pytest.mark.parametrize("block_items", [4, 90])
    async def test_all_others_are_fewer_than_asked(self, make_recommender, redis, block_items):
        """Of the blocks of four, some hold nothing else."""
        seen = range(1, 17)
        redis.set("history:ann", records(*steps(*seen)))
        recommender = make_recommender(DummyModel(), block_items=block_items)
        found = await ask(recommender, k=KNOWN_ITEMS, exclude_seen=True)
        assert found.item_ids.tolist() == list(range(KNOWN_ITEMS, 16, -1))

    async def test_nobody_has_seen_anything_without_a_history(self, make_recommender):
        found = await ask(make_recommender(DummyModel()), "nobody", k=2, exclude_seen=True)
        assert found.item_ids.tolist() == [90, 89]
        assert found.history_length == 0


class TestRefused:
    async def test_a_model_of_click_probabilities_before_anything_is_read(
        self, make_recommender, away_store
    ):
        model = DummyModel(score_kind="probability")
        recommender = make_recommender(model, history=away_store)
        await recommender.warm_up()
        with pytest.raises(NotRecommendableError, match="dummy gives the probability of a click"):
            await ask(recommender)
        assert model.runs == []

    @pytest.mark.parametrize("exclude_seen", [False, True], ids=["with seen", "without seen"])
    @pytest.mark.parametrize(
        "value", [b"x" * 13, records((5, NOW), (0, NOW))], ids=["length", "item 0"]
    )
    async def test_a_corrupt_history(self, make_recommender, redis, metrics, value, exclude_seen):
        redis.set("history:ann", value)
        model = DummyModel()
        with pytest.raises(CorruptHistoryError, match="the history of user 'ann' cannot be read"):
            await ask(make_recommender(model), exclude_seen=exclude_seen)
        assert sample(metrics, "mneme_corrupt_histories_total") == 1
        assert model.runs == []

    async def test_what_the_model_does_not_read_is_not_judged(self, make_recommender, redis):
        redis.set("history:ann", records((0, NOW), (-9, NOW), *steps(*range(1, 9))))
        found = await ask(make_recommender(DummyModel()), exclude_seen=True)
        assert found.item_ids.tolist() == list(range(90, 8, -1))

    async def test_a_history_that_cannot_be_read(self, make_recommender, away_store):
        with pytest.raises(HistoryUnavailableError):
            await ask(make_recommender(DummyModel(), history=away_store))

    async def test_or_it_is_cold_where_the_operator_says_so(self, make_recommender, away_store):
        recommender = make_recommender(DummyModel(), history=away_store, on_redis_failure="cold")
        found = await ask(recommender, k=1, exclude_seen=True)
        assert found.degraded
        assert found.scores.tolist() == [score_of(90)]

    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    async def test_a_score_that_is_no_number_anywhere_in_the_catalogue(
        self, make_recommender, number
    ):
        table = np.arange(KNOWN_ITEMS, dtype=np.float64)
        table[70] = number
        recommender = make_recommender(TableModel(table))
        with pytest.raises(ModelFailedError, match="not a finite number"):
            await ask(recommender, k=1)

    async def test_a_model_that_raises_and_the_next_request_is_ranked_again(self, make_recommender):
        model = DummyModel()
        recommender = make_recommender(model)
        model.fails_with = RuntimeError("CUDA error")
        with pytest.raises(ModelFailedError, match="CUDA error"):
            await ask(recommender)
        model.fails_with = None
        assert (await ask(recommender, k=1)).item_ids.tolist() == [90]


class TestDeadlines:
    async def test_no_block_begins_after_the_deadline(self, make_recommender, metrics):
        model = DummyModel()
        with pytest.raises(DeadlineExceededError, match="1 of 3 blocks of the catalogue are not"):
            await ask(make_recommender(model), within_s=1.0, client=Client(lingers_after=2))
        assert len(model.runs) == 2
        assert dropped(metrics, "deadline") == 1

    async def test_a_lone_request_is_begun_whatever_the_prediction(self, make_recommender):
        """The prediction may be wrong, and only a run can tell."""
        model = DummyModel()
        recommender = make_recommender(model, block_items=90)
        model.takes_s = 1.0
        await ask(recommender)
        model.takes_s = 0.0
        assert (await ask(recommender, k=1, within_s=0.9)).item_ids.tolist() == [90]

    async def test_what_cannot_be_ranked_in_time_beside_others_is_refused_at_once(
        self, make_recommender, metrics
    ):
        model = DummyModel()
        recommender = make_recommender(model)
        model.takes_s = 0.1
        await ask(recommender)
        with model.held():
            first = asyncio.create_task(ask(recommender, k=1))
            await asyncio.to_thread(model.wait_until_busy)
            with pytest.raises(OverloadedError, match=r"the deadline is in \d+"):
                await ask(recommender, within_s=0.5)
        assert (await first).item_ids.tolist() == [90]
        assert dropped(metrics, "hopeless") == 1

    async def test_what_has_waited_too_long_costs_no_block(self, make_recommender, metrics):
        model = DummyModel()
        recommender = make_recommender(model)
        with model.held():
            first = asyncio.create_task(ask(recommender, k=1))
            await asyncio.to_thread(model.wait_until_busy)
            late = asyncio.create_task(ask(recommender, within_s=0.2))
            await asyncio.sleep(0.21)
        assert (await first).item_ids.tolist() == [90]
        with pytest.raises(DeadlineExceededError, match="3 of 3 blocks"):
            await late
        assert len(model.runs) == 3
        assert dropped(metrics, "deadline") == 1


class TestClientsThatLeave:
    @pytest.mark.parametrize("n_blocks", [0, 1, 2])
    async def test_no_block_is_run_for_one_who_left(self, make_recommender, metrics, n_blocks):
        model = DummyModel()
        with pytest.raises(ClientLeft):
            await ask(make_recommender(model), client=Client(leaves_after=n_blocks))
        assert len(model.runs) == n_blocks
        assert dropped(metrics, "client left") == 1

    async def test_the_next_one_is_served(self, make_recommender):
        recommender = make_recommender(DummyModel())
        with pytest.raises(ClientLeft):
            await ask(recommender, client=Client(leaves_after=1))
        assert (await ask(recommender, k=1)).item_ids.tolist() == [90]


class TestWarmUp:
    async def test_it_runs_a_block_with_a_full_history(self, make_recommender, device):
        model = DummyModel()
        model.takes_s = 0.02
        recommender = make_recommender(model, block_items=50)
        await recommender.warm_up()
        assert {run.candidate_items.shape for run in model.runs} == {(1, 45)}
        assert {run.history_items.shape for run in model.runs} == {(1, HISTORY_LENGTH)}
        await ask(recommender)
        assert all(0.02 <= seconds < PATIENCE_S for seconds in device.expected_s)

    async def test_a_catalogue_without_items_is_not_run(self, make_recommender):
        model = DummyModel()
        model.catalogue = type(model.catalogue)(np.empty(0, dtype=np.int64))
        await make_recommender(model).warm_up()
        assert model.runs == []


class TestOutOfMemory:
    """The model has memory for so many items of somebody without a history."""

    def widths(self, model: DummyModel) -> list[int]:
        return [run.candidate_items.shape[1] for run in model.runs]

    @pytest.mark.parametrize("memory", [44, 30, 7, 1])
    async def test_blocks_are_halved_until_they_fit_and_the_ranking_is_the_same(
        self, make_recommender, memory
    ):
        model = TableModel(np.random.default_rng(1).permutation(KNOWN_ITEMS) // 3)
        model.memory = memory
        found = await ask(make_recommender(model, block_items=90), "nobody", k=7)
        assert found.item_ids.tolist() == ranked(model.table[2:], 7)
        assert max(self.widths(model)[-3:]) <= memory

    async def test_what_has_been_ranked_is_not_ranked_again(self, make_recommender):
        """Memory is short from the second block on."""
        model = DummyModel()
        recommender = make_recommender(model, block_items=30)
        client = Client()

        async def has_left() -> bool:
            model.memory = 15 if model.runs else model.memory
            return await Client.has_left(client)

        found = await recommender.recommend(
            RecommendRequest(user_id="nobody", k=KNOWN_ITEMS, exclude_seen=False, ranking_time=NOW),
            deadline=time.perf_counter() + PATIENCE_S,
            has_left=has_left,
        )
        assert found.item_ids.tolist() == list(range(KNOWN_ITEMS, 0, -1))
        assert self.widths(model) == [30, 30, 15, 15, 15, 15]

    async def test_the_next_request_begins_with_the_smaller_blocks(self, make_recommender):
        model = DummyModel()
        model.memory = 45
        recommender = make_recommender(model, block_items=90)
        await ask(recommender, "nobody", k=1)
        await ask(recommender, "nobody", k=1)
        assert self.widths(model) == [90, 45, 45, 45, 45]

    async def test_without_memory_for_one_item_it_is_an_error(self, make_recommender):
        model = DummyModel()
        model.memory = 0
        with pytest.raises(DeviceMemoryError, match="1 requests with 1 candidates"):
            await ask(make_recommender(model), "nobody")

    async def test_the_warm_up_finds_what_fits(self, make_recommender):
        model = DummyModel()
        model.memory = 45 * HISTORY_LENGTH
        recommender = make_recommender(model, block_items=90)
        await recommender.warm_up()
        assert self.widths(model) == [90, 45, 45]
