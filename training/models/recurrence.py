"""Recurrences that torch has no operator for.

Shapes: L steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

Tensors = tuple[Tensor, ...]


def recur(
    step: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]], state: Tensors, inputs: Tensors
) -> tuple[Tensors, Tensors]:
    """Return the last state, and what the steps told, [L, ...] each.

    `step`: of a state and the inputs of one step to the next state and what it tells. `inputs`:
    [L, ...] each. In a graph this is one operator, whatever the length.
    """
    if torch.compiler.is_exporting():
        return scan(step, state, inputs)
    told = []
    for of_step in zip(*(one.unbind() for one in inputs), strict=True):
        state, one = step(state, of_step)
        told.append(one)
    return state, tuple(torch.stack(ones) for ones in zip(*told, strict=True))
