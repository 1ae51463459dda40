"""Recurrences that stand in a graph as operators of ONNX, whatever the history's length.

Shapes: B rows, C candidates, L steps, I inputs, H hidden units.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from exporter.errors import ExportError
from training.models.dien import AUGRU, Steps


@contextmanager
def recurrences_as_operators() -> Iterator[None]:
    """Let `nn.GRU`, while a graph is captured, be ONNX's operator of that name, one for each layer,
    and `AUGRU`, which ONNX does not know, its operator `Scan`.

    Left to itself, torch 2.13 captures a GRU as a loop whose states have the length of the example;
    a second layer, or whatever else meets them, then fixes L for the whole graph. The steps of an
    AUGRU would all stand in the graph, as many as the example has.
    """
    forward, run = nn.GRU.forward, AUGRU.run
    nn.GRU.forward = _gru  # type: ignore[assignment, method-assign]
    AUGRU.run = _augru  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.GRU.forward = forward  # type: ignore[method-assign]
        AUGRU.run = run  # type: ignore[method-assign]


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


def _augru(augru: AUGRU, state_BCH: Tensor, steps: Steps) -> Tensor:
    """Return the state [B, C, H] after all steps."""

    def step(before_BCH: Tensor, now: Steps) -> tuple[Tensor, tuple[()]]:
        return augru.step(before_BCH, now), ()

    last_BCH: Tensor
    last_BCH, _ = scan(step, state_BCH, steps)
    return last_BCH


def _gates(weights: Tensor) -> Tensor:
    """Return torch's gates r, z, n in ONNX's order z, r, n, with an axis for the direction."""
    r, z, n = weights.chunk(3)
    return torch.cat([z, r, n]).unsqueeze(0)
