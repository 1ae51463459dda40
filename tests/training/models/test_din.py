"""DIN: attention whose first layer is rearranged, and what every click model keeps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.models.click_checks import (
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_order_of_candidates_is_free,
    assert_padding_changes_nothing,
)
from tests.training.models.inputs import N_ROWS, SPEC, inputs
from training.models.din import DIN, Dice, Head, TargetAttention
from training.models.encoder import ItemEncoder

VARIANTS: dict[str, dict[str, Any]] = {
    "softmax, relu": {},
    "raw weights, dice": {"normalise": False, "activation": "dice"},
    "softmax, prelu": {"activation": "prelu"},
}
variants = pytest.mark.parametrize("name", VARIANTS)


def din(**changes: Any) -> DIN:
    """An untrained DIN with weights large enough that every term of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields: dict[str, Any] = {
            "embedding_dim": 6,
            "attention_units": (5, 3),
            "head_units": (8, 4),
        }
        model = DIN(ItemEncoder(N_ROWS, 6), SPEC, **(fields | changes))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.items.items.weight[0].zero_()
    return model.eval()


def literal_scores(attention: TargetAttention, e: Tensor, v: Tensor) -> Tensor:
    """Return the MLP's outputs [B, C, L] of [e, v, e - v, e * v], 4D wide."""
    e, v = torch.broadcast_tensors(e.unsqueeze(1), v.unsqueeze(2))
    hidden = torch.sigmoid(attention.hidden(torch.cat([e, v, e - v, e * v], dim=-1)))
    scores: Tensor = attention.layers(hidden).squeeze(-1)
    return scores


def literal_din(model: DIN, batch: list[Tensor]) -> Tensor:
    """Return the logits [B, C], one candidate of one history at a time; the head has ReLU."""
    items, buckets, candidates = batch
    encoded = model.history(model.items, items, buckets)
    rows = []
    for b in range(len(items)):
        e = encoded[b][items[b] != 0]
        logits = []
        for candidate in candidates[b]:
            v = model.items(candidate)
            user, mean = torch.zeros_like(v), torch.zeros_like(v)
            if len(e):
                weights = literal_scores(model.attention, e[None], v[None, None])[0, 0]
                if model.attention.normalise:
                    weights = weights.exp() / weights.exp().sum()
                user = sum(w * one for w, one in zip(weights, e, strict=True))
                mean = e.mean(dim=0)
            x = torch.cat([user, v, mean, mean * v])
            for layer in model.head.layers:
                x = torch.relu(layer(x))
            logits.append(model.head.output(x))
        rows.append(torch.cat(logits))
    return torch.stack(rows)


