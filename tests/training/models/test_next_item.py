"""What next-item models share: pairs to learn, scores by dot product, ages and their buckets.

Shapes: B requests, C candidates, L history length, D embedding width, G time granularities.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contract.buckets import time_buckets
from contract.catalogue import UNKNOWN_ROW
from contract.features import AGE_SECONDS, DAYS, HOURS, FeatureSpec
from exporter.convert import convert
from exporter.parity import open_session
from tests.training.models.next_item_checks import (
    assert_causal,
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_last_equals_encode,
    assert_padding_changes_nothing,
    histories,
)
from training.errors import ConfigError
from training.models.encoder import ItemEncoder
from training.models.next_item import (
    NO_TARGET,
    UNKNOWN_USER,
    AgeInput,
    NextItemModel,
    doubling_buckets,
    valid_positions,
)

SPEC = FeatureSpec(history_length=12, granularities=(HOURS, DAYS, AGE_SECONDS))


class LastItem(NextItemModel):
    """The vector at a position is that of its item and of the user."""

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__(ItemEncoder(20, 4))
        self.causal = causal
        self.users = nn.Embedding(5, 4, padding_idx=UNKNOWN_USER)

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        del history_buckets
        vectors: Tensor = self.items(history_items)
        return vectors if users is None else vectors + self.users(users).unsqueeze(1)

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        return self.encode(history_items[:, -1:], history_buckets, users)[:, -1]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return items, buckets, targets and users of three rows, the last without a target."""
    items = torch.tensor([[0, 0, 3, 4], [5, 6, UNKNOWN_ROW, 8], [0, 9, 10, 11]])
    targets = torch.tensor([[0, 0, 4, 5], [6, 0, 8, 9], [0, 0, 0, 0]])
    return items, torch.zeros(3, 4, 3, dtype=torch.int64), targets, torch.tensor([1, 2, 3])


class TestTrainingPairs:
    def test_every_position_with_a_target_is_learned(self):
        model = LastItem()
        items, buckets, targets, users = batch()
        vectors, rows, origins = model.training_pairs(items, buckets, targets, users)
        assert rows.tolist() == [4, 5, 6, 8, 9]
        assert origins.tolist() == [0, 0, 1, 1, 1]
        at = [(0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
        encoded = model.encode(items, buckets, users)
        torch.testing.assert_close(vectors, torch.stack([encoded[b, i] for b, i in at]))

    def test_of_a_model_that_looks_ahead_only_the_last_position_is(self):
        model = LastItem(causal=False)
        assert not model.learns_whole_rows
        items, buckets, targets, users = batch()
        vectors, rows, origins = model.training_pairs(items, buckets, targets, users)
        assert rows.tolist() == [5, 9]
        assert origins.tolist() == [0, 1]
        torch.testing.assert_close(vectors, model.encode_last(items, buckets, users)[:2])

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "looks ahead"])
    def test_without_a_target_there_is_nothing_but_still_a_gradient(self, causal):
        """Processes that share a step must all take part in it."""
        model = LastItem(causal=causal)
        items, buckets, targets, users = batch()
        vectors, rows, origins = model.training_pairs(
            items, buckets, torch.full_like(targets, NO_TARGET), users
        )
        assert vectors.shape == (0, 4)
        assert rows.shape == origins.shape == (0,)
        vectors.sum().backward()
        for parameter in (model.items.items.weight, model.users.weight):
            assert parameter.grad is not None
            assert not parameter.grad.any()

    def test_targets_are_all_learned_unless_a_model_says_otherwise(self):
        assert LastItem().target_share == 1


class TestScores:
    def test_are_products_with_the_candidates_vectors(self):
        model = LastItem()
        items, buckets, _, _ = batch()
        candidates = torch.tensor([[2, 3], [4, 4], [19, 1]])
        scores = model(items, buckets, candidates)
        table = model.item_table()
        for b in range(3):
            for c in range(2):
                expected = table[items[b, -1]] @ table[candidates[b, c]]
                torch.testing.assert_close(scores[b, c], expected)

    def test_the_table_holds_the_vectors_of_every_row(self):
        model = LastItem()
        torch.testing.assert_close(model.item_table(), model.item_vectors(torch.arange(20)))

    def test_users_are_unknown_where_candidates_are_scored(self):
        model = LastItem()
        items, buckets, _, _ = batch()
        unknown = torch.full((3,), UNKNOWN_USER)
        vectors = model.encode_last(items, buckets, unknown)
        scores = model(items, buckets, torch.arange(20).expand(3, 20))
        torch.testing.assert_close(scores, vectors @ model.item_table().T)


