"""LinRec: the linear form is the quadratic one, and the rules of next-item models hold."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from contract.features import FeatureSpec
from tests.training.models import next_item_checks as checks
from tests.training.models.next_item_checks import N_ROWS, SPEC
from training.models.encoder import ItemEncoder
from training.models.linrec import (
    LinearAttention,
    LinRec,
    LinRecBlock,
    linear_attention,
    prefix_attention,
)
from training.models.next_item import NextItemModel

WIDTH = 6
# More than three chunks of the causal form.
LONG = FeatureSpec(history_length=100)
both_forms = pytest.mark.parametrize("causal", [False, True], ids=["published", "causal"])


def linrec(spec=SPEC, *, n_layers=2, n_heads=2, causal=False) -> NextItemModel:
    """Return a small LinRec with weights that make every term matter."""
    return checks.with_large_weights(
        LinRec(
            ItemEncoder(N_ROWS, WIDTH),
            spec,
            embedding_dim=WIDTH,
            n_layers=n_layers,
            n_heads=n_heads,
            ffn_units=8,
            dropout=0.3,
            causal=causal,
        )
    )


def queries_keys_values(length: int) -> list[Tensor]:
    """Return three random tensors [B, H, L, E]."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 100])
@both_forms
def test_the_linear_form_is_the_quadratic_one(causal, length):
    """In values and in gradients."""
    q, k, v = inputs = queries_keys_values(length)
    found = prefix_attention(q, k, v) if causal else linear_attention(q, k, v)
    weights = q @ k.transpose(2, 3)
    expected = (weights.tril() if causal else weights) @ v
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@both_forms
def test_memory_grows_with_the_length_not_its_square(causal):
    """What the backward pass keeps, in all and for each position."""

    def kept(length: int) -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            attention(torch.zeros(1, length, 16), torch.ones(1, length, dtype=torch.bool))
        return sum(sizes)

    attention = LinearAttention(16, 1, causal=causal)
    assert kept(4096) < 4.1 * kept(1024)
    assert kept(4096) < 4096 * 16 * 50


@both_forms
def test_attention_is_that_of_the_equations(causal):
    """One head, query and key at a time; padding is no key."""
    torch.manual_seed(0)
    attention = LinearAttention(WIDTH, 2, causal=causal).double()
    x = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    valid = torch.tensor([[False, False, True, True, True]])
    query, key_value, output = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in (attention.query, attention.key_value, attention.output)
    )
    rows = x[0].numpy()
    q = [query[0] @ row + query[1] for row in rows]
    k, v = zip(*(np.split(key_value[0] @ row + key_value[1], 2) for row in rows), strict=True)
    expected = []
    for i in range(5):
        heads = [
            sum(
                (unit_elu(q[i][head]) @ unit_elu(k[j][head]) * v[j][head] / np.sqrt(3))
                for j in range(2, i + 1 if causal else 5)
            )
            + np.zeros(3)
            for head in (slice(0, 3), slice(3, 6))
        ]
        expected.append(output[0] @ np.concatenate(heads) + output[1])
    np.testing.assert_allclose(attention(x, valid)[0].detach().numpy(), expected, rtol=1e-9)


def unit_elu(x):
    y = np.where(x > 0, x, np.exp(x) - 1)
    return y / np.linalg.norm(y)


def test_a_row_of_zeros_has_no_direction_but_is_finite():
    attention = LinearAttention(WIDTH, 2, causal=False)
    torch.nn.init.zeros_(attention.query.bias)
    torch.nn.init.zeros_(attention.key_value.bias)
    x = torch.zeros(1, 3, WIDTH, requires_grad=True)
    met = attention(x, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(met, attention.output.bias.expand_as(met))
    met.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_block_is_post_norm():
    """LN(x + attention), then LN(y + feed-forward)."""
    model = linrec()
    assert isinstance(model, LinRec)
    block = model.blocks[0]
    assert isinstance(block, LinRecBlock)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 5, dtype=torch.bool)
    y = block.attention_norm(x + block.attention(x, valid))
    first, last = block.feed_forward.layers[0], block.feed_forward.layers[-1]
    z = block.feed_forward_norm(y + last(functional.gelu(first(y))))
    torch.testing.assert_close(block(x, valid), z)


def test_the_input_is_item_and_position_normalised():
    model = linrec()
    assert isinstance(model, LinRec)
    items, buckets = checks.histories(model, SPEC, [3], width=3)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.encode(items, buckets)
    summed = model.items(items) + model.positions.weight[-3:]
    torch.testing.assert_close(seen[0], model.norm(summed))


@both_forms
def test_padding_changes_nothing(causal):
    checks.assert_padding_changes_nothing(linrec(causal=causal))
    checks.assert_padding_changes_nothing(linrec(LONG, causal=causal), LONG)


@both_forms
def test_the_company_changes_nothing(causal):
    checks.assert_company_changes_nothing(linrec(causal=causal))


@both_forms
def test_an_empty_history_is_finite(causal):
    checks.assert_empty_history_is_finite(linrec(causal=causal))


@pytest.mark.parametrize("n_layers", [1, 3])
@both_forms
def test_the_last_vector_is_that_of_all(causal, n_layers):
    checks.assert_last_equals_encode(linrec(causal=causal, n_layers=n_layers))
    checks.assert_last_equals_encode(linrec(LONG, causal=causal, n_layers=n_layers), LONG)


def test_the_causal_form_is_causal():
    checks.assert_causal(linrec(causal=True))
    checks.assert_causal(linrec(LONG, causal=True), LONG)


def test_the_published_form_is_not():
    model = linrec()
    checks.assert_not_causal(model)
    assert not model.learns_whole_rows


@both_forms
def test_every_parameter_learns(causal):
    checks.assert_every_parameter_learns(linrec(causal=causal))


def test_the_published_form_exports(tmp_path):
    checks.assert_exports(linrec(), SPEC, tmp_path)


def test_the_causal_form_exports(tmp_path):
    checks.assert_exports(linrec(LONG, causal=True), LONG, tmp_path)


def test_heads_must_share_the_width():
    with pytest.raises(ValueError, match="a width of 6 cannot be shared by 4 heads"):
        linrec(n_heads=4)