@pytest.mark.parametrize("normalise", [True, False], ids=["softmax", "raw weights"])
def test_the_rearranged_model_is_the_literal_one(normalise):
    model = din(normalise=normalise).double()
    batch = inputs([12, 0, 1, 7])
    torch.testing.assert_close(model(*batch), literal_din(model, batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalise", [True, False], ids=["softmax", "raw weights"])
def test_so_are_its_gradients(normalise):
    model = din(normalise=normalise).double()
    batch = inputs([12, 0, 5])
    found = torch.autograd.grad(model(*batch).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(
        literal_din(model, batch).square().sum(), list(model.parameters())
    )
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)


def test_attention_of_one_unit_by_hand():
    """D = H = 1, e = 2, v = 5: W1 [2, 5, -3, 10], then W2, as the weight is without a softmax."""
    attention = TargetAttention(1, (1,), normalise=False)
    output = attention.layers[0]
    assert isinstance(output, nn.Linear)
    with torch.no_grad():
        attention.hidden.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
        attention.hidden.bias.fill_(-4.0)
        output.weight.fill_(2.0)
        output.bias.fill_(-1.0)
    hidden = 1 / (1 + math.exp(-(0.2 + 1.0 - 0.9 + 4.0 - 4.0)))
    e, v = torch.tensor([[[2.0]]]), torch.tensor([[[5.0]]])
    found = attention(e, v, torch.tensor([[True]])).item()
    assert found == pytest.approx(2 * hidden - 1)


def test_normalised_weights_add_up_to_one_over_behaviors_and_to_nothing_without():
    model = din()
    items, buckets, candidates = inputs([12, 3, 0])
    history = model.history(model.items, items, buckets)
    weights = model.attention(history, model.items(candidates), items != 0)
    assert not weights[(items == 0).unsqueeze(1).expand_as(weights)].any()
    expected = torch.tensor([1.0, 1.0, 0.0]).unsqueeze(1).expand(3, 5)
    torch.testing.assert_close(weights.sum(dim=2), expected)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_no_tensor_over_the_sequence_is_wider_than_the_first_layer():
    """Forward and backward: 4 hidden units, where the literal features are 64 wide."""
    n_rows, n_candidates, length, width, units = 2, 3, 50, 16, 4
    attention = TargetAttention(width, (units, 2))
    history = torch.randn(n_rows, length, width, requires_grad=True)
    target = torch.randn(n_rows, n_candidates, width, requires_grad=True)
    is_behavior = torch.ones(n_rows, length, dtype=torch.bool)
    with Largest() as rearranged:
        attention(history, target, is_behavior).sum().backward()
    with Largest() as literal:
        literal_scores(attention, history, target)
    assert literal.elements == n_rows * n_candidates * length * 4 * width
    widest = max(units * n_candidates, width + 1)
    assert rearranged.elements <= n_rows * length * widest


@variants
def test_the_rules_of_click_models_hold(name):
    model = din(**VARIANTS[name])
    assert_padding_changes_nothing(model)
    assert_company_changes_nothing(model)
    assert_order_of_candidates_is_free(model)
    assert_empty_history_is_finite(model)


@variants
def test_every_parameter_learns(name):
    assert_every_parameter_learns(din(**VARIANTS[name]))


@pytest.mark.parametrize("name", ["raw weights, dice", "softmax, prelu"])
def test_the_graph_is_the_model(name, tmp_path):
    assert_exports(din(**VARIANTS[name]), tmp_path)


def test_dice_of_a_batch_is_gated_by_batch_norm():
    """In training the gate is torch's own batch norm without scale and shift."""
    generator = torch.Generator().manual_seed(0)
    x, alpha = torch.randn(7, 3, generator=generator), torch.tensor([0.0, 0.5, -1.0])
    dice = Dice(3)
    with torch.no_grad():
        dice.alpha.copy_(alpha)
    p = torch.sigmoid(functional.batch_norm(x, None, None, training=True, eps=1e-9))
    found = dice(x, torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(found, p * x + (1 - p) * alpha * x)
    torch.testing.assert_close(dice.running_mean, 0.01 * x.mean(dim=0))
    torch.testing.assert_close(dice.running_variance, 0.99 + 0.01 * x.var(dim=0, correction=0))


def test_dice_of_served_rows_is_gated_by_the_running_averages():
    """x = 3 of mean 1 and variance 4 stands one deviation above: p = sigmoid(1)."""
    dice = Dice(1).eval()
    dice.running_mean.fill_(1.0)
    dice.running_variance.fill_(4.0)
    found = dice(torch.tensor([[3.0], [100.0]]), torch.tensor([True, True]))
    assert found[0].item() == pytest.approx(3 / (1 + math.exp(-1)))
    assert dice.running_mean.item() == 1.0


def test_candidates_that_fill_up_a_training_batch_enter_no_statistics():
    """Two wide rows, of which one has a single candidate, are as the three candidates alone."""
    heads = []
    for _ in range(2):
        torch.manual_seed(0)
        heads.append(Head(4, (6,), "dice").train())
    features = torch.randn(2, 2, 4)
    candidates = torch.tensor([[5, 7], [9, 0]])
    filled = heads[0](features, candidates)
    alone = heads[1](features.flatten(0, 1)[None, :3], torch.tensor([[5, 7, 9]]))
    torch.testing.assert_close(filled.flatten()[:3], alone[0])
    for one, other in zip(heads[0].buffers(), heads[1].buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_without_candidates_leaves_finite_statistics():
    head = Head(4, (6,), "dice").train()
    assert head(torch.randn(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)).isfinite().all()
    assert all(buffer.isfinite().all() for buffer in head.buffers())
