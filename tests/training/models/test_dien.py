"""DIEN: both recurrences step by step, the auxiliary loss, and what every click model keeps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.models.click_checks import (
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_order_of_candidates_is_free,
    assert_padding_changes_nothing,
    operators,
)
from tests.training.models.inputs import N_ROWS, SPEC, inputs
from training.models.dien import AUGRU, DIEN
from training.models.encoder import ItemEncoder

WIDTH, STATE = 6, 4
conventions = pytest.mark.parametrize("augru", ["paper", "code"])


def dien(**changes: Any) -> DIEN:
    """An untrained DIEN with weights large enough that every term of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields: dict[str, Any] = {
            "embedding_dim": WIDTH,
            "hidden_units": STATE,
            "attention_units": (5, 3),
            "head_units": (8,),
        }
        model = DIEN(ItemEncoder(N_ROWS, WIDTH), SPEC, **(fields | changes))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.items.items.weight[0].zero_()
    return model.eval()


@pytest.fixture(params=["paper", "code"])
def model(request) -> DIEN:
    return dien(augru=request.param)


def literal_states(model: DIEN, e: Tensor) -> list[Tensor]:
    """Return h_1 .. h_T of the behaviors [T, D]: equations 2-5, gate by gate."""
    of_input, of_state = model.gru.all_weights[0]
    w_r, w_z, w_n = of_input.chunk(3)
    u_r, u_z, u_n = of_state.chunk(3)
    h, states = e.new_zeros(STATE), []
    for x in e:
        r = torch.sigmoid(w_r[:, :-1] @ x + u_r @ h + w_r[:, -1])
        u = 1 - torch.sigmoid(w_z[:, :-1] @ x + u_z @ h + w_z[:, -1])
        n = torch.tanh(w_n[:, :-1] @ x + r * (u_n @ h) + w_n[:, -1])
        h = (1 - u) * h + u * n
        states.append(h)
    return states


def literal_attention(model: DIEN, states: list[Tensor], v: Tensor) -> Tensor:
    """Return a_1 .. a_T of one candidate [D]."""
    dense, prelu = model.query
    assert isinstance(prelu, nn.PReLU)
    q = dense(v)
    q = torch.where(q > 0, q, prelu.weight * q)
    scores = []
    for h in states:
        hidden = torch.sigmoid(model.attention.hidden(torch.cat([h, q, h - q, h * q])))
        scores.append(model.attention.layers(hidden))
    return torch.softmax(torch.cat(scores), dim=0)


def literal_evolution(augru: AUGRU, inputs: list[Tensor], attention: Tensor) -> Tensor:
    """Return the last state [H] of one candidate, as the paper and the code write it."""
    w_r, w_u, w_n = augru.inputs.weight.chunk(3)
    b_r, b_u, b_n = augru.inputs.bias.chunk(3)
    h = attention.new_zeros(augru.reset.in_features)
    for x, a in zip(inputs, attention, strict=True):
        r = torch.sigmoid(w_r @ x + augru.reset.weight @ h + b_r)
        new = w_u @ x + augru.update.weight @ h + b_u
        n = torch.tanh(w_n @ x + r * (augru.candidate.weight @ h) + b_n)
        if augru.convention == "paper":
            u = a * torch.sigmoid(new)
            h = (1 - u) * h + u * n
        else:
            u = (1 - a) * torch.sigmoid(-new)  # TensorFlow's update gate keeps the state
            h = u * h + (1 - u) * n
    return h


def literal_dien(model: DIEN, batch: list[Tensor]) -> Tensor:
    """Return the logits [B, C], one candidate of one history at a time."""
    items, buckets, candidates = batch
    encoded = model.history(model.items, items, buckets)
    rows = []
    for b in range(len(items)):
        e = encoded[b][items[b] != 0]
        states = literal_states(model, e)
        logits = []
        for candidate in candidates[b]:
            v = model.items(candidate)
            user, mean = v.new_zeros(STATE), torch.zeros_like(v)
            if len(e):
                attention = literal_attention(model, states, v)
                user = literal_evolution(model.evolution, states, attention)
                mean = e.mean(dim=0)
            x = torch.cat([user, v, mean, mean * v])
            for layer in model.head.layers:
                x = torch.relu(layer(x))
            logits.append(model.head.output(x))
        rows.append(torch.cat(logits))
    return torch.stack(rows)


def test_logits_are_those_of_the_equations_step_by_step(model):
    batch = inputs([12, 0, 1, 7], n_candidates=3)
    model = model.double()
    torch.testing.assert_close(model(*batch), literal_dien(model, batch), rtol=1e-10, atol=1e-12)


