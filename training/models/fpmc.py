"""FPMC: what a user likes, plus what follows the last item (Rendle et al., "Factorizing
personalized Markov chains for next-basket recommendation", 2010).

Shapes: B requests, L history length, D embedding width; user and item vectors are 2D wide.
"""

from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.models.encoder import ItemEncoder, embedding_table
from training.models.next_item import UNKNOWN_USER, NextItemModel, valid_positions

UserFactor = Literal["table", "history"]


class FPMC(NextItemModel):
    """score(u, l, i) = <UI_u, IU_i> + <IL_i, LI_l>: user u, last item l, next item i.

    The paper's model for baskets of one item; its third product, of user and last item, is the same
    for all candidates and drops out there too. IU is the table of `items`.

    `user_factor`: "table" learns one UI for each of `n_users`, and 0 stands for an unknown one;
    "history" is the mean of factors of the user's items instead, so that nobody is unknown.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        user_factor: UserFactor = "history",
        n_users: int = 0,
    ) -> None:
        super().__init__(items)
        del spec  # neither time nor place of a behavior counts, except for being the last
        n_rows = items.items.num_embeddings
        self.after = embedding_table(n_rows, embedding_dim, padding_idx=PADDING_ROW)  # IL
        self.last = embedding_table(n_rows, embedding_dim, padding_idx=PADDING_ROW)  # LI
        self.users: nn.Embedding | None = None
        self.past: nn.Embedding | None = None
        match user_factor:
            case "table":
                self.users = embedding_table(n_users + 1, embedding_dim, padding_idx=UNKNOWN_USER)
            case "history":
                self.past = embedding_table(n_rows, embedding_dim, padding_idx=PADDING_ROW)
            case _:
                assert_never(user_factor)

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [UI_u, LI_l], [B, L, 2D]; the last item is the position's own."""
        del history_buckets
        last_BLD: Tensor = self.last(history_items)
        if self.past is not None:
            n_past_BL = valid_positions(history_items).cumsum(dim=1).clamp(min=1)
            user_BLD = self.past(history_items).cumsum(dim=1) / n_past_BL.unsqueeze(-1)
        else:
            user_BLD = self._known(users, last_BLD[:, -1]).unsqueeze(1).expand_as(last_BLD)
        return torch.cat([user_BLD, last_BLD], dim=-1)

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [UI_u, LI_l], [B, 2D]."""
        del history_buckets
        last_BD: Tensor = self.last(history_items[:, -1])
        if self.past is not None:
            n_past_B1 = valid_positions(history_items).sum(dim=1, keepdim=True).clamp(min=1)
            user_BD = self.past(history_items).sum(dim=1) / n_past_B1
        else:
            user_BD = self._known(users, last_BD)
        return torch.cat([user_BD, last_BD], dim=-1)

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Return item vectors [IU_i, IL_i], [..., 2D]."""
        return torch.cat([self.items(rows), self.after(rows)], dim=-1)

    def item_table(self) -> Tensor:
        """Return the item vectors [rows, 2D] of the whole catalogue."""
        return torch.cat([self.items.table(), self.after.weight], dim=-1)

    def _known(self, users_B: Tensor | None, like_BD: Tensor) -> Tensor:
        # Without users the table is not touched: an exported graph need not hold it.
        if self.users is None or users_B is None:
            return torch.zeros_like(like_BD)
        user_BD: Tensor = self.users(users_B)
        return user_BD
