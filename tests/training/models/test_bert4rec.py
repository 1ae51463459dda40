"""BERT4Rec: hidden places of a row, filled in from both sides."""

import pytest
import torch
from torch import Tensor, nn

from contract.catalogue import FIRST_ROW, UNKNOWN_ROW
from tests.training.models.literal_transformer import torch_layer
from tests.training.models.next_item_checks import (
    N_ROWS,
    SPEC,
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_last_equals_encode,
    assert_not_causal,
    assert_padding_changes_nothing,
    histories,
    with_large_weights,
)
from training.models.attention import TransformerBlock
from training.models.bert4rec import LAST_ONLY_RATE, BERT4Rec
from training.models.encoder import ItemEncoder
from training.models.next_item import NO_TARGET

WIDTH, LENGTH = 8, SPEC.history_length


def bert4rec(mask_rate: float = 0.3) -> BERT4Rec:
    model = BERT4Rec(
        ItemEncoder(N_ROWS, WIDTH),
        SPEC,
        embedding_dim=WIDTH,
        n_layers=2,
        n_heads=2,
        ffn_units=12,
        dropout=0.2,
        mask_rate=mask_rate,
    )
    with_large_weights(model)
    return model


def literal_vectors(model: BERT4Rec, row: list[int | None], *, n_after: int = 0) -> Tensor:
    """Return the user vectors of one row without padding, [places, D + 1]; None is a mask.

    `n_after`: empty places between the row and its end.
    """
    items = [model.mask if one is None else model.items.items.weight[one] for one in row]
    end = LENGTH + 1 - n_after
    x = torch.stack(items) + model.positions.weight[end - len(row) : end]
    x = nn.functional.layer_norm(x, (WIDTH,), model.norm.weight, model.norm.bias).unsqueeze(0)
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        x = torch_layer(block, "post")(x)
    dense, _, norm = model.head
    assert isinstance(dense, nn.Linear)
    assert isinstance(norm, nn.LayerNorm)
    x = nn.functional.gelu(x[0] @ dense.weight.T + dense.bias)
    x = nn.functional.layer_norm(x, (WIDTH,), norm.weight, norm.bias)
    return torch.cat([x, torch.ones(len(row), 1)], dim=1)


