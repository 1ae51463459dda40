"""Transformer blocks as torch itself has them, to compare with."""

import torch
from torch import nn

from training.models.attention import Norm, TransformerBlock


def torch_layer(block: TransformerBlock, norm: Norm) -> nn.TransformerEncoderLayer:
    """Return torch's own layer with the weights of a block with GELU, in evaluation mode.

    `norm`: what the block is expected to do, not what it says it does.
    """
    attention, first = block.attention, block.feed_forward.layers[0]
    assert isinstance(first, nn.Linear)
    layer = nn.TransformerEncoderLayer(
        first.in_features,
        attention.n_heads,
        dim_feedforward=first.out_features,
        activation="gelu",
        batch_first=True,
        norm_first=norm == "pre",
    )
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat(
                [attention.query.weight, attention.key_value.weight]
            ),
            "self_attn.in_proj_bias": torch.cat([attention.query.bias, attention.key_value.bias]),
            "self_attn.out_proj.weight": attention.output.weight,
            "self_attn.out_proj.bias": attention.output.bias,
            "linear1.weight": block.feed_forward.layers[0].weight,
            "linear1.bias": block.feed_forward.layers[0].bias,
            "linear2.weight": block.feed_forward.layers[-1].weight,
            "linear2.bias": block.feed_forward.layers[-1].bias,
            "norm1.weight": block.attention_norm.weight,
            "norm1.bias": block.attention_norm.bias,
            "norm2.weight": block.feed_forward_norm.weight,
            "norm2.bias": block.feed_forward_norm.bias,
        }
    )
    return layer.eval()
