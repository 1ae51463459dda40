"""Ranks and their metrics against a few lines of NumPy; negatives against what may be drawn.

Shapes: B requests, R catalogue rows, N negatives.
"""

import doctest
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from contract.catalogue import FIRST_ROW, PADDING_ROW, UNKNOWN_ROW
from training import ranking
from training.ranking import (
    CUTOFFS,
    PROTOCOLS,
    SAMPLED,
    Protocol,
    draw_negatives,
    rank_among,
    rank_in_catalogue,
    ranking_metrics,
)

N_ROWS, N_REQUESTS, N_DRAWN = 40, 60, 12


class Case:
    """Random scores with many ties, targets, histories of which some hold the target, weights."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.scores_BR = rng.integers(0, 25, (N_REQUESTS, N_ROWS)).astype(np.float32)
        self.targets_B = rng.integers(UNKNOWN_ROW, N_ROWS, N_REQUESTS)
        self.targets_B[:3] = UNKNOWN_ROW
        self.histories = [
            rng.integers(UNKNOWN_ROW, N_ROWS, n) for n in rng.integers(0, 12, N_REQUESTS)
        ]
        self.histories[3][:1] = self.targets_B[3]
        self.weights_R = rng.integers(1, 30, N_ROWS)
        self.weights_R[:FIRST_ROW] = 0

    def negatives(self, protocol: Protocol) -> NDArray[np.int64]:
        return draw_negatives(
            protocol, self.weights_R, self.targets_B, self.histories, N_DRAWN, seed=7
        )

    def padded_histories(self) -> NDArray[np.int64]:
        width = max(len(history) for history in self.histories)
        rows = [[*history.tolist(), *[PADDING_ROW] * width][:width] for history in self.histories]
        return np.array(rows, dtype=np.int64)

    def ranks(self, protocol: Protocol) -> list[int]:
        scores, targets = torch.from_numpy(self.scores_BR), torch.from_numpy(self.targets_B)
        if protocol == "full":
            excluded = torch.from_numpy(self.padded_histories())
            return rank_in_catalogue(scores, targets, excluded).tolist()
        if protocol == "full_history_included":
            return rank_in_catalogue(scores, targets).tolist()
        return rank_among(scores, targets, torch.from_numpy(self.negatives(protocol))).tolist()


def plain_ranks(
    scores_BR: NDArray[np.float32], targets_B: NDArray[np.int64], rivals: Sequence[set[int]]
) -> list[int]:
    """Return 1 + the rivals that score no less; behind all of them where the target is unknown."""
    ranks = []
    for scores_R, target, rows in zip(scores_BR, targets_B.tolist(), rivals, strict=True):
        others = [row for row in rows if row != target]
        is_known = target >= FIRST_ROW
        ranks.append(1 + sum(not is_known or scores_R[row] >= scores_R[target] for row in others))
    return ranks


class TestAgainstNumpy:
    def test_ranks_in_the_catalogue_without_the_history(self):
        case = Case()
        everything = set(range(FIRST_ROW, N_ROWS))
        known = case.targets_B >= FIRST_ROW
        rivals = [everything - set(history.tolist()) for history in case.histories]
        expected = np.array(plain_ranks(case.scores_BR, case.targets_B, rivals))
        assert np.array(case.ranks("full"))[known].tolist() == expected[known].tolist()

    def test_ranks_in_the_whole_catalogue(self):
        case = Case()
        rivals = [set(range(FIRST_ROW, N_ROWS))] * N_REQUESTS
        expected = plain_ranks(case.scores_BR, case.targets_B, rivals)
        assert case.ranks("full_history_included") == expected

    @pytest.mark.parametrize("protocol", SAMPLED)
    def test_ranks_among_negatives(self, protocol):
        case = Case()
        rivals = [set(row.tolist()) - {PADDING_ROW} for row in case.negatives(protocol)]
        assert case.ranks(protocol) == plain_ranks(case.scores_BR, case.targets_B, rivals)

    def test_metrics_by_their_definition(self):
        ranks = np.array([1, 2, 10, 11, 20, 21, 400])
        found = ranking_metrics(ranks, prefix="full_")
        assert len(found) == 3 * len(CUTOFFS)
        for k in (10, 20):
            hits = [rank for rank in ranks.tolist() if rank <= k]
            assert found[f"full_hr{k}"] == pytest.approx(len(hits) / 7)
            assert found[f"full_mrr{k}"] == pytest.approx(sum(1 / rank for rank in hits) / 7)
            ndcg = sum(1 / np.log2(rank + 1) for rank in hits) / 7
            assert found[f"full_ndcg{k}"] == pytest.approx(ndcg)

    def test_metrics_by_hand(self):
        """Ranks 1, 3 and 11: gains 1, 1/2 and, at 20 only, 1/log2(12)."""
        found = ranking_metrics(np.array([1, 3, 11]))
        assert found["hr10"] == pytest.approx(2 / 3)
        assert found["ndcg10"] == pytest.approx(0.5)
        assert found["mrr10"] == pytest.approx(4 / 9)
        assert found["hr20"] == 1
        assert found["ndcg20"] == pytest.approx((1.5 + 0.278943) / 3, abs=1e-6)
        assert found["mrr20"] == pytest.approx((4 / 3 + 1 / 11) / 3)

    def test_the_examples_of_the_docstrings(self):
        assert doctest.testmod(ranking).attempted > 0
        assert doctest.testmod(ranking).failed == 0


def in_catalogue(
    scores_R: Sequence[float], target: int, excluded: Sequence[int] | None = None
) -> int:
    excluded_BL = None if excluded is None else torch.tensor([excluded])
    ranks = rank_in_catalogue(torch.tensor([scores_R]), torch.tensor([target]), excluded_BL)
    return int(ranks[0])


def among(scores_R: Sequence[float], target: int, negatives: Sequence[int]) -> int:
    scores_BR, negatives_BN = torch.tensor([scores_R]), torch.tensor([negatives])
    return int(rank_among(scores_BR, torch.tensor([target]), negatives_BN)[0])


NAN, INF = float("nan"), float("inf")
NOTHING = np.zeros(0, dtype=np.int64)


class TestRankInCatalogue:
    """Rows 2 .. 5 are the items; padding and the unknown item always score 99."""

    def test_by_hand(self):
        assert in_catalogue([99, 99, 1, 4, 2, 3], target=5) == 2

    def test_ties_count_against_the_target(self):
        assert in_catalogue([99, 99, 3, 3, 2, 3], target=5) == 3

    @pytest.mark.parametrize("target", [2, 3, 4, 5])
    @pytest.mark.parametrize("score", [0.0, INF, -INF])
    def test_equal_scores_rank_every_target_last(self, target, score):
        """Whatever its place among the rows."""
        assert in_catalogue([score] * 6, target) == 4

    def test_padding_and_the_unknown_item_are_no_rivals(self):
        assert in_catalogue([99, 99, 0, 1, 0, 0], target=3) == 1

    def test_an_unknown_target_ranks_last(self):
        """However high the unknown item scores: the answer could not have named it."""
        assert in_catalogue([99, 99, 1, 4, 2, 3], target=UNKNOWN_ROW) == 5

    def test_excluded_items_are_no_rivals(self):
        assert in_catalogue([99, 99, 9, 9, 2, 1], target=5, excluded=[2, 3, 3, 0]) == 2

    def test_a_target_of_the_history_stays(self):
        assert in_catalogue([99, 99, 9, 9, 2, 3], target=5, excluded=[5, 2]) == 2

    def test_a_target_whose_score_is_no_number_ranks_last(self):
        assert in_catalogue([99, 99, 1, 4, 2, NAN], target=5) == 4

    def test_a_rival_whose_score_is_no_number_counts_against_the_target(self):
        assert in_catalogue([99, 99, 1, NAN, 2, 3], target=5) == 2
        assert in_catalogue([NAN] * 5 + [3.0], target=5) == 4

    def test_the_scores_are_left_alone(self):
        case = Case()
        before = case.scores_BR.copy()
        case.ranks("full")
        np.testing.assert_array_equal(case.scores_BR, before)


class TestRankAmong:
    def test_by_hand(self):
        assert among([0, 0, 1, 4, 2, 3], target=5, negatives=[2, 3, 4]) == 2

    def test_ties_count_against_the_target(self):
        assert among([0, 0, 3, 3, 2, 3], target=5, negatives=[2, 3, 4]) == 3

    def test_equal_scores_rank_last(self):
        assert among([0.0] * 6, target=2, negatives=[3, 4, 5]) == 4

    def test_what_could_not_be_drawn_is_no_rival(self):
        assert among([99, 99, 3, 3, 2, 3], target=5, negatives=[2, 0, 0]) == 2

    @pytest.mark.parametrize("negatives", [[2, 3, 4], [2, 0, 4]], ids=["three", "two"])
    def test_an_unknown_target_ranks_behind_all_that_were_drawn(self, negatives):
        expected = 1 + sum(row != 0 for row in negatives)
        assert among([99, 99, 1, 4, 2, 3], UNKNOWN_ROW, negatives) == expected

    def test_a_target_whose_score_is_no_number_ranks_last(self):
        assert among([0, 0, 1, 4, 2, NAN], target=5, negatives=[2, 3, 0]) == 3

    def test_a_rival_whose_score_is_no_number_counts_against_the_target(self):
        assert among([0, 0, NAN, 4, 2, 3], target=5, negatives=[2, 3, 4]) == 3

    def test_the_order_of_candidates_changes_nothing(self):
        case = Case()
        negatives_BN = case.negatives("pop100")
        shuffled_BN = np.random.default_rng(1).permuted(negatives_BN, axis=1)
        scores, targets = torch.from_numpy(case.scores_BR), torch.from_numpy(case.targets_B)

        def ranks(negatives: NDArray[np.int64]) -> Tensor:
            return rank_among(scores, targets, torch.from_numpy(negatives))

        assert torch.equal(ranks(negatives_BN), ranks(shuffled_BN))


def assert_proportional(counts_R: NDArray[np.int64], weights_R: NDArray[np.float64]) -> None:
    """Pearson's statistic lies within five deviations of its mean."""
    drawn = weights_R > 0
    expected_R = weights_R[drawn] / weights_R.sum() * counts_R.sum()
    assert not counts_R[~drawn].any()
    statistic = ((counts_R[drawn] - expected_R) ** 2 / expected_R).sum()
    freedom = len(expected_R) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


