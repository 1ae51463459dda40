"""Sampled negatives: never from a user's past, reproducible, as frequent as asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.negatives import NegativeSampler
from training.errors import TrainingError

ROWS = st.lists(
    st.tuples(
        st.integers(1, 3), st.integers(1, 8), st.integers(0, 7), st.sampled_from([None, 0, 1])
    ),
    min_size=1,
    max_size=30,
).filter(lambda rows: any(label != 0 for *_, label in rows))


def columns(rows):
    return dict(zip(("user", "item", "timestamp", "label"), zip(*rows, strict=True), strict=True))


def draw(sampler, users, times, n_negatives, seed=1):
    return sampler.draw(
        np.array(users, dtype=np.int32),
        np.array(times, dtype=np.int64),
        n_negatives,
        np.random.default_rng(seed),
    )


@settings(deadline=None, max_examples=30)
@given(
    rows=ROWS,
    by_popularity=st.booleans(),
    keep=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_nothing_is_drawn_that_the_user_chose_until_then(make_log, rows, by_popularity, keep, seed):
    """For every user, every moment and every pool; 0 only where the past leaves nothing."""
    log = make_log(columns(rows))
    pool = log.items[:keep]
    weights = np.arange(len(pool)) ** 2 if by_popularity else None
    sampler = NegativeSampler(log, pool, weights)
    users = np.repeat(np.arange(len(log)), 9)
    times = np.tile(np.arange(9), len(log))
    drawn = draw(sampler, users, times, 4, seed)
    assert drawn.shape == (len(users), 4)
    for user, time, items in zip(users, times, drawn.tolist(), strict=True):
        name = int(log.user_id(user))
        past = {i for u, i, t, label in rows if u == name and t <= time and label != 0}
        left = set(pool.tolist()) - past
        assert set(items) <= (left or {0})


@settings(deadline=None, max_examples=20)
@given(rows=ROWS)
def test_met_is_a_look_into_the_past(make_log, rows):
    log = make_log(columns(rows))
    sampler = NegativeSampler(log, log.items)
    users = np.arange(len(log), dtype=np.int32)
    met = sampler.met(users[:, None, None], np.arange(9)[:, None], log.items)
    chosen = {(u, i, t) for u, i, t, label in rows if label != 0}
    for u, name in enumerate(int(log.user_id(user)) for user in users):
        for time in range(9):
            assert met[u, time].tolist() == [
                any((name, item, t) in chosen for t in range(time + 1)) for item in log.items
            ]


class TestByHand:
    def test_what_is_chosen_later_or_only_shown_may_be_drawn(self, make_log):
        """At second 5, user 1 has chosen 10 and, right then, 20; 30 comes later, 40 was shown."""
        log = make_log(
            {
                "user": [1] * 4,
                "item": [10, 20, 30, 40],
                "timestamp": [4, 5, 6, 3],
                "label": [1, 1, 1, 0],
            }
        )
        drawn = draw(NegativeSampler(log, log.items), [0], [5], 200)
        assert set(drawn.ravel().tolist()) == {30, 40}

    def test_the_pasts_of_others_do_not_matter(self, make_log):
        log = make_log({"user": [1, 2], "item": [10, 20], "timestamp": [1, 1]})
        drawn = draw(NegativeSampler(log, log.items), [0, 1], [9, 9], 20)
        assert drawn.tolist() == [[20] * 20, [10] * 20]

    def test_who_met_everything_gets_padding(self, make_log):
        log = make_log({"user": [1, 1, 2], "item": [10, 20, 10], "timestamp": [1, 2, 1]})
        drawn = draw(NegativeSampler(log, log.items), [0, 0, 1], [2, 1, 2], 3)
        assert drawn.tolist() == [[0, 0, 0], [20, 20, 20], [20, 20, 20]]

    def test_who_met_nearly_everything_gets_the_rest(self, make_log):
        """One item in five hundred is left: no luck is needed to find it."""
        n = 500
        log = make_log(
            {"user": [1] * n + [2], "item": [*range(1, n), n - 1, n], "timestamp": [1] * (n + 1)}
        )
        drawn = draw(NegativeSampler(log, log.items), [0], [1], 50)
        assert drawn.tolist() == [[n] * 50]

    def test_a_pool_smaller_than_the_log(self, make_log):
        log = make_log({"user": [1] * 4, "item": [10, 20, 30, 40], "timestamp": [1, 2, 3, 4]})
        sampler = NegativeSampler(log, np.array([20, 40]))
        assert set(draw(sampler, [0], [1], 50).ravel().tolist()) == {20, 40}
        assert set(draw(sampler, [0], [2], 50).ravel().tolist()) == {40}

    def test_an_empty_pool_is_refused(self, make_log):
        log = make_log({"user": [1], "item": [10], "timestamp": [1]})
        with pytest.raises(TrainingError, match="cannot be drawn from an empty catalogue"):
            NegativeSampler(log, np.empty(0, dtype=np.int64))


class TestRandomness:
    @pytest.fixture
    def log(self, make_log):
        """User 1 chose item 9; items 1 to 4 belong to user 2."""
        return make_log(
            {"user": [1, 2, 2, 2, 2], "item": [9, 1, 2, 3, 4], "timestamp": [1, 1, 2, 3, 4]}
        )

    def test_a_seed_gives_the_same_items_again_and_another_seed_others(self, log):
        sampler = NegativeSampler(log, log.items)
        users, times = [0, 1] * 20, [5] * 40
        first = draw(sampler, users, times, 3, seed=7)
        np.testing.assert_array_equal(first, draw(sampler, users, times, 3, seed=7))
        assert (first != draw(sampler, users, times, 3, seed=8)).any()

    @pytest.mark.parametrize(
        ("weights", "shares"),
        [
            pytest.param(None, [0.25, 0.25, 0.25, 0.25], id="uniform"),
            pytest.param([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4], id="popularity"),
            pytest.param([0, 1, 4, 4], [0.1, 0.1, 0.4, 0.4], id="never chosen counts as once"),
        ],
    )
    def test_shares_follow_the_weights(self, log, weights, shares):
        counts = None if weights is None else np.array(weights)
        sampler = NegativeSampler(log, np.array([1, 2, 3, 4]), counts)
        drawn = draw(sampler, [0], [9], 20_000)
        found = [(drawn == item).mean() for item in (1, 2, 3, 4)]
        np.testing.assert_allclose(found, shares, atol=0.015)

    def test_shares_among_what_is_left_follow_the_weights(self, log):
        """User 2 chose items 1 and 2 until second 2; 3 and 4 are left at 3 to 1."""
        sampler = NegativeSampler(log, np.array([1, 2, 3, 4]), np.array([5, 5, 30, 10]))
        drawn = draw(sampler, [1], [2], 20_000)
        found = [(drawn == item).mean() for item in (1, 2, 3, 4)]
        np.testing.assert_allclose(found, [0, 0, 0.75, 0.25], atol=0.015)
