"""People of the world see what is ranked first, and click as the world says.

Shapes: C candidates of a visit, S items shown.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from loadtest.ab.people import Habits, Visit, Visitors
from loadtest.world import Combination, World, WorldSettings, make_world

HABITS = Habits(candidates=12, targets_per_visit=3, shown=4, eta=1.0)
SETTINGS = WorldSettings(
    users=40, items=80, topics=5, targets=6, history_length=60, memory=40, visits=3
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(SETTINGS)


def visits(world: World, n: int, **changes: Any) -> list[Visit]:
    visitors = Visitors(world, dataclasses.replace(HABITS, **changes))
    rng = np.random.default_rng(1)
    return [visitors.visit(rng) for _ in range(n)]


def a_visit(items: list[int], looks: list[bool], tickets: list[float]) -> Visit:
    return Visit(user=0, items=np.array(items), looks=np.array(looks), tickets=np.array(tickets))


class TestVisit:
    def test_candidates_are_different_items_with_so_many_targets(self, world):
        for visit in visits(world, 200):
            assert len(set(visit.items.tolist())) == len(visit.items) == 12
            assert (visit.items < world.n_targets).sum() == 3
            assert (world.topics[visit.items] >= 0).sum() == 9

    def test_all_targets_and_all_ordinary_items_come_at_all_places(self, world):
        items_VC = np.stack([visit.items for visit in visits(world, 2000)])
        assert set(items_VC.ravel().tolist()) == {
            *range(world.n_targets),
            *np.flatnonzero(world.topics >= 0).tolist(),
        }
        targets_C = (items_VC < world.n_targets).mean(axis=0)
        np.testing.assert_allclose(targets_C, 3 / 12, atol=0.04)

    def test_ordinary_candidates_are_mostly_of_the_persons_topics(self, world):
        shares = [
            (world.interests[visit.user, world.topics[ordinary]] > 0).mean()
            for visit in visits(world, 500)
            for ordinary in [visit.items[world.topics[visit.items] >= 0]]
        ]
        # Half of the draws by themselves, three fifths of the others by chance, less what repeats.
        assert 0.7 < np.mean(shares) < 0.82

    def test_the_same_seed_gives_the_same_visits(self, world):
        for one, other in zip(visits(world, 20), visits(world, 20), strict=True):
            assert one.user == other.user
            np.testing.assert_array_equal(one.items, other.items)
            np.testing.assert_array_equal(one.looks, other.looks)
            np.testing.assert_array_equal(one.tickets, other.tickets)

    def test_a_person_looks_at_position_k_with_1_by_1_plus_k_to_the_eta(self, world):
        looks_VS = np.stack([visit.looks for visit in visits(world, 4000)])
        np.testing.assert_allclose(looks_VS.mean(axis=0), [1, 1 / 2, 1 / 3, 1 / 4], atol=0.03)

    def test_without_position_bias_everything_is_looked_at(self, world):
        assert all(visit.looks.all() for visit in visits(world, 100, eta=0.0))

    def test_a_world_as_small_as_a_visit_is_enough(self, world):
        n_ordinary = int((world.topics >= 0).sum())
        (visit,) = visits(
            world, 1, candidates=world.n_targets + n_ordinary, targets_per_visit=world.n_targets
        )
        assert len(set(visit.items.tolist())) == world.n_targets + n_ordinary


class TestActivity:
    def test_without_skew_all_visit_alike(self, world):
        counts = np.bincount([visit.user for visit in visits(world, 8000)], minlength=40)
        np.testing.assert_allclose(counts, 200, atol=70)

    def test_with_skew_the_second_comes_half_as_often_as_the_first(self, world):
        users = [visit.user for visit in visits(world, 8000, user_skew=1.0)]
        counts = np.sort(np.bincount(users, minlength=40))[::-1]
        expected = 8000 / np.arange(1, 41) / (1 / np.arange(1, 41)).sum()
        np.testing.assert_allclose(counts[:4], expected[:4], rtol=0.1)

    def test_the_seed_says_who_is_active(self, world):
        first = [
            np.bincount([v.user for v in visits(world, 500, user_skew=2.0, seed=seed)]).argmax()
            for seed in range(1, 6)
        ]
        assert len(set(first)) > 1


class TestClicks:
    def test_the_best_are_shown_and_clicked_from_the_top_down(self, world):
        visit = a_visit([10, 11, 12, 13, 14, 15], [True] * 4, [0.0] * 4)
        scores = np.array([0.1, 0.9, 0.3, 0.8, 0.0, 0.7])
        visitors = Visitors(world, HABITS)
        assert visitors.clicks(visit, scores).tolist() == [11, 13, 15, 12]

    def test_of_equal_scores_the_first_asked_comes_first(self, world):
        visit = a_visit([15, 10, 14, 11, 13], [True] * 4, [0.0] * 4)
        scores = np.array([0.5, 0.5, 0.9, 0.5, 0.5])
        assert Visitors(world, HABITS).clicks(visit, scores).tolist() == [14, 15, 10, 11]

    def test_what_is_not_looked_at_is_not_clicked(self, world):
        visit = a_visit([10, 11, 12, 13], [True, False, False, True], [0.0] * 4)
        assert Visitors(world, HABITS).clicks(visit, -np.arange(4.0)).tolist() == [10, 13]

    def test_a_click_comes_where_the_ticket_is_below_the_true_probability(self, world):
        user = int(np.flatnonzero((world.combinations == Combination.WHOLE).any(axis=1))[0])
        target = int(np.flatnonzero(world.combinations[user] == Combination.WHOLE)[0])
        probability = float(world.click_probabilities(np.array(user), np.array(target)))
        for ticket, clicked in ((probability - 1e-9, [target]), (probability + 1e-9, [])):
            visit = dataclasses.replace(
                a_visit([target, 20, 21, 22], [True] * 4, [ticket, 1, 1, 1]), user=user
            )
            scores = np.array([1.0, 0.0, 0.0, 0.0])
            assert Visitors(world, HABITS).clicks(visit, scores).tolist() == clicked

    def test_overall_as_many_as_look_times_truth(self, world):
        visitors = Visitors(world, HABITS)
        rng = np.random.default_rng(2)
        scores = -np.arange(12.0)
        clicks, expected = 0, 0.0
        for _ in range(4000):
            visit = visitors.visit(rng)
            clicks += len(visitors.clicks(visit, scores))
            truth = world.click_probabilities(np.array(visit.user), visit.items[:4])
            expected += float((truth / (1 + np.arange(4))).sum())
        assert clicks == pytest.approx(expected, rel=0.05)


def test_categories_are_topics_and_each_special_item_is_one_of_its_own(world):
    ordinary = int(np.flatnonzero(world.topics == 3)[0])
    assert Visitors(world, HABITS).categories(np.array([ordinary, 0, 7])).tolist() == [3, -1, -8]


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"candidates": 0}, "candidates must be at least 1, got 0", id="none"),
            pytest.param({"shown": 0}, "shown must be at least 1, got 0", id="nothing shown"),
            pytest.param({"shown": 13}, r"shown must be at most candidates \(12\), got 13", id="s"),
            pytest.param({"targets_per_visit": -1}, "targets_per_visit must be at least 0", id="-"),
            pytest.param({"targets_per_visit": 13}, "at most candidates", id="targets only"),
            pytest.param({"eta": -0.1}, "eta must be 0 or more, got -0.1", id="eta"),
            pytest.param({"eta": float("nan")}, "eta must be 0 or more, got nan", id="eta nan"),
            pytest.param({"user_skew": -1}, "user_skew must be 0 or more, got -1", id="skew"),
            pytest.param({"seed": -1}, "seed must be at least 0, got -1", id="seed"),
        ],
    )
    def test_impossible_habits(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(HABITS, **changes)

    def test_more_targets_than_the_world_has(self, world):
        habits = dataclasses.replace(HABITS, targets_per_visit=7)
        with pytest.raises(ValueError, match=r"targets_per_visit must be at most 6, .*: 7"):
            Visitors(world, habits)

    def test_more_candidates_than_the_world_has(self, world):
        habits = dataclasses.replace(HABITS, candidates=90)
        with pytest.raises(ValueError, match=r"ordinary candidates must be at most 50, .*: 87"):
            Visitors(world, habits)