class TestNegatives:
    @pytest.mark.parametrize("protocol", SAMPLED)
    def test_depend_on_the_seed_alone(self, protocol):
        """Whatever else has drawn before: every model is ranked against the same ones."""
        case = Case()
        np.random.default_rng().random(3)
        torch.rand(3)
        np.testing.assert_array_equal(case.negatives(protocol), case.negatives(protocol))
        other = draw_negatives(
            protocol, case.weights_R, case.targets_B, case.histories, N_DRAWN, seed=8
        )
        assert (case.negatives(protocol) != other).any()

    @pytest.mark.parametrize("protocol", SAMPLED)
    def test_are_known_items_other_than_the_target_each_once(self, protocol):
        case = Case()
        negatives_BN = case.negatives(protocol)
        assert negatives_BN.shape == (N_REQUESTS, N_DRAWN)
        assert negatives_BN.dtype == np.int64
        for target, row in zip(case.targets_B, negatives_BN, strict=True):
            drawn = row[row != PADDING_ROW].tolist()
            assert len(set(drawn)) == len(drawn)
            assert min(drawn) >= FIRST_ROW
            assert target not in drawn

    @pytest.mark.parametrize("protocol", ["pop100_history_excluded", "uni100"])
    def test_hold_nothing_of_the_history_and_are_as_many_as_asked(self, protocol):
        case = Case()
        negatives_BN = case.negatives(protocol)
        assert (negatives_BN >= FIRST_ROW).all()
        for history, row in zip(case.histories, negatives_BN, strict=True):
            assert not set(history.tolist()) & set(row.tolist())

    def test_pop100_may_hold_the_history(self):
        """RecBole's excludes the target only."""
        case = Case()
        drawn = zip(case.histories, case.negatives("pop100"), strict=True)
        assert any(set(history.tolist()) & set(row.tolist()) - {0, 1} for history, row in drawn)

    def test_pop100_counts_an_item_that_is_drawn_twice_once(self):
        """Of 50 draws of three items beside the target, three are left."""
        weights_R = np.array([0, 0, 5, 5, 5, 5])
        negatives_BN = draw_negatives("pop100", weights_R, np.array([3]), [NOTHING], 50, seed=1)
        assert Counter(negatives_BN[0].tolist()) == {0: 47, 2: 1, 4: 1, 5: 1}

    def test_pop100_is_drawn_by_popularity(self):
        """One draw for each of many requests, so that no duplicate is lost."""
        weights_R = np.array([0, 0, 1, 2, 4, 8, 16, 0])
        targets_B = np.full(20_000, 6)
        negatives_BN = draw_negatives(
            "pop100", weights_R, targets_B, [NOTHING] * len(targets_B), 1, seed=3
        )
        counts_R = np.bincount(negatives_BN[:, 0], minlength=8)
        assert_proportional(counts_R, np.array([0, 0, 1, 2, 4, 8, 0, 0.0]))

    def test_pop100_history_excluded_is_drawn_by_popularity_of_what_is_left(self):
        """The second of two is drawn in proportion to what the first has left."""
        weights_R = np.array([0, 0, 1, 2, 4, 8, 16, 0])
        targets_B, histories = np.full(8_000, 6), [np.array([5, 5, UNKNOWN_ROW])] * 8_000

        def drawn(n: int) -> NDArray[np.int64]:
            negatives_BN = draw_negatives(
                "pop100_history_excluded", weights_R, targets_B, histories, n, seed=3
            )
            return np.bincount(negatives_BN.ravel(), minlength=8)

        assert_proportional(drawn(1), np.array([0, 0, 1, 2, 4, 0, 0, 0.0]))
        share = {2: 1 / 7, 3: 2 / 7, 4: 4 / 7}
        for row, p in share.items():
            expected = p + sum(q * p / (1 - q) for other, q in share.items() if other != row)
            assert drawn(2)[row] / 8_000 == pytest.approx(expected, abs=0.02)

    def test_uni100_is_drawn_evenly_whatever_is_popular(self):
        weights_R = np.array([0, 0, 1, 2, 4, 800, 16, 5])
        targets_B, histories = np.full(8_000, 6), [np.array([2])] * 8_000
        negatives_BN = draw_negatives("uni100", weights_R, targets_B, histories, 1, seed=3)
        counts_R = np.bincount(negatives_BN[:, 0], minlength=8)
        assert_proportional(counts_R, np.array([0, 0, 0, 1, 1, 1, 0, 1.0]))

    @pytest.mark.parametrize("protocol", ["pop100_history_excluded", "uni100"])
    def test_where_too_few_are_left_the_rest_is_0(self, protocol):
        weights_R = np.array([0, 0, 1, 2, 4, 8])
        (row,) = draw_negatives(protocol, weights_R, np.array([2]), [np.array([3])], 6, seed=1)
        assert sorted(row.tolist()) == [0, 0, 0, 0, 4, 5]

    @pytest.mark.parametrize("protocol", SAMPLED)
    def test_a_target_without_rivals_has_none(self, protocol):
        weights_R = np.array([0, 0, 7])
        (row,) = draw_negatives(protocol, weights_R, np.array([2]), [NOTHING], 4, seed=1)
        assert row.tolist() == [0, 0, 0, 0]

    @pytest.mark.parametrize("protocol", SAMPLED)
    def test_no_targets_have_none(self, protocol):
        drawn = draw_negatives(protocol, np.array([0, 0, 7, 3]), NOTHING, [], 4, seed=1)
        assert drawn.shape == (0, 4)


def test_every_protocol_is_known_by_its_name():
    assert set(SAMPLED) < set(PROTOCOLS)
    assert {p for p in PROTOCOLS if p not in SAMPLED} == {"full", "full_history_included"}
