"""FPMC: what the user likes plus what follows the last item."""

import pytest
import torch
from onnx import numpy_helper

from tests.training.models.next_item_checks import (
    N_ROWS,
    SPEC,
    assert_causal,
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_last_equals_encode,
    assert_padding_changes_nothing,
    histories,
    with_large_weights,
)
from training.models.encoder import ItemEncoder
from training.models.fpmc import FPMC, UserFactor

N_USERS = 4

user_factors = pytest.mark.parametrize("user_factor", ["table", "history"])


def fpmc(user_factor: UserFactor) -> FPMC:
    model = FPMC(
        ItemEncoder(N_ROWS, 6), SPEC, embedding_dim=6, user_factor=user_factor, n_users=N_USERS
    )
    with_large_weights(model)
    return model


def literal_score(model: FPMC, user: int, past: list[int], candidate: int) -> float:
    """Return the score number by number, without padding or batches."""
    iu, il, li = model.items.items.weight, model.after.weight, model.last.weight
    score = 0.0
    for d in range(6):
        if model.users is not None:
            ui = model.users.weight[user, d].item() if user else 0.0
        else:
            assert model.past is not None
            ui = sum(model.past.weight[row, d].item() for row in past) / max(1, len(past))
        score += ui * iu[candidate, d].item()
        if past:
            score += il[candidate, d].item() * li[past[-1], d].item()
    return score


@user_factors
def test_scores_are_those_of_the_equation(user_factor):
    model = fpmc(user_factor)
    items, buckets = histories(model, SPEC, [12, 5, 1, 0])
    users = torch.tensor([1, 4, 0, 2])
    scores = model.encode_last(items, buckets, users) @ model.item_table().T
    for b in range(4):
        past = [row for row in items[b].tolist() if row]
        expected = [literal_score(model, int(users[b]), past, row) for row in range(1, N_ROWS)]
        torch.testing.assert_close(scores[b, 1:], torch.tensor(expected), rtol=1e-5, atol=1e-5)


@user_factors
def test_a_position_knows_the_past_up_to_itself(user_factor):
    model = fpmc(user_factor)
    items, buckets = histories(model, SPEC, [9])
    users = torch.tensor([3])
    scores = model.encode(items, buckets, users)[0] @ model.item_table().T
    for i in range(3, 12):
        past = items[0, 3 : i + 1].tolist()
        expected = [literal_score(model, 3, past, row) for row in range(1, N_ROWS)]
        torch.testing.assert_close(scores[i, 1:], torch.tensor(expected), rtol=1e-5, atol=1e-5)


@user_factors
def test_candidates_are_met_with_the_rows_of_the_table(user_factor):
    model = fpmc(user_factor)
    items, buckets = histories(model, SPEC, [12, 5])
    candidates = torch.tensor([[3, 1], [7, 19]])
    scores = model.encode_last(items, buckets) @ model.item_table().T
    torch.testing.assert_close(model(items, buckets, candidates), scores.gather(1, candidates))


def test_users_without_a_row_are_unknown():
    model = fpmc("table")
    items, buckets = histories(model, SPEC, [12, 5])
    unknown = model.encode_last(items, buckets, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(model.encode_last(items, buckets), unknown)
    assert torch.equal(model.encode(items, buckets)[:, -1], unknown)


@user_factors
def test_the_rules_of_next_item_models_hold(user_factor):
    model = fpmc(user_factor)
    assert_padding_changes_nothing(model)
    assert_company_changes_nothing(model)
    assert_empty_history_is_finite(model)
    assert_causal(model)
    assert_last_equals_encode(model)
    assert_last_equals_encode(model, users=torch.tensor([1, 4, 0, 2]))


@user_factors
def test_every_table_learns(user_factor):
    assert_every_parameter_learns(fpmc(user_factor), n_users=N_USERS)


@user_factors
def test_the_graph_is_the_model_without_its_users(user_factor, tmp_path):
    model = fpmc(user_factor)
    graph = assert_exports(model, SPEC, tmp_path)
    assert [N_USERS + 1, 6] not in [
        list(numpy_helper.to_array(tensor).shape) for tensor in graph.initializer
    ]
