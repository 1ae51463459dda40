"""Embeddings that the models share: items, time buckets, positions.

Shapes: B requests, C candidates, L history length, D embedding width, G time granularities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contract.catalogue import FIRST_ROW, PADDING_ROW
from contract.features import FeatureSpec

# Of embeddings that start small: of times and positions, and of the items of next-item models,
# whose target is found by the direction of its vector; short ones turn quickly.
EMBEDDING_STD = 0.02


class _ItemFeature(nn.Module):
    """One embedding for each value of a feature of items, exactly 0 for items without a value."""

    of_row: Tensor

    def __init__(self, of_row: Tensor, embedding_dim: int) -> None:
        super().__init__()
        self.values = embedding_table(int(of_row.max()) + 1, embedding_dim, padding_idx=0)
        self.register_buffer("of_row", of_row)

    def forward(self, rows: Tensor) -> Tensor:
        """Return embeddings [..., D] of the values that catalogue rows [...] have."""
        embedded: Tensor = self.values(self.of_row[rows])
        return embedded


class ItemEncoder(nn.Module):
    """Item embedding, plus the embeddings of the item's features, such as category or brand.

    `features_of_row`: of each feature int64 [n_rows], the feature's row of each catalogue row, 0
    for none, as padding and the unknown item have. They stand in the graph, so that a request sends
    item ids only. `std`: of the embeddings of items at the start, instead of that of
    `embedding_table`. Raises ValueError when a feature does not fit the catalogue.
    """

    def __init__(
        self,
        n_rows: int,
        embedding_dim: int,
        features_of_row: Sequence[Tensor] = (),
        *,
        std: float | None = None,
    ) -> None:
        super().__init__()
        self.items = embedding_table(n_rows, embedding_dim, padding_idx=PADDING_ROW, std=std)
        for of_row in features_of_row:
            if of_row.shape != (n_rows,):
                raise ValueError(
                    f"features_of_row must have one entry for each of {n_rows} rows, "
                    f"got shape {tuple(of_row.shape)}"
                )
            if of_row[:FIRST_ROW].any():
                raise ValueError(
                    "features_of_row must be 0 for padding and the unknown item, "
                    f"got {of_row[:FIRST_ROW].tolist()}"
                )
        self.features = nn.ModuleList(_ItemFeature(one, embedding_dim) for one in features_of_row)

    def forward(self, rows: Tensor) -> Tensor:
        """Return embeddings [..., D] of catalogue rows [...]; exactly 0 for padding."""
        embedded: Tensor = self.items(rows)
        for feature in self.features:
            embedded = embedded + feature(rows)
        return embedded

    def table(self) -> Tensor:
        """Return the embeddings [rows, D] of the whole catalogue."""
        embedded: Tensor = self.items.weight
        for feature in self.features:
            embedded = embedded + feature(torch.arange(len(embedded), device=embedded.device))
        return embedded


class HistoryEncoder(nn.Module):
    """e_j = item + time buckets + position of behavior j, exactly 0 for padding (IMN, section 3.1).

    The items' table belongs to the caller, which embeds the candidates with it too. Granularities
    on a linear scale have no table and are not looked at.
    """

    def __init__(self, spec: FeatureSpec, embedding_dim: int) -> None:
        super().__init__()
        self.history_length = spec.history_length
        # Rows oldest first: a shorter history takes the last ones, so that a behavior keeps its
        # position however long the row is that it stands in. Positions and times start small:
        # behaviors of about one age share their time's embedding, which would be most of what a
        # sum over them holds, and tells nobody apart.
        self.positions = embedding_table(spec.history_length, embedding_dim, std=EMBEDDING_STD)
        self.scales = [g for g, one in enumerate(spec.granularities) if one.scale == "doubling"]
        self.buckets = nn.ModuleList(
            embedding_table(spec.granularities[g].n_buckets, embedding_dim, std=EMBEDDING_STD)
            for g in self.scales
        )

    def forward(
        self, items: ItemEncoder, history_items_BL: Tensor, history_buckets_BLG: Tensor
    ) -> Tensor:
        """Return the encoded history [B, L, D]."""
        length = history_items_BL.shape[1]
        positions_L = torch.arange(length, device=history_items_BL.device) + (
            self.history_length - length
        )
        encoded_BLD: Tensor = items(history_items_BL) + self.positions(positions_L)
        for g, table in zip(self.scales, self.buckets, strict=True):
            encoded_BLD = encoded_BLD + table(history_buckets_BLG[:, :, g])
        return encoded_BLD * (history_items_BL != PADDING_ROW).unsqueeze(-1)


def embedding_table(
    n_rows: int,
    embedding_dim: int,
    padding_idx: int | None = None,
    *,
    std: float | None = None,
) -> nn.Embedding:
    """Return a table of vectors of length about 1, or of normal numbers of deviation `std`;
    exactly 0 at `padding_idx`.
    """
    table = nn.Embedding(n_rows, embedding_dim, padding_idx=padding_idx)
    # Products of two embeddings then start large enough to be learned from.
    nn.init.normal_(table.weight, std=embedding_dim**-0.5 if std is None else std)
    if padding_idx is not None:
        with torch.no_grad():
            table.weight[padding_idx].zero_()
    return table
