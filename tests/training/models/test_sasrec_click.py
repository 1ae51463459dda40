"""SASRec as a click model: the last position's vector, met with the target by an MLP."""

import pytest
import torch
from torch.nn import functional

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
from tests.training.models.literal_transformer import torch_layer
from training.models.attention import TransformerBlock
from training.models.encoder import ItemEncoder
from training.models.sasrec_click import SASRecClick

WIDTH = 6
layers = pytest.mark.parametrize("n_layers", [1, 2])


def sasrec(n_layers: int = 1, *, n_heads: int = 1, dropout: float = 0.0) -> SASRecClick:
    """Return a model with weights so large that every term of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SASRecClick(
            ItemEncoder(N_ROWS, WIDTH),
            SPEC,
            embedding_dim=WIDTH,
            n_layers=n_layers,
            n_heads=n_heads,
            ffn_units=WIDTH,
            dropout=dropout,
            head_units=(8,),
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.items.items.weight[0].zero_()
    return model.eval()


@layers
def test_the_user_is_the_last_vector_of_torchs_own_layers(n_layers):
    """Without padding, one request at a time: nothing of this project's masks is needed."""
    model = sasrec(n_layers)
    lengths = [12, 5, 1]
    items, buckets, candidates = inputs(lengths)
    logits = model(items, buckets, candidates)
    for b, length in enumerate(lengths):
        x = model.history(model.items, items[b : b + 1, -length:], buckets[b : b + 1, -length:])
        later = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        for block in model.blocks:
            assert isinstance(block, TransformerBlock)
            layer = torch_layer(block, "pre")
            layer.activation = functional.relu
            x = layer(x, src_mask=later)
        u = x[0, -1]
        for c, row in enumerate(candidates[b]):
            v = model.items(row)
            expected = model.head(torch.cat([u, v, u * v]))
            torch.testing.assert_close(logits[b, c], expected, rtol=1e-5, atol=1e-5)


def test_an_empty_history_is_a_user_of_zeros():
    model = sasrec(2)
    items, buckets, candidates = inputs([0])
    v = model.items(candidates)
    expected = model.head(torch.cat([torch.zeros_like(v), v, torch.zeros_like(v)], dim=-1))
    torch.testing.assert_close(model(items, buckets, candidates), expected)


@layers
def test_the_rules_of_click_models_hold(n_layers):
    model = sasrec(n_layers)
    assert_padding_changes_nothing(model, tolerance=1e-5)
    assert_company_changes_nothing(model, tolerance=1e-5)
    assert_order_of_candidates_is_free(model, tolerance=1e-5)
    assert_empty_history_is_finite(model)


def test_a_request_is_read_once_however_many_candidates_it_has():
    model = sasrec()
    rows = []
    model.blocks[0].register_forward_hook(lambda *call: rows.append(call[2].shape))
    model(*inputs([12, 3], n_candidates=5))
    assert rows == [(2, 1, WIDTH)]


def test_dropout_acts_in_training_only():
    model = sasrec(dropout=0.5)
    batch = inputs([12])
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.equal(model(*batch), model(*batch))


def test_every_parameter_learns():
    assert_every_parameter_learns(sasrec(2))


def test_the_graph_is_the_model(tmp_path):
    found = operators(assert_exports(sasrec(2, n_heads=2), tmp_path))
    assert not {"Loop", "Scan", "If"} & set(found)