def batch_of(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training inputs whose items tell their places: 2 .. 13 from the left, then 14."""
    is_behavior = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths).unsqueeze(1)
    items = torch.arange(FIRST_ROW, FIRST_ROW + LENGTH) * is_behavior
    targets = torch.where(is_behavior, items + 1, NO_TARGET)
    buckets = torch.zeros(*items.shape, 3, dtype=torch.int64)
    return items, buckets, targets, torch.zeros(len(lengths), dtype=torch.int64)


def assert_pairs_are_those_of_masked_rows(model: BERT4Rec, whole: list[int], pairs) -> None:
    """`whole`: the places of one row up to its end, 0 where there is nothing."""
    vectors, rows, _ = pairs
    hidden = rows.tolist()
    assert hidden
    start = next(place for place, row in enumerate(whole) if row)
    n_after = 0 if whole[-1] else 1
    row = whole[start : LENGTH + 1 - n_after]
    expected = literal_vectors(
        model, [None if one in hidden else one for one in row], n_after=n_after
    )
    torch.testing.assert_close(
        vectors, expected[[row.index(one) for one in hidden]], rtol=1e-4, atol=1e-5
    )


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_vectors_are_those_of_torchs_own_layers_with_the_mask_at_the_end():
    model = bert4rec()
    items, buckets = histories(model, SPEC, [12, 5, 1, 0])
    vectors = model.encode_last(items, buckets)
    for b, length in enumerate([12, 5, 1, 0]):
        row = [*items[b, LENGTH - length :].tolist(), None]
        expected = literal_vectors(model, row)[-1]
        torch.testing.assert_close(vectors[b], expected, rtol=1e-4, atol=1e-5)


def test_a_score_is_the_product_with_the_items_embedding_plus_its_bias():
    model = bert4rec()
    items, buckets = histories(model, SPEC, [12, 5])
    candidates = torch.tensor([[3, 1], [7, 19]])
    vectors = model.encode_last(items, buckets)[:, :-1]
    expected = [
        torch.stack([model.items.items.weight[one] @ vector + model.item_bias[one] for one in ones])
        for vector, ones in zip(vectors, candidates, strict=True)
    ]
    torch.testing.assert_close(model(items, buckets, candidates), torch.stack(expected))
    torch.testing.assert_close(model.item_table()[candidates], model.item_vectors(candidates))


@pytest.mark.parametrize("length", [12, 5, 1])
def test_training_learns_what_it_hides_from_what_it_shows(length):
    model = bert4rec()
    batch = batch_of([length])
    whole = [*batch[0][0].tolist(), FIRST_ROW + LENGTH]
    for _ in range(5):
        assert_pairs_are_those_of_masked_rows(model, whole, model.training_pairs(*batch))


def test_a_last_place_without_a_target_is_padding():
    model = bert4rec()
    items, buckets, targets, users = batch_of([6])
    targets[0, -1] = NO_TARGET
    pairs = model.training_pairs(items, buckets, targets, users)
    assert_pairs_are_those_of_masked_rows(model, [*items[0].tolist(), 0], pairs)


def test_rows_learn_from_their_own_targets_only():
    model = bert4rec()
    batch = batch_of([12, 5, 12, 0, 1])
    batch[2][2] = NO_TARGET  # as in a row that only fills up another process' share
    vectors, rows, origins = model.training_pairs(*batch)
    assert len(vectors) == len(rows) == len(origins)
    assert set(origins.tolist()) == {0, 1, 4}
    assert set(rows[origins == 1].tolist()) <= set(range(10, 15))
    assert rows[origins == 4].tolist() == [14]


def test_a_batch_without_targets_is_no_error():
    items, buckets, targets, users = batch_of([12, 0])
    vectors, rows, origins = bert4rec().training_pairs(
        items, buckets, torch.full_like(targets, NO_TARGET), users
    )
    assert vectors.shape == (0, WIDTH + 1)
    assert rows.shape == origins.shape == (0,)


def test_unknown_items_are_never_learned():
    items, buckets, targets, users = batch_of([12] * 50)
    items[:, 4], targets[:, 3] = UNKNOWN_ROW, NO_TARGET  # what was 6 is nobody's target
    _, rows, _ = bert4rec(mask_rate=0.9).training_pairs(items, buckets, targets, users)
    # 2 is the first behavior, and nobody's target either.
    assert set(rows.tolist()) == set(range(3, 15)) - {6}


def test_an_item_shown_as_unknown_is_learned_as_what_it_is():
    items, buckets, targets, users = batch_of([12] * 50)
    items[:, 7] = UNKNOWN_ROW  # targets still say that it is 9
    _, rows, _ = bert4rec(mask_rate=0.9).training_pairs(items, buckets, targets, users)
    assert set(rows.tolist()) == set(range(3, 15))


def test_the_share_of_hidden_targets_is_the_rate_but_for_rows_that_hide_the_last():
    model = bert4rec(mask_rate=0.3)
    assert model.target_share == 0.3
    assert model.learns_whole_rows
    _, rows, _ = model.training_pairs(*batch_of([12] * 2000))
    at_least_one = 0.7**LENGTH / LENGTH
    expected = (1 - LAST_ONLY_RATE) * (0.3 + at_least_one) + LAST_ONLY_RATE / LENGTH
    assert len(rows) / (2000 * LENGTH) == pytest.approx(expected, abs=0.01)


def test_every_row_hides_something_and_some_hide_the_last_as_serving_does():
    model = bert4rec(mask_rate=1e-9)
    batch = batch_of([12] * 2000)
    vectors, rows, origins = model.training_pairs(*batch)
    assert torch.equal(origins, torch.arange(2000))
    is_last = rows == FIRST_ROW + LENGTH
    share = LAST_ONLY_RATE + (1 - LAST_ONLY_RATE) / LENGTH
    assert is_last.float().mean().item() == pytest.approx(share, abs=0.03)
    served = model.encode_last(batch[0][:1], batch[1][:1])
    expected = served.expand(int(is_last.sum()), -1)
    torch.testing.assert_close(vectors[is_last], expected, rtol=1e-5, atol=1e-5)


def test_the_rules_of_next_item_models_hold():
    model = bert4rec()
    assert_padding_changes_nothing(model)
    assert_company_changes_nothing(model)
    assert_empty_history_is_finite(model)
    assert_not_causal(model)
    assert_last_equals_encode(model)


def test_every_parameter_learns():
    assert_every_parameter_learns(bert4rec())


def test_the_graph_is_the_model(tmp_path):
    assert_exports(bert4rec(), SPEC, tmp_path)
