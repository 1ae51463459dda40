"""Rows in chunks that are counted from their right end, where the newest behaviors stand.

Shapes: B rows, L values of a row; M chunks of a row, W values of a chunk.
"""

import torch
from torch import Tensor


def in_chunks(values_BL: Tensor, chunk: int) -> Tensor:
    """Return [B, M, W] of W = `chunk` values each, counted from the right end, after a chunk of
    nothing; 0 fills what the row does not.

    >>> in_chunks(torch.tensor([[1, 2, 3, 4]]), 3).tolist()
    [[[0, 0, 0], [0, 0, 1], [2, 3, 4]]]
    """
    # The chunk of nothing makes M at least 2: torch exports no axis that may be 1 or more. Nor does
    # it see that M divides 3 * M where M is a sum: so ceil(L / W) + 1 is written as one quotient.
    length = values_BL.shape[1]
    n_chunks = (length + 2 * chunk - 1) // chunk
    chunks_M = torch.arange(n_chunks, device=values_BL.device) - n_chunks
    within_W = torch.arange(chunk, device=values_BL.device)
    places_MW = chunks_M.unsqueeze(1) * chunk + within_W + length
    return values_BL[:, places_MW.clamp(min=0)] * (places_MW >= 0)


def one_chunk_later(x_BM: Tensor) -> Tensor:
    """Return [B, M, ...]: at each chunk what the one before it had; 0 at the first."""
    return torch.cat([torch.zeros_like(x_BM[:, :1]), x_BM], dim=1)[:, :-1]
