"""Gathered histories against one slice at a time."""

from collections.abc import Callable

import numpy as np
import pytest

from contract.buckets import time_buckets
from contract.catalogue import PADDING_ROW, UNKNOWN_ROW, Catalogue
from contract.features import AGE_SECONDS, HOURS, FeatureSpec
from training.data.histories import HistoryGatherer
from training.data.log import PreparedLog

SPEC = FeatureSpec(history_length=6, granularities=(HOURS, AGE_SECONDS))
N_BEHAVIORS = 40


@pytest.fixture(scope="module")
def log(make_log: Callable[..., PreparedLog]) -> PreparedLog:
    """Three users; every item is chosen once, its id tells its place."""
    return make_log(
        {
            "user": [1] * 20 + [2] * 15 + [3] * 5,
            "item": list(range(1, N_BEHAVIORS + 1)),
            "timestamp": [9_000 * n for n in range(N_BEHAVIORS)],
        }
    )


@pytest.fixture(scope="module")
def catalogue(log) -> Catalogue:
    """Every third item is unknown."""
    return Catalogue(log.items[log.items % 3 > 0])


def gather(log, catalogue, slices, *, times=None, unknown_rate=0.0, seed=0):
    starts, ends = (np.array(bounds, dtype=np.int64) for bounds in zip(*slices, strict=True))
    one = HistoryGatherer(log, catalogue, SPEC, unknown_rate=unknown_rate)
    times_B = np.full(len(slices), 10**6) if times is None else np.array(times)
    return one.gather(starts, ends, times_B, np.uint64(seed))


def test_slices_are_gathered_right_aligned_and_cut_to_the_newest(log, catalogue):
    slices = [(0, 3), (5, 20), (20, 24), (35, 35)]
    items, buckets = gather(log, catalogue, slices)
    assert items.shape == (4, 6)
    assert buckets.shape == (4, 6, 2)
    row_of = {item: 2 + n for n, item in enumerate(catalogue.item_ids.tolist())}
    for b, (start, end) in enumerate(slices):
        places = list(range(start, end))[-6:]
        padding = [PADDING_ROW] * (6 - len(places))
        # Item n + 1 stands at place n.
        assert items[b].tolist() == padding + [row_of.get(n + 1, UNKNOWN_ROW) for n in places]
        elapsed = np.array([10**6 - 9_000 * n for n in places], dtype=np.int64)
        hours = time_buckets(elapsed, HOURS.unit_s, HOURS.n_buckets).tolist()
        assert buckets[b, :, 0].tolist() == padding + hours
        assert buckets[b, :, 1].tolist() == padding + elapsed.tolist()


def test_times_are_measured_back_from_each_rows_own(log, catalogue):
    """A behavior after it counts as just done."""
    _, buckets = gather(log, catalogue, [(0, 3), (0, 3)], times=[18_000, 9_100])
    assert buckets[:, :, 1].tolist() == [[18_000, 9_000, 0], [9_100, 100, 0]]


@pytest.mark.parametrize(
    ("slices", "width"),
    [
        pytest.param([(0, 2), (5, 9)], 4, id="the longest"),
        pytest.param([(0, 20)], 6, id="the history length"),
        pytest.param([(3, 3), (0, 0)], 1, id="one at least"),
    ],
)
def test_rows_are_as_wide_as_they_must_be(log, catalogue, slices, width):
    items, buckets = gather(log, catalogue, slices)
    assert items.shape == (len(slices), width)
    assert buckets.shape == (len(slices), width, 2)


def test_a_log_without_behaviors_gives_padding(make_log):
    log = make_log({"user": [1], "item": [5], "timestamp": [9], "label": [0]})
    items, buckets = gather(log, Catalogue(log.items), [(0, 0), (0, 0)])
    assert items.tolist() == [[0], [0]]
    assert buckets.tolist() == [[[0, 0]], [[0, 0]]]


class TestUnknownItems:
    SLICES = ((0, 20), (20, 22), (22, 35), (35, 35))

    def test_about_the_share_is_hidden_and_padding_never(self, log, catalogue):
        plain, plain_buckets = gather(log, catalogue, self.SLICES)
        n_hidden = 0
        for seed in range(400):
            items, buckets = gather(log, catalogue, self.SLICES, unknown_rate=0.3, seed=seed)
            changed = items != plain
            assert (items[changed] == UNKNOWN_ROW).all()
            assert (plain[changed] > UNKNOWN_ROW).all()
            np.testing.assert_array_equal(buckets, plain_buckets)
            n_hidden += int(changed.sum())
        n_known = int((plain > UNKNOWN_ROW).sum()) * 400
        assert n_hidden / n_known == pytest.approx(0.3, abs=0.02)

    def test_a_behavior_is_hidden_or_not_whatever_it_is_gathered_with(self, log, catalogue):
        """The processes that share a batch agree on it."""
        whole, _ = gather(log, catalogue, self.SLICES, unknown_rate=0.3, seed=5)
        for b, (start, end) in enumerate(self.SLICES):
            alone, _ = gather(log, catalogue, [(start, end)], unknown_rate=0.3, seed=5)
            np.testing.assert_array_equal(alone[0], whole[b, -alone.shape[1] :])

    def test_another_seed_hides_others(self, log, catalogue):
        one, _ = gather(log, catalogue, self.SLICES, unknown_rate=0.3, seed=5)
        other, _ = gather(log, catalogue, self.SLICES, unknown_rate=0.3, seed=6)
        assert (one != other).any()
