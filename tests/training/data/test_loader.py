"""Batches against one row at a time: gathered right, each sample once, alike in all processes."""

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from contract.buckets import time_buckets
from contract.catalogue import UNKNOWN_ROW, Catalogue
from contract.features import DAYS, HOURS, FeatureSpec, Granularity
from training.data.loader import ClickBatch, ClickLoader
from training.data.log import PreparedLog
from training.data.negatives import NegativeSampler
from training.data.samples import Moments, behavior_moments, impression_moments
from training.data.splits import Part, Split

SPEC = FeatureSpec(
    history_length=12,
    granularities=(HOURS, DAYS, Granularity(name="seconds", unit_s=1, n_buckets=9)),
)
N_SHOWN = 90


Row = tuple[int, int, int, int | None, float | None]


def make_rows() -> list[Row]:
    """Return (user, item, time, label, probability) of nine users; the last has no history.

    First 60 behaviors without a label, fewer for later users, then 90 impressions in short visits.
    Each impression has a probability of its own, so that a batch tells which stands where.
    """
    rng = random.Random(5)
    rows: list[Row] = [
        (
            min(rng.randint(1, 8), rng.randint(1, 8)),
            rng.randint(1, 20),
            7_000 * rng.randint(0, 30),
            None,
            None,
        )
        for _ in range(60)
    ]
    for n in rng.sample(range(N_SHOWN), N_SHOWN):
        user = rng.randint(1, 9)
        label = rng.randint(0, 1) if user < 9 else 0
        rows.append((user, rng.randint(1, 30), 250_000 + rng.randint(0, 9), label, (n + 1) / 128))
    return rows


ROWS = make_rows()
SHOWN = {
    probability: (user, item, time, label)
    for user, item, time, label, probability in ROWS
    if label is not None and probability is not None
}


def naive_history(user: int, time: int) -> list[tuple[int, int]]:
    past = [(i, t) for u, i, t, label, _ in ROWS if u == user and t < time and label != 0]
    return sorted(past, key=lambda behavior: behavior[1])[-SPEC.history_length :]


@pytest.fixture(scope="module")
def log(make_log: Callable[..., PreparedLog]) -> PreparedLog:
    names = ("user", "item", "timestamp", "label", "click_probability")
    return make_log(dict(zip(names, zip(*ROWS, strict=True), strict=True)))


@pytest.fixture(scope="module")
def train(log) -> Split:
    return Split(
        behaviors=np.full(len(log.behaviors), Part.TRAIN, dtype=np.int8),
        impressions=np.full(len(log.impressions), Part.TRAIN, dtype=np.int8),
    )


@pytest.fixture(scope="module")
def moments(log, train) -> Moments:
    return impression_moments(log, train, Part.TRAIN, max_candidates=3)


@pytest.fixture(scope="module")
def catalogue(log) -> Catalogue:
    """Two thirds of the items are known."""
    return Catalogue(log.items[log.items % 3 > 0])


@pytest.fixture
def make_loader(log, moments, catalogue):
    def make(**options) -> ClickLoader:
        return ClickLoader(log, moments, catalogue, SPEC, **{"batch_size": 4, "seed": 3, **options})

    return make


@pytest.fixture
def make_negatives_loader(log, train, catalogue):
    def make(**options) -> ClickLoader:
        return ClickLoader(
            log,
            behavior_moments(log, train, Part.TRAIN),
            catalogue,
            SPEC,
            **{
                "batch_size": 4,
                "seed": 3,
                "negatives": NegativeSampler(log, catalogue.item_ids),
                "n_negatives": 2,
                **options,
            },
        )

    return make


def arrays(batch: ClickBatch):
    return [*batch.inputs.as_feed().values(), batch.labels, batch.mask, batch.users]


