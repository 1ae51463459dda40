"""IMN: the rearranged model is the literal one, and keeps the contract's promises."""

import math

import pytest
import torch

from tests.training.models.click_checks import (
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_order_of_candidates_is_free,
    assert_padding_changes_nothing,
)
from tests.training.models.inputs import N_ROWS, SPEC, imn, inputs
from tests.training.models.literal_imn import LiteralIMN, literal_weights
from training.models.encoder import ItemEncoder
from training.models.imn import IterativeMemoryNetwork, MultiWayAttention, with_ones


@pytest.mark.parametrize("enhancement_steps", [0, 3], ids=["3P", "3P+"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 6])
def test_the_rearranged_model_is_the_literal_one(iterations, enhancement_steps):
    model = imn(iterations, enhancement_steps).double()
    batch = inputs([12, 0, 1, 7])
    torch.testing.assert_close(model(*batch), LiteralIMN(model)(*batch), rtol=1e-10, atol=1e-12)


def test_so_are_its_gradients():
    model = imn().double()
    batch = inputs([12, 0, 5])
    found = torch.autograd.grad(model(*batch).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(
        LiteralIMN(model)(*batch).square().sum(), list(model.parameters())
    )
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "none"},
        {"attention": "dot"},
        {"weights": "softmax"},
        {"attention": "dot", "weights": "softmax"},
        {"distance": False},
        {"walk": "target"},
        {"cross": "delayed"},
        {"segment": 5},
        {"weights": "softmax", "walk": "target", "segment": 4},
    ],
    ids=str,
)
def test_the_literal_one_refuses_a_model_with_ablations(settings):
    """It would compute another model with the same weights, and not say so."""
    model = IterativeMemoryNetwork(
        ItemEncoder(N_ROWS, 6),
        SPEC,
        embedding_dim=6,
        iterations=2,
        enhancement_steps=0,
        attention_units=4,
        head_units=(8,),
        **settings,
    )
    with pytest.raises(ValueError, match=f"without ablations; .* another {', '.join(settings)}$"):
        LiteralIMN(model)


def test_attention_of_one_unit_by_hand():
    """D = H = 1, e = 2, m = 3, v = 5: W1 [-1, -3, 6, 10] = 0.1*-1 + 0.2*-3 + 0.3*6 + 0.4*10."""
    attention = MultiWayAttention(1, 1)
    with torch.no_grad():
        attention.hidden.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
        attention.hidden.bias.fill_(0.5)
        attention.output.weight.fill_(2.0)
        attention.output.bias.fill_(-1.0)
    hidden = 1 / (1 + math.exp(-(-0.1 - 0.6 + 1.8 + 4.0 + 0.5)))
    expected = 1 / (1 + math.exp(-(2 * hidden - 1)))
    e, m, v = torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]]), torch.tensor([[[5.0]]])
    assert attention(with_ones(e, torch.ones(1, 1)), m, v).item() == pytest.approx(expected)
    assert literal_weights(attention, e, m, v).item() == pytest.approx(expected)


def test_the_rules_of_click_models_hold():
    model = imn()
    assert_padding_changes_nothing(model)
    assert_company_changes_nothing(model)
    assert_order_of_candidates_is_free(model)
    assert_empty_history_is_finite(model)


def test_every_parameter_learns():
    assert_every_parameter_learns(imn())


def test_the_graph_is_the_model(tmp_path):
    assert_exports(imn(iterations=1, enhancement_steps=1), tmp_path)


def test_what_stands_in_padded_buckets_does_not_matter():
    model = imn()
    items, buckets, candidates = inputs([3])
    changed = buckets.clone()
    changed[:, :9] = 5
    assert torch.equal(model(items, changed, candidates), model(items, buckets, candidates))


@pytest.mark.parametrize("change", ["items", "buckets", "order"])
def test_every_part_of_the_history_matters(change):
    model = imn()
    items, buckets, candidates = inputs([12])
    before = model(items, buckets, candidates)
    if change == "items":
        items = items.clone()
        items[0, 0] = items[0, 0] % 18 + 1
    elif change == "buckets":
        buckets = (buckets + 1) % 17
    else:
        items, buckets = items.flip(1), buckets.flip(1)
    assert not torch.allclose(model(items, buckets, candidates), before)


def test_later_passes_see_the_memory():
    """Feedback: the second pass' weights must depend on what the first pass read."""
    two, one = imn(iterations=2, enhancement_steps=0), imn(iterations=1, enhancement_steps=0)
    batch = inputs([12])
    assert not torch.allclose(two(*batch), one(*batch))
    seen = []
    two.attentions[1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1:]))
    two(*batch)
    ((memory, target),) = seen
    assert not torch.allclose(memory, target)


def test_a_full_untrained_history_does_not_saturate_the_memory():
    """The weights of L behaviors add up to a few, however long the history is."""
    for length in (10, 1000):
        torch.manual_seed(length)
        attention = MultiWayAttention(8, 8, history_length=length)
        history = torch.randn(1, length, 8, generator=torch.Generator().manual_seed(0)) * 0.1
        target = torch.zeros(1, 1, 8)
        assert (
            1
            < attention(with_ones(history, torch.ones(1, length)), target, target).sum().item()
            < 20
        )
