"""Item popularity: the baseline that every personal model must pass."""

import torch
from torch import Tensor, nn


class Popularity(nn.Module):
    """score = log(1 + number of behaviors on the item in the training part of the log).

    `counts`: [n_rows], behaviors of each catalogue row. Nothing is learned; the score is an
    affinity.
    """

    log_counts: Tensor

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.register_buffer("log_counts", torch.log1p(counts.float()))

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return scores [B, C] of candidate rows [B, C]; the history is not looked at."""
        del history_items, history_buckets
        return self.log_counts[candidate_items]
