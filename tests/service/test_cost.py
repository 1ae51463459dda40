"""Predicting what a batch takes, from synthetic batches whose cost is known."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cost import BatchCost, Margin

FIXED_S = 0.002
PER_WORK_S = 1e-8
WORKS = (1000, 20_000, 100_000, 400_000, 1_000_000)


def true_s(work: int) -> float:
    return FIXED_S + PER_WORK_S * work


def learn(
    cost: BatchCost,
    seconds: Callable[[int], float],
    *,
    n: int = 500,
    works: tuple[int, ...] = WORKS,
    noise: float = 0.0,
    seed: int = 1,
) -> None:
    """Measure batches of random work, off by up to the share `noise`."""
    rng = random.Random(seed)
    for _ in range(n):
        work = rng.choice(works)
        cost.update(work, seconds(work) * (1 + rng.uniform(-noise, noise)))


class TestFit:
    def test_without_evidence_nothing_is_predicted_to_take_time(self):
        cost = BatchCost()
        assert cost.predict(10**9, batches=5) == 0.0
        assert cost.worthwhile_work(0.003) == math.inf

    def test_a_warm_up_of_nothing_is_no_evidence(self):
        cost = BatchCost()
        cost.learn_from_warm_up([])
        assert cost.predict(10**9) == 0.0

    def test_both_parts_are_found_from_exact_batches(self):
        cost = BatchCost()
        learn(cost, true_s, n=2000)
        assert cost.fixed_s == pytest.approx(FIXED_S)
        assert cost.per_work_s == pytest.approx(PER_WORK_S)

    @pytest.mark.parametrize("seed", range(5))
    def test_both_parts_are_found_under_noise(self, seed):
        cost = BatchCost()
        learn(cost, true_s, n=1000, noise=0.2, seed=seed)
        assert cost.fixed_s == pytest.approx(FIXED_S, rel=0.3)
        assert cost.per_work_s == pytest.approx(PER_WORK_S, rel=0.1)
        for work in WORKS:
            assert cost.predict(work) == pytest.approx(true_s(work), rel=0.25)

    def test_a_prediction_is_the_fixed_cost_of_each_batch_and_the_cost_of_all_work(self):
        cost = BatchCost()
        cost.learn_from_warm_up([(0, 2.0), (10, 7.0)])
        assert cost.predict(10) == pytest.approx(7.0)
        assert cost.predict(10, batches=3) == pytest.approx(11.0)

    @pytest.mark.parametrize("factor", [0.1, 3.0, 20.0], ids=["faster", "slower", "far slower"])
    def test_it_follows_a_change(self, factor):
        cost = BatchCost()
        learn(cost, true_s)
        learn(cost, lambda work: factor * true_s(work), n=1500)
        for work in WORKS:
            assert cost.predict(work) == pytest.approx(factor * true_s(work), rel=0.1)

    def test_batches_that_are_all_alike_predict_their_own_time_exactly(self):
        """Their parts cannot be told apart, and need not be."""
        cost = BatchCost()
        learn(cost, true_s, works=(20_000,))
        assert cost.predict(20_000) == pytest.approx(true_s(20_000))
        assert cost.worthwhile_work(0.003) == math.inf

    def test_a_warm_up_keeps_the_parts_apart_while_all_batches_are_alike(self):
        cost = BatchCost()
        cost.learn_from_warm_up([(work, true_s(work)) for work in WORKS])
        learn(cost, true_s, n=2000, works=(20_000,))
        assert cost.fixed_s == pytest.approx(FIXED_S)
        assert cost.per_work_s == pytest.approx(PER_WORK_S)

    @pytest.mark.parametrize("seed", range(5))
    def test_and_while_they_are_almost_alike(self, seed):
        """Their noise would tell another cost of work every time."""
        cost = BatchCost()
        cost.learn_from_warm_up([(work, true_s(work)) for work in WORKS])
        learn(cost, true_s, works=(20_000, 21_000), noise=0.2, seed=seed)
        assert cost.fixed_s == pytest.approx(FIXED_S, rel=0.3)
        assert cost.per_work_s == pytest.approx(PER_WORK_S, rel=0.1)

    def test_what_is_served_outweighs_the_warm_up(self):
        cost = BatchCost()
        cost.learn_from_warm_up([(work, 5 * true_s(work)) for work in WORKS])
        learn(cost, true_s, n=2000)
        for work in WORKS[1:]:
            assert cost.predict(work) == pytest.approx(true_s(work), rel=0.4)

    @pytest.mark.parametrize("work", WORKS)
    def test_one_hiccup_of_a_hundred_times_moves_predictions_by_little(self, work):
        cost = BatchCost()
        learn(cost, true_s)
        cost.update(work, 100 * true_s(work))
        for other in WORKS:
            assert cost.predict(other) == pytest.approx(true_s(other), rel=0.15)

    @given(
        warm_up=st.lists(st.tuples(st.integers(1, 10**7), st.floats(0, 100)), max_size=5),
        batches=st.lists(st.tuples(st.integers(1, 10**7), st.floats(0, 100)), max_size=30),
    )
    def test_no_prediction_is_ever_negative(self, warm_up, batches):
        cost = BatchCost()
        cost.learn_from_warm_up(warm_up)
        for work, seconds in batches:
            cost.update(work, seconds)
            assert cost.fixed_s >= 0
            assert cost.per_work_s >= 0
            assert math.isfinite(cost.predict(10**7, batches=9))
            assert cost.worthwhile_work(0.003) >= 0

    @pytest.mark.parametrize(
        ("batches", "fixed_s", "per_work_s"),
        [
            pytest.param([(1, 3.0), (3, 1.0)], 2.0, 0.0, id="larger ones were faster"),
            pytest.param([(2, 1.0), (4, 4.0)], 0.0, 0.9, id="nothing would take less than no time"),
        ],
    )
    def test_a_part_that_would_be_negative_is_nothing(self, batches, fixed_s, per_work_s):
        cost = BatchCost()
        cost.learn_from_warm_up(batches)
        assert cost.fixed_s == pytest.approx(fixed_s)
        assert cost.per_work_s == pytest.approx(per_work_s)


class TestWorthwhileWork:
    def test_a_batch_pays_until_its_fixed_cost_is_a_tenth(self):
        cost = BatchCost()
        cost.learn_from_warm_up([(1, 4.0), (11, 34.0)])
        limit = cost.worthwhile_work(0.0)
        assert limit == pytest.approx(3.0)
        assert cost.fixed_s / (cost.fixed_s + cost.per_work_s * limit) == pytest.approx(0.1)

    def test_a_short_batch_may_always_grow(self):
        cost = BatchCost()
        cost.learn_from_warm_up([(1, 4.0), (11, 34.0)])
        assert cost.predict(round(cost.worthwhile_work(301.0))) == pytest.approx(301.0)

    def test_work_that_costs_nothing_may_be_endless(self):
        cost = BatchCost()
        cost.learn_from_warm_up([(1, 4.0), (11, 4.0)])
        assert cost.worthwhile_work(0.0) == math.inf


class TestMargin:
    def test_it_begins_at_nothing_and_stays_there_while_nobody_is_late(self):
        margin = Margin(late_share=0.01, largest_s=1.0)
        for _ in range(100):
            margin.update(is_late=False)
        assert margin.value_s == 0.0

    def test_it_comes_to_rest_where_so_many_are_late(self):
        """An answer is late when its error, uniform in 0 .. 10 ms, is above the margin."""
        margin = Margin(late_share=0.05, largest_s=0.1)
        rng = random.Random(1)
        late = 0
        for n in range(40_000):
            is_late = rng.uniform(0.0, 0.01) > margin.value_s
            late += is_late and n >= 20_000
            margin.update(is_late=is_late)
        assert late / 20_000 == pytest.approx(0.05, abs=0.02)

    def test_it_is_never_wider_than_the_largest(self):
        margin = Margin(late_share=0.01, largest_s=0.009)
        for _ in range(1000):
            margin.update(is_late=True)
        assert margin.value_s == 0.009

    def test_after_a_stall_it_comes_down_again(self):
        margin = Margin(late_share=0.005, largest_s=0.009)
        for _ in range(64):
            margin.update(is_late=True)
        for _ in range(5000):
            margin.update(is_late=False)
        assert margin.value_s == 0.0