class SumOfAll(LastItem):
    """Breaks every rule: sees what comes after, and how wide its row is."""

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        vectors = super().encode(history_items, history_buckets, users)
        width = history_items.shape[1]
        of_rest = vectors.sum(dim=(0, 1)) + width
        return vectors + of_rest


def test_the_checks_of_models_find_a_model_that_breaks_them():
    good, bad = LastItem().eval(), SumOfAll().eval()
    for check in (
        assert_padding_changes_nothing,
        assert_company_changes_nothing,
        assert_causal,
        assert_last_equals_encode,
    ):
        check(good, SPEC)
        with pytest.raises(AssertionError):
            check(bad, SPEC)
    assert_empty_history_is_finite(good, SPEC)


class TestAges:
    def test_stand_where_the_first_linear_granularity_does(self):
        assert AgeInput.of(SPEC, "a model").index == 2
        first = FeatureSpec(granularities=(AGE_SECONDS, HOURS))
        assert AgeInput.of(first, "a model").index == 0

    def test_without_a_linear_granularity_a_run_is_refused(self):
        with pytest.raises(
            ConfigError,
            match=r"features\.granularities: a model needs one with scale = 'linear', "
            r"got \['hours', 'days'\]",
        ):
            AgeInput.of(FeatureSpec(), "a model")

    def test_the_next_age_is_that_of_the_behavior_after_and_now_is_0(self):
        buckets = torch.tensor([[[1, 1, 900], [1, 1, 500], [0, 0, 20]]])
        ages = AgeInput(index=2)
        assert ages.ages(buckets).tolist() == [[900, 500, 20]]
        assert ages.next_ages(buckets).tolist() == [[500, 20, 0]]
        assert ages.next_ages(buckets[:, -1:]).tolist() == [[0]]


def at_powers_of_two() -> list[int]:
    """Return every power up to 2^32 with its neighbours, and what lies between."""
    powers = [1 << k for k in range(33)]
    edges = {power + near for power in powers for near in (-1, 0, 1)}
    between = np.random.default_rng(1).integers(0, 1 << 33, 500).tolist()
    return sorted(edges | set(between))


class TestDoublingBuckets:
    @pytest.mark.parametrize("n_buckets", [64, 22, 1], ids=lambda n: f"{n} buckets")
    def test_are_the_buckets_that_serving_makes(self, n_buckets):
        elapsed = np.array(at_powers_of_two(), dtype=np.int64)
        found = doubling_buckets(torch.from_numpy(elapsed), n_buckets)
        assert found.dtype == torch.int64
        assert found.tolist() == time_buckets(elapsed, 1, n_buckets).tolist()

    def test_keep_their_shape(self):
        found = doubling_buckets(torch.tensor([[[0, 1, 2]], [[3, 4, 7]]]), 8)
        assert found.tolist() == [[[0, 1, 2]], [[2, 3, 3]]]

    def test_are_the_same_in_an_exported_graph(self, tmp_path: Path):
        class Bucketed(nn.Module):
            """Scores that are the buckets of the candidates."""

            def forward(self, items: Tensor, buckets: Tensor, candidates: Tensor) -> Tensor:
                nothing = items.sum(dim=1, keepdim=True) * 0 + buckets.sum(dim=(1, 2)).unsqueeze(1)
                return doubling_buckets(candidates + nothing, 64).float()

        convert(Bucketed(), SPEC, tmp_path / "model.onnx")
        elapsed = np.array(at_powers_of_two(), dtype=np.int64)
        (scores,) = open_session(tmp_path / "model.onnx").run(
            None,
            {
                "history_items": np.ones((1, 12), dtype=np.int64),
                "history_buckets": np.zeros((1, 12, 3), dtype=np.int64),
                "candidate_items": elapsed[None],
            },
        )
        assert scores[0].tolist() == time_buckets(elapsed, 1, 64).tolist()


def test_what_is_no_padding_is_a_behavior_the_unknown_item_too():
    items, _ = histories(LastItem(), SPEC, [2, 0], width=3)
    items[0, -1] = UNKNOWN_ROW
    assert valid_positions(items).tolist() == [[False, True, True], [False] * 3]
