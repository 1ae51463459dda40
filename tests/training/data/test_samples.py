"""No leak: what a sample's history holds, against a loop over the rows of the log."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.samples import Moments, behavior_moments, impression_moments
from training.data.splits import Part, Split

# (user, item, time, label): few users, items and seconds, so that ties of all kinds are common.
ROWS = st.lists(
    st.tuples(
        st.integers(1, 3), st.integers(1, 6), st.integers(0, 7), st.sampled_from([None, 0, 1])
    ),
    min_size=1,
    max_size=30,
)


def columns(rows):
    return dict(zip(("user", "item", "timestamp", "label"), zip(*rows, strict=True), strict=True))


def all_in(log, part):
    return Split(
        behaviors=np.full(len(log.behaviors), part, dtype=np.int8),
        impressions=np.full(len(log.impressions), part, dtype=np.int8),
    )


def as_lists(log, moments: Moments):
    """Return (user, time, history, candidates) of every moment."""
    return [
        (
            int(log.user_id(moments.users[m])),
            int(moments.times[m]),
            log.behaviors[moments.starts[m] : moments.ends[m]].tolist(),
            [
                (int(moments.candidate_items[n]), int(moments.labels[n]))
                for n in range(moments.candidate_offsets[m], moments.candidate_offsets[m + 1])
            ],
        )
        for m in range(len(moments))
    ]


def naive_history(rows, user, time):
    """Return the behaviors of one user before a moment, one row of the log after the other."""
    past = [(i, t) for u, i, t, label in rows if u == user and t < time and label != 0]
    return sorted(past, key=lambda behavior: behavior[1])  # stable: ties stay in log order


@settings(deadline=None, max_examples=30)
@given(rows=ROWS, max_candidates=st.integers(1, 3))
def test_histories_are_exactly_what_the_user_did_strictly_before(make_log, rows, max_candidates):
    log = make_log(columns(rows))
    split = all_in(log, Part.VALID)
    behaviors = [row for row in rows if row[3] != 0]
    in_order = sorted(behaviors, key=lambda row: (row[0], row[2]))
    assert as_lists(log, behavior_moments(log, split, Part.VALID)) == [
        (user, time, naive_history(rows, user, time), [(item, 1)])
        for user, item, time, _ in in_order
    ]

    shown = sorted((row for row in rows if row[3] is not None), key=lambda row: (row[0], row[2]))
    expected = []
    for (user, time), group in groupby(shown, key=lambda row: (row[0], row[2])):
        candidates = [(item, label) for _, item, _, label in group]
        expected += [
            (user, time, naive_history(rows, user, time), candidates[n : n + max_candidates])
            for n in range(0, len(candidates), max_candidates)
        ]
    moments = impression_moments(log, split, Part.VALID, max_candidates=max_candidates)
    assert as_lists(log, moments) == expected

    # Said once more as the promise itself: nothing of the moment's second or later, nobody else's.
    for one in (moments, behavior_moments(log, split, Part.VALID)):
        for user, time, history, _ in as_lists(log, one):
            assert all(t < time for _, t in history)
            assert all((user, *behavior) in {row[:3] for row in rows} for behavior in history)


@settings(deadline=None, max_examples=20)
@given(rows=ROWS, seed=st.integers(0, 1000))
def test_each_part_has_the_moments_of_its_rows_and_the_whole_past(make_log, rows, seed):
    """A validation moment's history reaches back over rows of every part."""
    log = make_log(columns(rows))
    rng = np.random.default_rng(seed)
    split = Split(
        behaviors=rng.integers(3, size=len(log.behaviors)).astype(np.int8),
        impressions=rng.integers(3, size=len(log.impressions)).astype(np.int8),
    )
    for part in Part:
        moments = as_lists(log, behavior_moments(log, split, part))
        chosen = split.behaviors == part
        assert [(c, t) for _, t, _, [(c, _)] in moments] == log.behaviors[chosen].tolist()
        shown = as_lists(log, impression_moments(log, split, part, max_candidates=9))
        assert [
            (item, time, label) for _, time, _, candidates in shown for item, label in candidates
        ] == log.impressions[split.impressions == part].tolist()
        for user, time, history, _ in moments + shown:
            assert history == naive_history(rows, user, time)


class TestByHand:
    ROWS = (
        (1, 10, 5, None),
        (1, 11, 8, 1),
        (1, 12, 8, 0),
        (1, 13, 9, 1),
        (2, 14, 7, 1),
    )

    def test_what_was_chosen_in_a_moment_is_history_of_the_next_only(self, make_log):
        log = make_log(columns(self.ROWS))
        moments = impression_moments(log, all_in(log, Part.TEST), Part.TEST, max_candidates=8)
        assert as_lists(log, moments) == [
            (1, 8, [(10, 5)], [(11, 1), (12, 0)]),
            (1, 9, [(10, 5), (11, 8)], [(13, 1)]),
            (2, 7, [], [(14, 1)]),
        ]
        assert len(moments) == 3

    @pytest.mark.parametrize(
        ("max_candidates", "sizes"),
        [
            pytest.param(1, [1, 1, 1, 1, 1], id="one each"),
            pytest.param(2, [2, 2, 1], id="a rest of one"),
            pytest.param(5, [5], id="just enough"),
        ],
    )
    def test_max_candidates_cuts_a_moment_into_several(self, make_log, max_candidates, sizes):
        rows = [(1, 3, 1, None), *((1, item, 6, item % 2) for item in range(20, 25))]
        log = make_log(columns(rows))
        moments = impression_moments(
            log, all_in(log, Part.TRAIN), Part.TRAIN, max_candidates=max_candidates
        )
        assert np.diff(moments.candidate_offsets).tolist() == sizes
        assert moments.candidate_items.tolist() == [20, 21, 22, 23, 24]
        assert moments.labels.tolist() == [0, 1, 0, 1, 0]
        assert all(history == [(3, 1)] for _, _, history, _ in as_lists(log, moments))

    def test_users_seconds_and_parts_are_never_joined(self, make_log):
        """Two users in one second are two moments, however close their rows stand in the log."""
        log = make_log(columns([(1, 3, 6, 1), (2, 4, 6, 1)]))
        moments = impression_moments(log, all_in(log, Part.TRAIN), Part.TRAIN, max_candidates=8)
        assert moments.users.tolist() == [0, 1]

    def test_an_empty_part_has_no_moments(self, make_log):
        log = make_log(columns(self.ROWS))
        split = all_in(log, Part.TRAIN)
        assert len(impression_moments(log, split, Part.TEST, max_candidates=8)) == 0
        assert len(behavior_moments(log, split, Part.TEST)) == 0

    def test_true_probabilities_stay_beside_their_candidates(self, make_log):
        log = make_log(
            {
                **columns([(2, 3, 6, 1), (1, 4, 6, 0), (1, 5, 2, None)]),
                "click_probability": [0.5, 0.25, None],
            }
        )
        moments = impression_moments(log, all_in(log, Part.TRAIN), Part.TRAIN, max_candidates=8)
        assert moments.candidate_items.tolist() == [4, 3]
        assert moments.probabilities is not None
        assert moments.probabilities.tolist() == [0.25, 0.5]