@conventions
def test_one_step_of_one_unit_by_hand(augru):
    """From h_1 on, all weights 1 and x = 0: u = sigmoid(h_1), n = tanh(sigmoid(h_1) h_1)."""
    cell = AUGRU(1, 1, augru)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.fill_(1.0)
        cell.inputs.bias.zero_()
    a, zero = torch.tensor([[[0.25]]]), torch.zeros(1, 1, 1)
    found = cell.step(torch.tensor([[[0.5]]]), (zero, zero, zero, a, torch.ones(1, 1, 1)))
    u = 1 / (1 + math.exp(-0.5))
    n = math.tanh(u * 0.5)
    kept = 1 - 0.25 * u if augru == "paper" else (1 - 0.25) * (1 - u)
    assert found.item() == pytest.approx(kept * 0.5 + (1 - kept) * n)


def test_only_in_the_code_does_what_gets_no_attention_change_the_state():
    ones, attention = torch.ones(1, 1, 2), torch.zeros(1, 1, 1)
    before = torch.full((1, 1, 2), 0.5)
    now = (ones, ones, ones, attention, torch.ones(1, 1, 1))
    torch.manual_seed(0)
    assert torch.equal(AUGRU(2, 2, "paper").step(before, now), before)
    assert not torch.isclose(AUGRU(2, 2, "code").step(before, now), before).any()


def test_the_history_is_read_once_and_not_for_every_candidate(model):
    rows = []
    for module in (model.gru, model.evolution.inputs):
        module.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
    model(*inputs([12, 3], n_candidates=5))
    assert rows == [2, 2]


def test_padding_leaves_both_states_at_exactly_zero(model):
    items, buckets, candidates = inputs([5, 0])
    states = []
    model.gru.register_forward_hook(lambda _, __, output: states.append(output[0]))
    model.evolution.register_forward_hook(lambda _, __, output: states.append(output))
    model(items, buckets, candidates)
    interests, evolved = states
    assert not interests[items == 0].any()
    assert interests[items != 0].any()
    assert not evolved[1].any()
    assert evolved[0].any()


def test_the_rules_of_click_models_hold(model):
    assert_padding_changes_nothing(model)
    assert_company_changes_nothing(model)
    assert_order_of_candidates_is_free(model)
    assert_empty_history_is_finite(model)


def test_states_are_as_wide_as_embeddings_unless_said():
    assert dien(hidden_units=None).gru.hidden_size == WIDTH


def test_the_auxiliary_loss_is_that_of_equation_7_step_by_step(model):
    items, buckets, _ = inputs([12, 0, 1, 4])
    negatives, _, _ = inputs([12] * 4, seed=1)  # of padding too: they must not count
    model = model.double()
    of_items = model.history(model.items, items, buckets)
    of_negatives = model.history(model.items, negatives, buckets)
    terms = []
    for b, length in enumerate([12, 0, 1, 4]):
        states = literal_states(model, of_items[b, 12 - length :])
        for t in range(length - 1):
            at = 12 - length + t + 1
            positive = model.auxiliary(torch.cat([states[t], of_items[b, at]]))
            negative = model.auxiliary(torch.cat([states[t], of_negatives[b, at]]))
            terms.append(-torch.sigmoid(positive).log() - (1 - torch.sigmoid(negative)).log())
    assert len(terms) == 11 + 3
    found = model.auxiliary_loss(items, buckets, negatives)
    torch.testing.assert_close(found, torch.cat(terms).mean(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("lengths", "width"), [([0, 1], 12), ([1, 1], 1)], ids=["short", "L = 1"])
def test_the_auxiliary_loss_of_histories_without_a_next_step_is_zero(model, lengths, width):
    items, buckets, _ = inputs(lengths, length=width)
    assert model.auxiliary_loss(items, buckets, items).item() == 0


def test_a_model_without_an_auxiliary_network_has_no_such_loss():
    model = dien(auxiliary=False)
    assert not [name for name, _ in model.named_parameters() if "auxiliary" in name]
    items, buckets, _ = inputs([3])
    with pytest.raises(ValueError, match="without an auxiliary network"):
        model.auxiliary_loss(items, buckets, items)


def test_every_parameter_learns(model):
    def loss(items: Tensor, buckets: Tensor, candidates: Tensor) -> Tensor:
        squares = model(items, buckets, candidates).square().sum()
        total: Tensor = squares + model.auxiliary_loss(items, buckets, items.flip(1))
        return total

    assert_every_parameter_learns(model, loss)


def test_without_the_auxiliary_loss_its_network_is_all_that_does_not_learn(model):
    model.train()(*inputs([12] * 8)).square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert idle == {f"auxiliary.{n}.{part}" for n in (0, 2, 4) for part in ("weight", "bias")}


def test_the_graph_is_the_model_with_one_operator_a_recurrence(model, tmp_path):
    """The history that is exported has five steps: none of them stands in the graph by itself."""
    found = operators(assert_exports(model, tmp_path))
    assert found.count("GRU") == 1
    assert found.count("Scan") == 1
    assert not {"Loop", "If", "Tanh"} & set(found)