def assert_equal(one: list[ClickBatch], other: list[ClickBatch]):
    for a, b in zip(one, other, strict=True):
        for found, expected in zip(arrays(a), arrays(b), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert a.n_samples == b.n_samples


def shown_in(batch: ClickBatch) -> list[list[float]]:
    """Return the impressions in each row of a batch, by their probability."""
    assert batch.probabilities is not None
    return [row[real].tolist() for row, real in zip(batch.probabilities, batch.mask, strict=True)]


@pytest.mark.parametrize("shuffle", [True, False])
class TestGather:
    def test_a_batch_is_what_one_row_at_a_time_gives(self, make_loader, log, catalogue, shuffle):
        """Right-aligned, cut to the history length, as wide as the longest of the batch."""
        row_of = {item: 2 + n for n, item in enumerate(catalogue.item_ids.tolist())}
        widths, lengths = set(), set()
        for batch in make_loader().epoch(0, shuffle=shuffle):
            shown = [[SHOWN[probability] for probability in row] for row in shown_in(batch)]
            histories = [naive_history(row[0][0], row[0][2]) for row in shown]
            width = max(1, *map(len, histories))
            n_candidates = max(map(len, shown))
            widths.add(width)
            lengths |= {len(history) for history in histories}

            rows, buckets, candidates, labels = [], [], [], []
            for seen, history in zip(shown, histories, strict=True):
                n_padding = width - len(history)
                elapsed = np.array([seen[0][2] - t for _, t in history], dtype=np.int64)
                rows.append([0] * n_padding + [row_of.get(item, 1) for item, _ in history])
                one = [time_buckets(elapsed, g.unit_s, g.n_buckets) for g in SPEC.granularities]
                buckets.append([[0] * 3] * n_padding + np.transpose(one).tolist())
                rest = [0] * (n_candidates - len(seen))
                candidates.append([row_of.get(item, 1) for _, item, _, _ in seen] + rest)
                labels.append([label for *_, label in seen] + rest)
            assert batch.inputs.history_items.tolist() == rows
            assert batch.inputs.history_buckets.tolist() == buckets
            assert batch.inputs.candidate_items.tolist() == candidates
            assert batch.labels.tolist() == labels
            assert [log.user_id(u) for u in batch.users] == [str(seen[0][0]) for seen in shown]
            assert batch.n_samples == sum(map(len, shown))
        # Some batches are narrower than the history length, some rows were cut to it.
        assert max(widths) == SPEC.history_length
        assert len(widths) > 2
        assert len(lengths) > 4

    def test_every_sample_is_in_an_epoch_once(self, make_loader, shuffle):
        one = make_loader()
        batches = list(one.epoch(0, shuffle=shuffle))
        assert sorted(p for b in batches for row in shown_in(b) for p in row) == sorted(SHOWN)
        assert one.n_samples == sum(batch.n_samples for batch in batches) == N_SHOWN
        assert one.n_batches == len(batches)
        sizes = sorted(len(batch.users) for batch in batches)
        assert set(sizes[1:]) == {4}
        assert 1 <= sizes[0] <= 4

    def test_an_epoch_can_start_at_any_batch(self, make_loader, shuffle):
        options = {"unknown_rate": 0.2}
        whole = list(make_loader(**options).epoch(1, shuffle=shuffle))
        for first in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
            rest = list(make_loader(**options).epoch(1, shuffle=shuffle, first_batch=first))
            assert_equal(rest, whole[first:])

    @pytest.mark.parametrize(
        ("batch_size", "world_size"),
        [
            pytest.param(7, 2, id="two"),
            pytest.param(7, 3, id="three"),
            pytest.param(2, 3, id="more than rows"),
        ],
    )
    def test_the_processes_of_a_run_share_each_batch(
        self, make_loader, shuffle, batch_size, world_size
    ):
        """Together they hold the rows of the one batch, each narrowed to its own longest."""
        options = {"unknown_rate": 0.2, "batch_size": batch_size}
        whole = list(make_loader(**options).epoch(1, shuffle=shuffle))
        for rank in range(world_size):
            shares = make_loader(**options).epoch(
                1, shuffle=shuffle, rank=rank, world_size=world_size
            )
            for share, batch in zip(shares, whole, strict=True):
                assert_share(share, batch, slice(rank, None, world_size))


def assert_share(share: ClickBatch, batch: ClickBatch, rows: slice):
    """Check that a process's share of a batch is these rows of it.

    Where none are left for it, it takes part in the step with one row that holds no sample.
    """
    assert share.n_samples == batch.n_samples
    if not len(batch.users[rows]):
        assert len(share.users) == 1
        assert not share.mask.any()
        assert not share.inputs.candidate_items.any()
        return
    np.testing.assert_array_equal(share.users, batch.users[rows])
    np.testing.assert_array_equal(share.labels, batch.labels[rows])
    np.testing.assert_array_equal(share.mask, batch.mask[rows])
    np.testing.assert_array_equal(share.inputs.candidate_items, batch.inputs.candidate_items[rows])
    if batch.probabilities is not None:
        np.testing.assert_array_equal(share.probabilities, batch.probabilities[rows])
    history, buckets = share.inputs.history_items, share.inputs.history_buckets
    cut = batch.inputs.history_items.shape[1] - history.shape[1]
    assert cut >= 0
    np.testing.assert_array_equal(history, batch.inputs.history_items[rows, cut:])
    np.testing.assert_array_equal(buckets, batch.inputs.history_buckets[rows, cut:])
    assert not batch.inputs.history_items[rows, :cut].any()
    assert not batch.inputs.history_buckets[rows, :cut].any()


class TestOrder:
    def ids(self, batches):
        return [sorted(shown_in(batch)) for batch in batches]

    def test_depends_on_epoch_and_seed_alone(self, make_loader):
        def order(seed, epoch):
            return self.ids(make_loader(seed=seed).epoch(epoch, shuffle=True))

        assert order(3, 0) == order(3, 0)
        assert order(3, 0) != order(3, 1)
        assert order(3, 0) != order(4, 0)

    def test_is_that_of_length_without_shuffling(self, make_loader):
        """So that batches are narrow; epoch and seed then change nothing."""
        lengths = [
            (batch.inputs.history_items != 0).sum(axis=1).max()
            for batch in make_loader().epoch(0, shuffle=False)
        ]
        assert all(one <= other for one, other in pairwise(lengths))
        assert self.ids(make_loader().epoch(0, shuffle=False)) == self.ids(
            make_loader(seed=9).epoch(5, shuffle=False)
        )


class TestNegatives:
    def test_stand_behind_the_positive_with_label_0(self, make_negatives_loader, log, catalogue):
        known = set(catalogue.rows(log.items).tolist())
        one = make_negatives_loader()
        n_rows = 0
        for batch in one.epoch(0, shuffle=True):
            np.testing.assert_array_equal(
                batch.labels, np.tile([1, 0, 0], (len(batch.users), 1)).astype(np.float32)
            )
            assert batch.probabilities is None
            assert set(batch.inputs.candidate_items.ravel().tolist()) <= known
            assert (batch.inputs.candidate_items[:, 1:] != UNKNOWN_ROW).all()
            assert batch.n_samples == 3 * len(batch.users)
            n_rows += len(batch.users)
        assert n_rows == len(log.behaviors)
        assert one.n_samples == 3 * n_rows

    def test_are_drawn_anew_in_each_epoch_and_the_same_again_from_a_seed(
        self, make_negatives_loader
    ):
        def drawn(seed, epoch):
            batches = make_negatives_loader(seed=seed).epoch(epoch, shuffle=False)
            return np.concatenate([batch.inputs.candidate_items for batch in batches])

        np.testing.assert_array_equal(drawn(3, 0), drawn(3, 0))
        assert (drawn(3, 0) != drawn(3, 1)).any()
        assert (drawn(3, 0) != drawn(4, 0)).any()

    def test_are_the_same_after_a_resume_and_in_every_process(self, make_negatives_loader):
        options = {"unknown_rate": 0.2, "batch_size": 7}
        whole = list(make_negatives_loader(**options).epoch(1, shuffle=True))
        rest = make_negatives_loader(**options).epoch(1, shuffle=True, first_batch=4)
        assert_equal(list(rest), whole[4:])
        for rank in range(2):
            shares = make_negatives_loader(**options).epoch(
                1, shuffle=True, rank=rank, world_size=2
            )
            for share, batch in zip(shares, whole, strict=True):
                assert_share(share, batch, slice(rank, None, 2))

    def test_what_could_not_be_drawn_is_no_sample(self, make_log):
        """User 1 has met both items at second 2; user 2 has one left."""
        log = make_log({"user": [1, 1, 2], "item": [10, 20, 10], "timestamp": [1, 2, 5]})
        split = Split(behaviors=np.zeros(3, dtype=np.int8), impressions=np.empty(0, np.int8))
        catalogue = Catalogue(log.items)
        loader = ClickLoader(
            log,
            behavior_moments(log, split, Part.TRAIN),
            catalogue,
            SPEC,
            batch_size=8,
            seed=1,
            negatives=NegativeSampler(log, log.items),
            n_negatives=2,
        )
        (batch,) = loader.epoch(0, shuffle=False)
        by_user_and_item = {
            (int(user), int(row[0])): (row[1:].tolist(), mask.tolist())
            for user, row, mask in zip(
                batch.users, batch.inputs.candidate_items, batch.mask, strict=True
            )
        }
        assert by_user_and_item == {
            (0, 2): ([3, 3], [True, True, True]),
            (0, 3): ([0, 0], [True, False, False]),
            (1, 2): ([3, 3], [True, True, True]),
        }
        assert batch.n_samples == 7


class TestUnknownItems:
    def test_about_the_share_is_shown_as_unknown_and_padding_never(self, make_loader):
        n_cells = n_hidden = 0
        for epoch in range(40):
            shown = make_loader().epoch(epoch, shuffle=True)
            hidden = make_loader(unknown_rate=0.25).epoch(epoch, shuffle=True)
            for plain, batch in zip(shown, hidden, strict=True):
                for name in ("history_items", "candidate_items"):
                    before, after = getattr(plain.inputs, name), getattr(batch.inputs, name)
                    changed = before != after
                    assert (after[changed] == UNKNOWN_ROW).all()
                    assert (before[changed] > UNKNOWN_ROW).all()
                    n_cells += int((before > UNKNOWN_ROW).sum())
                    n_hidden += int(changed.sum())
                np.testing.assert_array_equal(
                    plain.inputs.history_buckets, batch.inputs.history_buckets
                )
                np.testing.assert_array_equal(plain.labels, batch.labels)
                np.testing.assert_array_equal(plain.mask, batch.mask)
        assert n_cells > 5_000
        assert n_hidden / n_cells == pytest.approx(0.25, abs=0.02)

    @pytest.mark.parametrize("name", ["history_items", "candidate_items"])
    def test_others_are_hidden_in_another_epoch(self, make_loader, name):
        def hidden(epoch):
            batches = make_loader(unknown_rate=0.25).epoch(epoch, shuffle=False)
            return [getattr(batch.inputs, name) for batch in batches]

        assert any((a != b).any() for a, b in zip(hidden(0), hidden(1), strict=True))


class TestEdges:
    def test_a_user_without_history_has_padding_alone(self, make_log):
        log = make_log({"user": [1], "item": [5], "timestamp": [9], "label": [0]})
        split = Split(behaviors=np.empty(0, np.int8), impressions=np.zeros(1, dtype=np.int8))
        moments = impression_moments(log, split, Part.TRAIN, max_candidates=3)
        loader = ClickLoader(
            log, moments, Catalogue(log.items), SPEC, batch_size=2, seed=1, unknown_rate=0.5
        )
        (batch,) = loader.epoch(0, shuffle=True)
        assert batch.inputs.history_items.tolist() == [[0]]
        assert batch.inputs.history_buckets.tolist() == [[[0, 0, 0]]]
        assert batch.mask.tolist() == [[True]]

    @pytest.mark.parametrize(
        "shuffle",
        [
            pytest.param(True, id="shuffled"),
            pytest.param(False, id="in order of length"),
        ],
    )
    def test_a_part_without_moments_has_no_batches(self, log, train, catalogue, shuffle):
        """Such as the test part of leave-one-out where nobody has three behaviors."""
        nothing = behavior_moments(log, train, Part.TEST)
        one = ClickLoader(log, nothing, catalogue, SPEC, batch_size=4, seed=1)
        assert one.n_batches == 0
        assert list(one.epoch(0, shuffle=shuffle)) == []
