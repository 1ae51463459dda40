"""GRU4Rec: the state after each behavior, met with the items' own table."""

import pytest
import torch
from torch import Tensor

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
from training.models.gru4rec import GRU4Rec

layers = pytest.mark.parametrize("n_layers", [1, 2])


def gru4rec(n_layers: int = 1) -> GRU4Rec:
    model = GRU4Rec(
        ItemEncoder(N_ROWS, 6),
        SPEC,
        embedding_dim=6,
        hidden_units=8,
        n_layers=n_layers,
        dropout=0.3,
    )
    with_large_weights(model)
    return model


def literal_states(model: GRU4Rec, behaviors: list[int]) -> Tensor:
    """Return the user vectors of a history of known length, gate by gate: [behaviors, D]."""
    inputs = [model.items.items.weight[row] for row in behaviors]
    for n in range(model.gru.num_layers):
        of_input = getattr(model.gru, f"weight_ih_l{n}").split(8)
        of_state = getattr(model.gru, f"weight_hh_l{n}").split(8)
        h, states = torch.zeros(8), []
        for x in inputs:
            r = torch.sigmoid(of_input[0] @ x + of_state[0] @ h)
            z = torch.sigmoid(of_input[1] @ x + of_state[1] @ h)
            candidate = torch.tanh(of_input[2] @ x + r * (of_state[2] @ h))
            h = (1 - z) * candidate + z * h
            states.append(h)
        inputs = states
    return torch.stack([model.output.weight @ h + model.output.bias for h in inputs])


@layers
def test_vectors_are_those_of_the_equations_step_by_step(n_layers):
    model = gru4rec(n_layers)
    items, buckets = histories(model, SPEC, [12, 5, 1])
    vectors = model.encode(items, buckets)
    for b, length in enumerate([12, 5, 1]):
        expected = literal_states(model, items[b, -length:].tolist())
        torch.testing.assert_close(vectors[b, -length:], expected, rtol=1e-5, atol=1e-6)


def test_candidates_are_met_with_the_items_of_the_history():
    model = gru4rec()
    items, buckets = histories(model, SPEC, [12, 5])
    candidates = torch.tensor([[3, 1], [7, 19]])
    vectors = [literal_states(model, row[row > 0].tolist())[-1] for row in items]
    expected = [
        torch.stack([model.items.items.weight[one] @ vector for one in ones])
        for vector, ones in zip(vectors, candidates, strict=True)
    ]
    torch.testing.assert_close(model(items, buckets, candidates), torch.stack(expected))


def test_padding_leaves_the_state_at_exactly_zero():
    model = gru4rec(n_layers=2)
    items, buckets = histories(model, SPEC, [5])
    of_padding = model.encode(items, buckets)[0, :7]
    assert torch.equal(of_padding, model.output.bias.expand(7, -1))


@layers
def test_the_rules_of_next_item_models_hold(n_layers):
    model = gru4rec(n_layers)
    assert_padding_changes_nothing(model)
    assert_company_changes_nothing(model)
    assert_empty_history_is_finite(model)
    assert_causal(model)
    assert_last_equals_encode(model)


def test_every_parameter_learns():
    assert_every_parameter_learns(gru4rec(n_layers=2))


def test_the_graph_has_one_recurrent_operator_a_layer(tmp_path):
    graph = assert_exports(gru4rec(n_layers=2), SPEC, tmp_path)
    operators = [node.op_type for node in graph.node]
    assert operators.count("GRU") == 2
    assert not {"Loop", "Scan", "If"} & set(operators)
