"""Product keys: the best few of n x n experts, found among 2 n keys (Lample et al., "Large Memory
Layers with Product Keys", 2019).

Shapes: Q queries, D query width, E = D / 2, N keys a side, K experts retrieved for a query, V width
of an expert.
"""

import torch
from torch import Tensor, nn

from training.models.encoder import embedding_table


class ProductKeys(nn.Module):
    """A memory of N * N experts of which each query retrieves K, as tokens of their own.

    The key of expert i N + j is the pair of sub-keys (i, j), and its score the sum of what the two
    halves of the query score them with. So the best K of all N * N pairs are among the K * K pairs
    of the best K of each side (section 3.1 of the paper), which costs N and not N * N.

    Each token is its expert weighted by the softmax of the K scores: indices carry no gradient,
    these weights do, and they are all that the query and the sub-keys learn from. Whatever reads
    the tokens must therefore not normalise their length away.

    The query is normalised by a layer norm. The paper's batch norm would let rows of a batch see
    each other, and padding with them.
    """

    def __init__(self, width: int, *, keys_per_side: int, n_experts: int, value_width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"a query is split in two halves: its width must be even, got {width}")
        if not 1 <= n_experts <= keys_per_side:
            raise ValueError(
                f"each side of {keys_per_side} keys must hold the experts to retrieve, "
                f"got {n_experts}"
            )
        self.keys_per_side, self.n_experts = keys_per_side, n_experts
        self.query = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        # One half of the query in each of the two products: keys stand as columns.
        bound = (width // 2) ** -0.5
        self.sub_keys = nn.Parameter(
            torch.empty(2, width // 2, keys_per_side).uniform_(-bound, bound)
        )
        self.values = embedding_table(keys_per_side**2, value_width)

    def forward(self, query_QD: Tensor) -> Tensor:
        """Return the retrieved experts [Q, K, V], the best first.

        Their weights add up to K: on average a token has the length of its expert.
        """
        scores_QK, experts_QK = self.choose(query_QD)
        weights_QK = torch.softmax(scores_QK, dim=1, dtype=torch.float32) * self.n_experts
        tokens_QKV: Tensor = self.values(experts_QK) * weights_QK.unsqueeze(2)
        return tokens_QKV

    def choose(self, query_QD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores [Q, K] of the best K of all experts, falling, and their numbers in
        0 .. N * N - 1, int64 [Q, K].
        """
        halves_2QE = torch.unflatten(self.query(query_QD), 1, (2, -1)).transpose(0, 1)
        scores_2QN = torch.matmul(halves_2QE, self.sub_keys)
        best_2QK, keys_2QK = torch.topk(scores_2QN, self.n_experts, dim=2)
        sums_QKK = best_2QK[0].unsqueeze(2) + best_2QK[1].unsqueeze(1)
        experts_QKK = keys_2QK[0].unsqueeze(2) * self.keys_per_side + keys_2QK[1].unsqueeze(1)
        scores_QK, pairs_QK = torch.topk(sums_QKK.flatten(1), self.n_experts, dim=1)
        return scores_QK, torch.gather(experts_QKK.flatten(1), 1, pairs_QK)
