"""Rows of next-item models: what is read, what follows, and that nothing held out is ever seen.

Every behavior of the log chooses an item of its own, so that a batch tells which stands where.
"""

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from contract.catalogue import PADDING_ROW, UNKNOWN_ROW, Catalogue
from contract.features import AGE_SECONDS, HOURS, FeatureSpec
from training.data.log import PreparedLog
from training.data.sequences import (
    NO_TARGET,
    HeldOutLoader,
    SequenceBatch,
    SequenceLoader,
    held_out_rows,
    prefix_rows,
    training_rows,
)
from training.data.splits import Part, Split, leave_one_out

LENGTH = 4
SPEC = FeatureSpec(history_length=LENGTH, granularities=(HOURS, AGE_SECONDS))
# Behaviors of users 1 .. 9: users 1 and 2 hold out nothing, user 3 has one training behavior.
N_BEHAVIORS = (1, 2, 3, 4, 7, 7, 11, 18, 6)

Row = tuple[int, list[int], list[int]]
"""A user, the items that are read and the item after each, 0 for none."""


def item_of(user: int, place: int) -> int:
    """Ids fall with the places: neither id nor time gives the order of behaviors of one second."""
    return 1000 * user - place


def time_of(user: int, place: int) -> int:
    """Three behaviors a moment."""
    return 10_000 * user + 3_600 * (place // 3)


def sequence(user: int) -> list[int]:
    return [item_of(user, place) for place in range(N_BEHAVIORS[user - 1])]


def n_train(user: int) -> int:
    n = N_BEHAVIORS[user - 1]
    return n - 2 if n >= 3 else n


USERS = range(1, len(N_BEHAVIORS) + 1)
PLACES = {item_of(u, place): (u, place) for u in USERS for place in range(N_BEHAVIORS[u - 1])}


@pytest.fixture(scope="module")
def log(make_log: Callable[..., PreparedLog]) -> PreparedLog:
    """Users take turns in the file."""
    rows = sorted(((place, user) for user, place in PLACES.values()), key=lambda row: row[0])
    return make_log(
        {
            "user": [user for _, user in rows],
            "item": [item_of(user, place) for place, user in rows],
            "timestamp": [time_of(user, place) for place, user in rows],
        }
    )


@pytest.fixture(scope="module")
def split(log) -> Split:
    return leave_one_out(log)


@pytest.fixture(scope="module")
def catalogue(log) -> Catalogue:
    """Every item is known, the held out ones as well: nothing but the loader keeps them away."""
    return Catalogue(log.items)


@pytest.fixture
def make_loader(log, split, catalogue):
    def make(**options) -> SequenceLoader:
        defaults = {"batch_size": 3, "seed": 3, "per_user": None}
        return SequenceLoader(log, split, catalogue, SPEC, **{**defaults, **options})

    return make


def rows_in(batch: SequenceBatch, catalogue: Catalogue) -> list[Row]:
    """Return the rows of a batch by item ids, without padding, where nothing may be a target."""
    ids = np.concatenate([[0, -1], catalogue.item_ids])
    rows = []
    for user, items, targets in zip(
        batch.users.tolist(), batch.history_items, batch.targets, strict=True
    ):
        real = items != PADDING_ROW
        assert real[-1]
        assert (np.diff(real.astype(int)) >= 0).all()
        assert (targets[~real] == NO_TARGET).all()
        rows.append((user, ids[items[real]].tolist(), ids[targets[real]].tolist()))
    return rows


def rows_of_epoch(loader: SequenceLoader, catalogue: Catalogue, epoch: int = 0) -> list[Row]:
    return sorted(row for batch in loader.epoch(epoch) for row in rows_in(batch, catalogue))


def targets_of(rows: list[Row]) -> list[int]:
    return [target for _, _, targets in rows for target in targets if target]


def learnable(user: int) -> list[int]:
    """Return what is a target once: every training behavior but the first."""
    return sequence(user)[1 : n_train(user)]


def assert_equal(one: list[SequenceBatch], other: list[SequenceBatch]) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("history_items", "history_buckets", "targets", "users"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert a.n_samples == b.n_samples


class TestWholeRows:
    def test_hold_the_newest_behaviors_with_the_item_right_after_each(self, make_loader, catalogue):
        """By place: three behaviors of each moment have one time."""
        expected = []
        for user in USERS:
            trained = sequence(user)[: n_train(user)]
            if len(trained) > 1:
                expected.append((user, trained[:-1][-LENGTH:], trained[1:][-LENGTH:]))
        assert rows_of_epoch(make_loader(), catalogue) == sorted(expected)

    def test_users_without_two_training_behaviors_have_none(self, log, split):
        """Of the user of two behaviors, both are for training."""
        rows = training_rows(log, split, LENGTH, parts=False)
        # Users count from 0 in a log.
        assert sorted(rows.users.tolist()) == [user - 1 for user in USERS if user not in (1, 3)]

    def test_in_parts_every_behavior_but_the_first_is_a_target_once(self, make_loader, catalogue):
        rows = rows_of_epoch(make_loader(parts=True), catalogue)
        expected = Counter(item for user in USERS for item in learnable(user))
        assert Counter(targets_of(rows)) == expected
        assert set(expected.values()) == {1}

    def test_parts_are_full_but_the_oldest_and_the_newest_is_that_of_newest(
        self, make_loader, catalogue
    ):
        rows = rows_of_epoch(make_loader(parts=True), catalogue)
        newest = rows_of_epoch(make_loader(), catalogue)
        assert all(row in rows for row in newest)
        for user in USERS:
            # Oldest first: the items of one user fall.
            lengths = [len(items) for u, items, _ in reversed(rows) if u == user]
            assert sum(lengths) == max(0, n_train(user) - 1)
            assert all(length == LENGTH for length in lengths[1:])

    @pytest.mark.parametrize("parts", [True, False], ids=["all", "newest"])
    def test_samples_are_the_targets(self, make_loader, parts):
        loader = make_loader(parts=parts)
        batches = list(loader.epoch(0))
        assert loader.n_samples(0) == sum(batch.n_samples for batch in batches)
        for batch in batches:
            assert batch.n_samples == (batch.targets != NO_TARGET).sum()

    def test_each_epoch_holds_the_same_rows_in_another_order(self, make_loader, catalogue):
        loader = make_loader()
        assert rows_of_epoch(loader, catalogue, 0) == rows_of_epoch(loader, catalogue, 1)
        first, second = (
            [rows_in(batch, catalogue) for batch in loader.epoch(epoch)] for epoch in (0, 1)
        )
        assert first != second


class TestPrefixes:
    def test_all_of_them_have_the_item_after_them_as_their_only_target(
        self, make_loader, catalogue
    ):
        expected = []
        for user in USERS:
            trained = sequence(user)[: n_train(user)]
            for end in range(1, len(trained)):
                read = trained[:end][-LENGTH:]
                expected.append((user, read, [0] * (len(read) - 1) + [trained[end]]))
        loader = make_loader(per_user=0)
        assert rows_of_epoch(loader, catalogue) == sorted(expected)
        assert loader.n_samples(0) == len(expected)

    @pytest.mark.parametrize("per_user", [1, 3])
    def test_of_a_user_so_many_are_drawn_or_all_there_are(self, make_loader, catalogue, per_user):
        everything = rows_of_epoch(make_loader(per_user=0), catalogue)
        loader = make_loader(per_user=per_user)
        rows = rows_of_epoch(loader, catalogue)
        assert loader.n_samples(0) == len(rows)
        assert len({str(row) for row in rows}) == len(rows)
        assert all(row in everything for row in rows)
        drawn = Counter(user for user, _, _ in rows)
        for user in USERS:
            assert drawn[user] == min(per_user, max(0, n_train(user) - 1))

    def test_depend_on_seed_and_epoch_alone(self, make_loader, catalogue):
        def drawn(seed: int, epoch: int) -> list[Row]:
            return rows_of_epoch(make_loader(per_user=1, seed=seed), catalogue, epoch)

        assert drawn(3, 0) == drawn(3, 0)
        assert drawn(3, 0) != drawn(3, 1)
        assert drawn(3, 0) != drawn(4, 0)

    def test_over_epochs_every_one_comes_about_equally_often(self, log, split):
        """User 8 has 15 prefixes."""
        ends: Counter[int] = Counter()
        for epoch in range(1_500):
            rng = np.random.default_rng(epoch)
            rows = prefix_rows(log, split, LENGTH, per_user=1, rng=rng)
            ends[int(rows.ends[rows.users == 7][0])] += 1
        assert len(ends) == 15
        assert min(ends.values()) > 60
        assert max(ends.values()) < 150


LOADERS = [
    pytest.param({}, id="newest"),
    pytest.param({"parts": True}, id="all"),
    pytest.param({"per_user": 0}, id="prefixes"),
    pytest.param({"per_user": 2}, id="some prefixes"),
    pytest.param({"parts": True, "same_length": True}, id="of one length"),
]


@pytest.mark.parametrize("options", LOADERS)
class TestEveryBatch:
    def test_holds_nothing_that_is_held_out(self, make_loader, catalogue, options):
        held_out = {item for user in USERS for item in sequence(user)[n_train(user) :]}
        assert len(held_out) == 2 * 7
        for epoch in range(3):
            for _, items, targets in rows_of_epoch(make_loader(**options), catalogue, epoch):
                assert not held_out & {*items, *targets}

    def test_tells_ages_at_the_time_of_the_rows_last_target(self, make_loader, catalogue, options):
        for batch in make_loader(**options).epoch(0):
            for b, (_, items, targets) in enumerate(rows_in(batch, catalogue)):
                now = time_of(*PLACES[targets[-1]])
                ages = [now - time_of(*PLACES[item]) for item in items]
                n_padding = batch.history_items.shape[1] - len(items)
                padding = [0] * n_padding
                hours = [(age // 3_600).bit_length() for age in ages]
                assert batch.history_buckets[b, :, 1].tolist() == padding + ages
                assert batch.history_buckets[b, :, 0].tolist() == padding + hours

    def test_is_narrow_and_of_its_size(self, make_loader, options):
        for batch in make_loader(**options).epoch(0):
            n_rows, width = batch.history_items.shape
            assert 1 <= n_rows <= 3
            assert (batch.history_items != PADDING_ROW).sum(axis=1).max() == width <= LENGTH
            assert batch.targets.shape == (n_rows, width)
            assert batch.history_buckets.shape == (n_rows, width, 2)

    def test_counts_as_much_as_it_has_targets(self, make_loader, options):
        batches = list(make_loader(**options).epoch(0))
        targets = [(batch.targets != NO_TARGET).sum() for batch in batches]
        weights = [batch.weight for batch in batches]
        np.testing.assert_allclose(weights, np.array(targets) / np.mean(targets))

    def test_comes_again_after_a_resume(self, make_loader, options):
        options = {"unknown_rate": 0.3, **options}
        whole = list(make_loader(**options).epoch(1))
        for first in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
            assert_equal(list(make_loader(**options).epoch(1, first_batch=first)), whole[first:])

    @pytest.mark.parametrize(
        ("batch_size", "world_size"),
        [
            pytest.param(4, 2, id="two"),
            pytest.param(5, 3, id="three"),
            pytest.param(2, 4, id="more than rows"),
        ],
    )
    def test_is_shared_by_the_processes_of_a_run(
        self, make_loader, options, batch_size, world_size
    ):
        options = {"unknown_rate": 0.3, "batch_size": batch_size, **options}
        whole = list(make_loader(**options).epoch(1))
        for rank in range(world_size):
            shares = make_loader(**options).epoch(1, rank=rank, world_size=world_size)
            for share, batch in zip(shares, whole, strict=True):
                assert_share(share, batch, slice(rank, None, world_size))


def assert_share(share: SequenceBatch, batch: SequenceBatch, rows: slice) -> None:
    """Check that a process's share of a batch is these rows of it, narrowed to their longest.

    Where none are left for it, it takes part in the step with one row that has no target.
    """
    assert (share.n_samples, share.weight) == (batch.n_samples, batch.weight)
    if not len(batch.users[rows]):
        assert len(share.users) == 1
        assert not share.targets.any()
        return
    np.testing.assert_array_equal(share.users, batch.users[rows])
    cut = batch.history_items.shape[1] - share.history_items.shape[1]
    for name in ("history_items", "history_buckets", "targets"):
        np.testing.assert_array_equal(getattr(share, name), getattr(batch, name)[rows, cut:])
        assert not getattr(batch, name)[rows, :cut].any()


class TestSameLength:
    @pytest.mark.parametrize("per_user", [None, 0], ids=["whole rows", "prefixes"])
    def test_nothing_is_padded(self, make_loader, per_user):
        batches = list(make_loader(same_length=True, per_user=per_user).epoch(0))
        assert all((batch.history_items != PADDING_ROW).all() for batch in batches)
        assert len({batch.history_items.shape[1] for batch in batches}) > 2

    def test_rows_are_the_same_as_with_padding(self, make_loader, catalogue):
        one = rows_of_epoch(make_loader(same_length=True, parts=True), catalogue)
        assert one == rows_of_epoch(make_loader(parts=True), catalogue)


class TestUnknownItems:
    @pytest.mark.parametrize("per_user", [None, 0], ids=["whole rows", "prefixes"])
    def test_are_read_but_are_no_targets(self, log, split, per_user):
        known = Catalogue(log.items[log.items % 3 > 0])
        loader = SequenceLoader(
            log, split, known, SPEC, batch_size=3, seed=3, per_user=per_user, parts=True
        )
        rows = rows_of_epoch(loader, known)
        assert Counter(targets_of(rows)) == Counter(
            item for user in USERS for item in learnable(user) if item % 3
        )
        assert any(-1 in items for _, items, _ in rows)
        n_samples = sum(batch.n_samples for batch in loader.epoch(0))
        assert n_samples == len(targets_of(rows)) < loader.n_samples(0)

    def test_what_is_shown_as_unknown_stays_a_target(self, make_loader):
        plain, hidden = make_loader(), make_loader(unknown_rate=0.4)
        n_hidden = 0
        for epoch in range(5):
            for one, other in zip(plain.epoch(epoch), hidden.epoch(epoch), strict=True):
                np.testing.assert_array_equal(one.targets, other.targets)
                changed = one.history_items != other.history_items
                assert (other.history_items[changed] == UNKNOWN_ROW).all()
                n_hidden += int(changed.sum())
        assert n_hidden


class TestHeldOut:
    def loader(self, log, split, catalogue, part: Part) -> HeldOutLoader:
        return HeldOutLoader(log, split, part, catalogue, SPEC, batch_size=3)

    @pytest.mark.parametrize("part", [Part.VALID, Part.TEST], ids=["valid", "test"])
    def test_all_that_came_before_the_target_is_read(self, log, split, catalogue, part):
        """Before the test item that is the validation item, too."""
        one = self.loader(log, split, catalogue, part)
        found = {}
        for chosen, batch in one.batches():
            assert batch.n_samples == len(chosen)
            assert (batch.users == one.rows.users[chosen] + 1).all()
            for user, items, targets in rows_in(batch, catalogue):
                assert not any(targets[:-1])
                found[user] = (items, targets[-1])
        back = 2 if part == Part.VALID else 1
        assert found == {
            user: (sequence(user)[:-back][-LENGTH:], sequence(user)[-back])
            for user in USERS
            if N_BEHAVIORS[user - 1] >= 3
        }

    def test_batches_come_in_order_of_length_and_name_their_rows(self, log, split, catalogue):
        one = self.loader(log, split, catalogue, Part.VALID)
        batches = list(one.batches())
        assert sorted(itertools.chain(*(c.tolist() for c, _ in batches))) == list(range(len(one)))
        widths = [batch.history_items.shape[1] for _, batch in batches]
        assert widths == sorted(widths)
        for chosen, batch in batches:
            assert batch.targets[:, -1].tolist() == one.targets[chosen].tolist()

    def test_ages_are_told_at_the_time_of_the_target(self, log, split, catalogue):
        for _, batch in self.loader(log, split, catalogue, Part.TEST).batches():
            for b, (_, items, targets) in enumerate(rows_in(batch, catalogue)):
                now = time_of(*PLACES[targets[-1]])
                ages = [now - time_of(*PLACES[item]) for item in items]
                assert batch.history_buckets[b, :, 1].tolist()[-len(ages) :] == ages

    def test_the_past_is_all_of_it_however_long_ago(self, log, split, catalogue):
        one = self.loader(log, split, catalogue, Part.TEST)
        for row, user in enumerate(one.rows.users):
            expected = catalogue.rows(np.array(sequence(int(user) + 1)[:-1]))
            assert one.past_rows(row).tolist() == expected.tolist()
        assert max(len(one.past_rows(row)) for row in range(len(one))) > LENGTH

    def test_an_unknown_target_stays_and_is_called_unknown(self, log, split):
        known = Catalogue(log.items[log.items % 3 > 0])
        one = self.loader(log, split, known, Part.TEST)
        expected = [
            UNKNOWN_ROW if item_of(user, N_BEHAVIORS[user - 1] - 1) % 3 == 0 else 2
            for user in USERS
            if N_BEHAVIORS[user - 1] >= 3
        ]
        assert np.minimum(one.targets, 2).tolist() == expected
        assert len(one) == len(expected)

    def test_without_a_held_out_behavior_there_is_no_batch(self, make_log):
        log = make_log({"user": [1, 1, 2], "item": [1, 2, 3], "timestamp": [1, 2, 3]})
        split, catalogue = leave_one_out(log), Catalogue(log.items)
        one = self.loader(log, split, catalogue, Part.TEST)
        assert len(one) == len(held_out_rows(log, split, Part.TEST, LENGTH)) == 0
        assert list(one.batches()) == []


@pytest.mark.parametrize("options", LOADERS)
def test_a_log_without_a_row_has_no_batch(make_log, options):
    """Every user has one behavior."""
    log = make_log({"user": [1, 2, 3], "item": [1, 2, 3], "timestamp": [1, 2, 3]})
    options = {"batch_size": 3, "seed": 3, "per_user": None, **options}
    loader = SequenceLoader(log, leave_one_out(log), Catalogue(log.items), SPEC, **options)
    assert loader.n_samples(0) == 0
    assert list(loader.epoch(0)) == []
