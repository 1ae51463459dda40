"""Attention and the transformer block against torch's own layers with the same weights.

Shapes: B rows, Q queries, L keys, H heads, D width.
"""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from training.models.attention import (
    MASKED,
    FeedForward,
    MultiHeadAttention,
    Norm,
    TransformerBlock,
    attention_bias,
)

WIDTH, N_HEADS = 8, 2
VALID = torch.tensor([[False, False, True, True, True], [True] * 5, [False] * 5])


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def with_large_weights(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def rows(*, length: int = 5) -> Tensor:
    return torch.randn(3, length, WIDTH)


class TestBias:
    def test_lets_every_query_see_what_is_no_padding(self):
        bias = attention_bias(torch.tensor([[False, True, True]]), causal=False)
        row = [MASKED, 0, 0]
        assert bias.tolist() == [[[row, row, row]]]

    def test_lets_a_causal_query_see_nothing_after_itself(self):
        bias = attention_bias(torch.tensor([[False, True, True]]), causal=True)
        assert bias.tolist() == [[[[MASKED] * 3, [MASKED, 0, MASKED], [MASKED, 0, 0]]]]

    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
    @pytest.mark.parametrize("n_queries", [1, 2, 5])
    def test_of_fewer_queries_is_that_of_the_last_ones(self, causal, n_queries):
        whole = attention_bias(VALID, causal=causal)
        assert whole.shape == (3, 1, 5, 5)
        last = attention_bias(VALID, causal=causal, n_queries=n_queries)
        assert torch.equal(last, whole[:, :, 5 - n_queries :])


def torch_attention(attention: MultiHeadAttention) -> nn.MultiheadAttention:
    """Return torch's own with the same weights."""
    twin = nn.MultiheadAttention(WIDTH, N_HEADS, batch_first=True)
    twin.load_state_dict(
        {
            "in_proj_weight": torch.cat([attention.query.weight, attention.key_value.weight]),
            "in_proj_bias": torch.cat([attention.query.bias, attention.key_value.bias]),
            "out_proj.weight": attention.output.weight,
            "out_proj.bias": attention.output.bias,
        }
    )
    return twin.eval()


class TestAttention:
    def test_is_torchs_own(self):
        attention = MultiHeadAttention(WIDTH, N_HEADS)
        with_large_weights(attention)
        query, memory = rows(length=2), rows()
        expected, _ = torch_attention(attention)(query, memory, memory)
        torch.testing.assert_close(attention(query, memory), expected)

    def test_with_a_bias_for_each_head_too(self):
        attention = MultiHeadAttention(WIDTH, N_HEADS)
        with_large_weights(attention)
        bias, x = torch.randn(3, N_HEADS, 5, 5), rows()
        expected, _ = torch_attention(attention)(x, x, x, attn_mask=bias.flatten(0, 1))
        torch.testing.assert_close(attention(x, x, bias), expected)

    def test_by_hand(self):
        """One head of width 1: scores 1 * 2 and 1 * 4 give weights 1 : e^2 of values 3 and 5."""
        attention = MultiHeadAttention(1, 1)
        with torch.no_grad():
            attention.query.weight.fill_(1)
            attention.key_value.weight.copy_(torch.tensor([[1.0], [1.0]]))
            attention.key_value.bias.copy_(torch.tensor([0.0, 1.0]))
            attention.output.weight.fill_(2)
            attention.output.bias.fill_(0.5)
            attention.query.bias.fill_(0)
        found = attention(torch.ones(1, 1, 1), torch.tensor([[[2.0], [4.0]]]))
        weight = math.exp(2) / (1 + math.exp(2))
        assert found.item() == pytest.approx(2 * (3 * (1 - weight) + 5 * weight) + 0.5)

    def test_what_is_masked_weighs_exactly_nothing(self):
        attention = MultiHeadAttention(WIDTH, N_HEADS)
        with_large_weights(attention)
        query, memory = rows(length=1), rows()
        bias = attention_bias(VALID, causal=False, n_queries=1)[:2]
        other = torch.where(VALID.unsqueeze(2), memory, 100 * rows())
        assert not torch.equal(other[0], memory[0])
        found = attention(query[:2], memory[:2], bias)
        assert torch.equal(attention(query[:2], other[:2], bias), found)

    def test_where_all_is_masked_values_and_gradients_are_finite(self):
        attention = MultiHeadAttention(WIDTH, N_HEADS)
        x = rows().requires_grad_()
        found = attention(x, x, attention_bias(VALID, causal=True))
        assert found.isfinite().all()
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        assert gradient.isfinite().all()

    def test_heads_must_share_the_width(self):
        with pytest.raises(ValueError, match="a width of 8 cannot be shared by 3 heads"):
            MultiHeadAttention(8, 3)


def linears(layer: FeedForward) -> tuple[nn.Linear, nn.Linear]:
    first, _, last = layer.layers
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return first, last


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_feed_forward_is_two_layers_with_an_activation_between(activation):
    layer = FeedForward(3, 5, activation=activation)
    x = torch.randn(2, 4, 3)
    first, last = linears(layer)
    hidden = x @ first.weight.T + first.bias
    expected = {
        "relu": hidden.clamp(min=0),
        # The exact form, not the approximation by tanh.
        "gelu": hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2,
    }[activation]
    torch.testing.assert_close(layer(x), expected @ last.weight.T + last.bias)


def block_of(
    norm: Norm, activation: Literal["relu", "gelu"] = "gelu", dropout: float = 0.0
) -> TransformerBlock:
    block = TransformerBlock(
        WIDTH, n_heads=N_HEADS, ffn_units=12, dropout=dropout, norm=norm, activation=activation
    )
    with_large_weights(block)
    return block


def torch_layer(
    block: TransformerBlock, norm: Norm, activation: Literal["relu", "gelu"]
) -> nn.TransformerEncoderLayer:
    """Return torch's own with the same weights."""
    layer = nn.TransformerEncoderLayer(
        WIDTH,
        N_HEADS,
        dim_feedforward=12,
        activation=activation,
        batch_first=True,
        norm_first=norm == "pre",
    )
    layer.self_attn = torch_attention(block.attention)
    layer.linear1, layer.linear2 = linears(block.feed_forward)
    layer.norm1, layer.norm2 = block.attention_norm, block.feed_forward_norm
    return layer.eval()


norms = pytest.mark.parametrize("norm", ["pre", "post", "query"])


class TestBlock:
    @pytest.mark.parametrize("norm", ["pre", "post"])
    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    def test_is_torchs_own(self, norm, activation):
        block, x = block_of(norm, activation), rows()[:2]
        causal = torch.full((5, 5), -math.inf).triu(1)
        padding = torch.zeros(2, 5).masked_fill(~VALID[:2], -math.inf)
        # Its first queries see nothing at all, of which torch's makes no number.
        seen = VALID[:2]
        with torch.no_grad():
            expected = torch_layer(block, norm, activation)(
                x, src_mask=causal, src_key_padding_mask=padding
            )
            found = block(x, attention_bias(VALID[:2], causal=True))
        torch.testing.assert_close(found[seen], expected[seen])

    def test_normalises_queries_alone_where_that_is_asked_for(self):
        """As in the code of SASRec's authors, with attention by torch's own."""
        block, x = block_of("query"), rows()[1:2]
        with torch.no_grad():
            query = block.attention_norm(x)
            causal = torch.full((5, 5), -math.inf).triu(1)
            met, _ = torch_attention(block.attention)(query, x, x, attn_mask=causal)
            y = block.feed_forward_norm(query + met)
            expected = y + block.feed_forward(y)
            found = block(x, attention_bias(VALID[1:2], causal=True))
        torch.testing.assert_close(found, expected)

    @norms
    def test_of_the_last_position_alone_is_the_last_of_all(self, norm):
        block, x = block_of(norm), rows()
        whole = block(x, attention_bias(VALID, causal=True))
        last = block(x, attention_bias(VALID, causal=True, n_queries=1), last_only=True)
        assert last.shape == (3, 1, WIDTH)
        torch.testing.assert_close(last, whole[:, -1:])

    @norms
    def test_dropout_is_for_both_branches_and_no_residual(self, norm):
        """Were all of them dropped, the input alone would be left."""
        block, x = block_of(norm, dropout=1.0), rows()
        bias = attention_bias(VALID, causal=True)
        expected = x
        if norm != "pre":
            expected = block.feed_forward_norm(block.attention_norm(x))
        torch.testing.assert_close(block.train()(x, bias), expected)
        assert not torch.allclose(block.eval()(x, bias), expected, atol=0.1)
