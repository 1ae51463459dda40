"""The synthetic world: seeded, honest about its probabilities, and built as it says.

Shapes: U users, L history length.
"""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from loadtest.world import (
    Combination,
    World,
    WorldSettings,
    draw_ordinary,
    make_world,
    write_log,
)
from training.data.log import PreparedLog
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource

BASE, ACCENT = 0, 1
States = list[tuple[Combination, list[set[int]]]]

SMALL = WorldSettings(
    users=150,
    items=140,
    topics=5,
    targets=8,
    recipes=2,
    history_length=60,
    memory=40,
    visits=4,
    candidates=5,
    targets_per_visit=2,
    history_days=20,
    visit_days=5,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A world with its log, read back from its file."""

    settings: WorldSettings
    world: World
    log: pl.DataFrame
    path: Path

    @property
    def organic(self) -> NDArray[np.int64]:
        """Return the item indices of the histories, int64 [U, L]."""
        rows = self.log.filter(pl.col("label").is_null()).sort(
            "user_id", "timestamp", maintain_order=True
        )
        return self.index(rows["item_id"]).reshape(self.settings.users, -1)

    @property
    def shown(self) -> pl.DataFrame:
        return self.log.filter(pl.col("label").is_not_null())

    def index(self, item_ids: pl.Series) -> NDArray[np.int64]:
        """Return item indices of item ids."""
        order = np.argsort(self.world.item_ids)
        places = np.searchsorted(self.world.item_ids, item_ids.to_numpy(), sorter=order)
        indices: NDArray[np.int64] = order[places]
        return indices


def make(folder: Path, **changes: int) -> Written:
    settings = dataclasses.replace(SMALL, **changes)
    world = make_world(settings)
    path = folder / "log.parquet"
    write_log(world, settings, path)
    return Written(settings=settings, world=world, log=pl.read_parquet(path), path=path)


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{}-recipe".format)
def written(request, tmp_path_factory) -> Written:
    return make(tmp_path_factory.mktemp("world"), recipes=request.param)


class TestSeed:
    def test_gives_the_same_world_and_the_same_bytes_again(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        one, other = make(tmp_path / "a"), make(tmp_path / "b")
        assert one.path.read_bytes() == other.path.read_bytes()
        for name, values in vars(one.world).items():
            np.testing.assert_array_equal(values, getattr(other.world, name))

    def test_another_one_gives_another_world(self, tmp_path):
        one, other = make(tmp_path), make(tmp_path, seed=2)
        assert (one.world.item_ids != other.world.item_ids).any()
        assert (one.world.combinations != other.world.combinations).any()
        assert not one.log["timestamp"].equals(other.log["timestamp"])
        assert not one.log["label"].equals(other.log["label"])


class TestLog:
    def test_has_the_columns_of_an_ordinary_log(self, written):
        assert dict(written.log.schema) == {
            "user_id": pl.Int64,
            "item_id": pl.Int64,
            "timestamp": pl.Int64,
            "label": pl.Int8,
            "click_probability": pl.Float32,
        }
        assert written.log["user_id"].unique().sort().to_list() == list(range(1, 151))
        assert set(written.log["item_id"]) <= set(written.world.item_ids.tolist())

    def test_histories_stand_before_the_first_visit(self, written):
        """As many organic rows as the history length, without label; only then labelled ones."""
        settings = written.settings
        per_user = written.log.group_by("user_id").agg(
            organic=pl.col("label").is_null().sum(),
            shown=pl.col("label").is_not_null().sum(),
            last_organic=pl.col("timestamp").filter(pl.col("label").is_null()).max(),
            first_shown=pl.col("timestamp").filter(pl.col("label").is_not_null()).min(),
        )
        assert set(per_user["organic"]) == {settings.history_length}
        assert set(per_user["shown"]) == {settings.visits * settings.candidates}
        assert (per_user["last_organic"] < per_user["first_shown"]).all()

    def test_rows_are_sorted_by_user_and_time(self, written):
        assert written.log.select("user_id", "timestamp").equals(
            written.log.select("user_id", "timestamp").sort("user_id", "timestamp")
        )

    def test_histories_end_where_the_world_says_and_visits_begin_there(self, written):
        end_s = written.world.history_end_s
        is_organic = written.log["label"].is_null()
        assert written.log.filter(is_organic)["timestamp"].max() < end_s
        assert written.log.filter(~is_organic)["timestamp"].min() >= end_s
        assert end_s - written.log["timestamp"].min() <= written.settings.history_days * 86_400

    def test_both_phases_last_as_long_as_they_should(self, written):
        settings, times = written.settings, written.log["timestamp"]
        assert times.max() - times.min() <= (settings.history_days + settings.visit_days) * 86_400
        organic = written.log.filter(pl.col("label").is_null())["timestamp"]
        assert organic.max() - organic.min() <= settings.history_days * 86_400

    def test_a_visit_shows_so_many_targets_and_none_twice(self, written):
        settings = written.settings
        shown = written.shown.with_columns(
            item=pl.Series(written.index(written.shown["item_id"]))
        ).with_columns(target=pl.col("item") < settings.targets)
        targets = shown.filter("target")
        assert len(targets) == settings.users * settings.visits * settings.targets_per_visit
        assert not targets.select("user_id", "item").is_duplicated().any()
        # Two visits may fall on one second.
        visits = shown.group_by("user_id", "timestamp").agg(pl.len(), pl.col("target").sum())
        assert (visits["len"] % settings.candidates == 0).all()
        assert (visits["len"] * settings.targets_per_visit == visits["target"] * 5).all()

    def test_organic_behaviors_are_ordinary_items_and_ingredients(self, written):
        assert (written.organic >= written.settings.targets).all()

    def test_organic_behaviors_are_of_the_persons_topics(self, written):
        topics_UL = written.world.topics[written.organic]
        users_UL = np.broadcast_to(np.arange(len(topics_UL))[:, None], topics_UL.shape)
        ordinary = topics_UL >= 0
        assert (written.world.interests[users_UL[ordinary], topics_UL[ordinary]] > 0).all()

    def test_write_log_returns_its_rows_and_leaves_one_file(self, tmp_path):
        world = make_world(SMALL)
        n_rows = write_log(world, SMALL, tmp_path / "log.parquet")
        assert n_rows == len(pl.read_parquet(tmp_path / "log.parquet")) == 150 * (60 + 4 * 5)
        assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]

    def test_training_reads_it_as_a_log_with_true_probabilities(self, written, tmp_path):
        prepare(LogSource(path=written.path), tmp_path / "log", PrepareOptions())
        log = PreparedLog(tmp_path / "log")
        assert log.header.n_users == 150
        assert log.header.n_impressions == 150 * 4 * 5
        assert log.header.n_behaviors == 150 * 60 + written.log["label"].sum()
        assert log.probabilities is not None
        assert log.probabilities.tolist() == written.shown["click_probability"].to_list()


class TestOrdinaryItems:
    def test_have_topics_and_come_for_each_user(self, written):
        drawn = draw_ordinary(written.world, np.array([3, 3, 7]), 4, np.random.default_rng(1))
        assert drawn.shape == (3, 4)
        assert (written.world.topics[drawn] >= 0).all()

    def test_half_of_them_are_of_the_persons_own_topics(self, written):
        """And of the other half those that fall on them by chance: three topics of five."""
        world = written.world
        users = np.arange(len(world.interests))
        drawn = draw_ordinary(world, users, 200, np.random.default_rng(1))
        own = world.interests[users[:, None], world.topics[drawn]] > 0
        assert own.mean() == pytest.approx(0.5 + 0.5 * 3 / 5, abs=0.02)


class TestProbabilities:
    def test_are_within_0_and_1_and_only_of_labelled_rows(self, written):
        assert written.shown["click_probability"].is_between(0, 1).all()
        organic = written.log.filter(pl.col("label").is_null())
        assert organic["click_probability"].is_null().all()

    def test_are_those_of_the_world(self, written):
        shown = written.shown
        expected = written.world.click_probabilities(
            shown["user_id"].to_numpy() - 1, written.index(shown["item_id"])
        )
        np.testing.assert_array_equal(
            shown["click_probability"].to_numpy(), expected.astype(np.float32)
        )

    def test_are_those_by_which_people_click(self, tmp_path):
        """Overall, and in each half of the probabilities by itself."""
        shown = make(tmp_path, users=600).shown.sort("click_probability")
        half = len(shown) // 2
        for rows in (shown, shown[:half], shown[half:]):
            assert rows["label"].mean() == pytest.approx(
                rows["click_probability"].mean(), abs=0.015
            )

    def test_of_a_target_depend_on_its_combination_alone(self, written):
        world = written.world
        users, targets = np.indices(world.combinations.shape)
        found = world.click_probabilities(users, targets)
        whole = found[world.combinations == Combination.WHOLE]
        broken = found[world.combinations == Combination.BROKEN]
        absent = found[world.combinations == Combination.ABSENT]
        assert min(map(len, (whole, broken, absent))) > 100  # each of them is common
        assert len(set(whole)) == 1
        assert set(broken) == set(absent)
        assert whole[0] > 0.8
        assert broken[0] < 0.1

    def test_of_an_ordinary_item_grow_with_the_interest_in_its_topic(self, written):
        world = written.world
        item = int(np.flatnonzero(world.topics == 0)[0])
        interest = world.interests[:, 0]
        found = world.click_probabilities(np.arange(len(interest)), np.array(item))
        order = np.argsort(interest)
        assert (np.diff(found[order]) >= 0).all()
        assert found[order[-1]] > 2 * found[order[0]]


class TestCombinations:
    @pytest.fixture(scope="class")
    @classmethod
    def states(cls, written: Written) -> States:
        """Return, for each person and target, which of its ingredients the history holds."""
        histories = [set(row.tolist()) for row in written.organic]
        return [
            (
                Combination(written.world.combinations[user, target]),
                [{n for n in (BASE, ACCENT) if pair[n] in history} for pair in pairs.tolist()],
            )
            for user, history in enumerate(histories)
            for target, pairs in enumerate(written.world.ingredients)
        ]

    def test_a_whole_one_has_one_base_and_its_accent(self, states: States):
        whole = [recipes for state, recipes in states if state == Combination.WHOLE]
        assert whole
        assert all(sum(BASE in met for met in recipes) == 1 for recipes in whole)
        assert all({BASE, ACCENT} in recipes for recipes in whole)

    def test_a_broken_one_has_one_base_but_not_its_accent(self, states: States):
        broken = [recipes for state, recipes in states if state == Combination.BROKEN]
        assert broken
        assert all(sum(BASE in met for met in recipes) == 1 for recipes in broken)
        assert all({BASE} in recipes for recipes in broken)

    def test_an_absent_one_has_no_base(self, states: States):
        absent = [recipes for state, recipes in states if state == Combination.ABSENT]
        assert absent
        assert not any(BASE in met for recipes in absent for met in recipes)

    @pytest.mark.parametrize("combination", Combination)
    def test_accents_of_other_recipes_are_met_or_not(self, states: States, written, combination):
        """Whatever the combination: a base and any accent alone say nothing."""
        others = {
            (recipe, ACCENT in met)
            for state, recipes in states
            if state == combination
            for recipe, met in enumerate(recipes)
            if BASE not in met
        }
        recipes = range(written.settings.recipes)
        if len(recipes) > 1:
            assert others == {(recipe, met) for recipe in recipes for met in (False, True)}
        else:  # There is no other recipe than the person's own.
            assert others == ({(0, False)} if combination == Combination.ABSENT else set())

    def test_the_base_may_be_of_any_recipe(self, states: States, written):
        bases = [BASE in met for _, recipes in states for met in recipes]
        by_recipe = np.reshape(bases, (-1, written.settings.recipes)).sum(axis=0)
        assert by_recipe.min() > 0.8 * by_recipe.mean()

    def test_nobody_meets_an_ingredient_twice(self, written):
        for history in written.organic:
            counts = np.bincount(history, minlength=written.settings.items)
            assert counts[written.world.ingredients].max() <= 1

    def test_each_ingredient_belongs_to_one_recipe(self, written):
        ingredients = written.world.ingredients.ravel()
        assert len(set(ingredients.tolist())) == len(ingredients)
        assert ingredients.min() >= written.settings.targets
        assert (written.world.topics[ingredients] == -1).all()

    def test_ingredients_lie_within_the_memory_window(self, written):
        """And use all of it: the oldest place and the newest."""
        settings = written.settings
        is_ingredient_UL = np.isin(written.organic, written.world.ingredients)
        places = np.flatnonzero(is_ingredient_UL.any(axis=0))
        assert places.min() == settings.history_length - settings.memory
        assert places.max() == settings.history_length - 1


class TestFile:
    def test_load_gives_what_was_saved(self, written, tmp_path):
        written.world.save(tmp_path / "world.npz")
        loaded = World.load(tmp_path / "world.npz")
        assert loaded.n_targets == written.settings.targets
        for name, values in vars(written.world).items():
            found = getattr(loaded, name)
            assert type(found) is type(values)
            assert np.asarray(found).dtype == np.asarray(values).dtype
            np.testing.assert_array_equal(found, values)

    def test_the_name_of_the_file_is_kept_as_it_is(self, tmp_path):
        make_world(SMALL).save(tmp_path / "world")
        assert [path.name for path in tmp_path.iterdir()] == ["world"]

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(None, id="missing"),
            pytest.param(b"", id="empty"),
            pytest.param(b"a world", id="text"),
            pytest.param(b"PK\x03\x04 half", id="broken zip"),
        ],
    )
    def test_what_is_no_world_is_refused_by_name(self, tmp_path, content):
        path = tmp_path / "world.npz"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"world\.npz: not a world"):
            World.load(path)

    def test_a_file_cut_short_is_refused(self, tmp_path):
        path = tmp_path / "world.npz"
        make_world(SMALL).save(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"world\.npz: not a world"):
            World.load(path)

    def test_nothing_but_the_world_is_left_behind(self, tmp_path):
        """A file that was there stays whole until the new one is."""
        path = tmp_path / "world.npz"
        make_world(SMALL).save(path)
        make_world(dataclasses.replace(SMALL, seed=2)).save(path)
        assert [found.name for found in tmp_path.iterdir()] == ["world.npz"]
        assert (
            World.load(path).item_ids[0]
            == make_world(dataclasses.replace(SMALL, seed=2)).item_ids[0]
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"history_end_s": None}, "history_end_s", id="missing"),
            pytest.param({"history_end_s": 1.5}, "must be a whole number", id="fraction"),
            pytest.param({"history_end_s": [1, 2]}, "must be a whole number", id="several"),
        ],
    )
    def test_a_world_without_the_end_of_its_histories_is_refused(self, tmp_path, changes, message):
        arrays = {**vars(make_world(SMALL)), **changes}
        path = tmp_path / "world.npz"
        np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
        with pytest.raises(ValueError, match=rf"world\.npz: not a world: .*{message}"):
            World.load(path)

    def test_other_arrays_are_refused(self, tmp_path):
        np.savez(tmp_path / "world.npz", item_ids=np.arange(3))
        with pytest.raises(ValueError, match=r"world\.npz: not a world: .*topics"):
            World.load(tmp_path / "world.npz")


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            *(
                pytest.param({name: 0}, f"{name} must be at least 1, got 0", id=name)
                for name in (
                    "users",
                    "topics",
                    "targets",
                    "recipes",
                    "history_length",
                    "visits",
                    "candidates",
                    "history_days",
                    "visit_days",
                )
            ),
            pytest.param(
                {"targets_per_visit": 6},
                r"targets_per_visit must be within 0 \.\. candidates \(5\), got 6",
                id="more targets than candidates",
            ),
            pytest.param({"targets_per_visit": -1}, "targets_per_visit must be", id="negative"),
            pytest.param(
                {"visits": 5},
                "5 visits with 2 targets each need as many targets, got 8",
                id="too few targets",
            ),
            pytest.param({"items": 44}, "items must be at least 45 for 8 targets", id="items"),
            pytest.param(
                {"memory": 23}, r"memory must be within 24 .*\(60\), got 23", id="memory too short"
            ),
            pytest.param({"memory": 61}, r"history_length \(60\), got 61", id="memory too long"),
            pytest.param({"seed": -1}, "seed must be at least 0, got -1", id="seed"),
        ],
    )
    def test_impossible_ones_are_refused_by_name(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **changes)

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"items": 45}, id="one ordinary item a topic"),
            pytest.param({"memory": 24}, id="memory of ingredients alone"),
            pytest.param({"history_length": 40}, id="memory of the whole history"),
            pytest.param({"targets_per_visit": 0}, id="no targets shown"),
            pytest.param({"visits": 1, "targets_per_visit": 5}, id="only targets shown"),
            pytest.param({"topics": 1}, id="one topic"),
            pytest.param({"users": 1}, id="one person"),
        ],
    )
    def test_those_at_the_edge_give_a_log(self, tmp_path, changes):
        log = make(tmp_path, **changes).log
        settings = dataclasses.replace(SMALL, **changes)
        assert len(log) == settings.users * (
            settings.history_length + settings.visits * settings.candidates
        )

    def test_defaults_are_histories_of_a_thousand_and_two_recipes_a_target(self):
        settings = WorldSettings()
        assert (settings.history_length, settings.memory) == (1000, 900)
        assert (settings.targets, settings.recipes, settings.targets_per_visit) == (12, 2, 2)
