"""Recurrences that stand in a graph as operators of ONNX, whatever the history's length.

Shapes: B rows, L steps, I inputs, H hidden units.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from exporter.errors import ExportError


@contextmanager
def recurrences_as_operators() -> Iterator[None]:
    """Let `nn.GRU`, while a graph is captured, be ONNX's operator of that name, one for each layer.

    Left to itself, torch 2.13 captures a GRU as a loop whose states have the length of the example;
    a second layer, or whatever else meets them, then fixes L for the whole graph. Recurrences that
    ONNX does not know are its operator `Scan` by themselves (`training.models.recurrence`).
    """
    forward = nn.GRU.forward
    nn.GRU.forward = _gru  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.GRU.forward = forward  # type: ignore[method-assign]


def _gru(gru: nn.GRU, inputs_BLI: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the states [B, L, H] of the last layer and the last ones [layers, B, H] of all."""
    if gru.bidirectional or not gru.batch_first or state is not None:
        raise ExportError("only a GRU of one direction, batch first, from a state of 0 is exported")
    x_LBI = inputs_BLI.transpose(0, 1)
    length, n_rows, _ = x_LBI.shape
    last = []
    for n in range(gru.num_layers):
        weights = [_gates(getattr(gru, f"weight_{part}_l{n}")) for part in ("ih", "hh")]
        if gru.bias:
            biases = [_gates(getattr(gru, f"bias_{part}_l{n}")) for part in ("ih", "hh")]
            weights.append(torch.cat(biases, dim=1))
        states_L1BH, last_1BH = torch.onnx.ops.symbolic_multi_out(
            "GRU",
            (x_LBI, *weights),
            {"hidden_size": gru.hidden_size, "linear_before_reset": 1},
            dtypes=(x_LBI.dtype, x_LBI.dtype),
            shapes=((length, 1, n_rows, gru.hidden_size), (1, n_rows, gru.hidden_size)),
        )
        x_LBI = states_L1BH.squeeze(1)
        last.append(last_1BH)
    return x_LBI.transpose(0, 1), torch.cat(last)


def _gates(weights: Tensor) -> Tensor:
    """Return torch's gates r, z, n in ONNX's order z, r, n, with an axis for the direction."""
    r, z, n = weights.chunk(3)
    return torch.cat([z, r, n]).unsqueeze(0)
