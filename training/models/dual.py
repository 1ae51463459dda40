"""Duality: an item is the sequence of its users, as a user is a sequence of items (Huang,
"Revisiting Self-Attentive Sequential Recommendation", section Duality).

A second SASRec reads who chose an item, oldest first, and finds the user who chose it next; what it
makes of all users of an item is that item's rebuilt embedding, to be consistent with the item's
own. It starts from user embeddings of its own, the second of the two ways that the paper names: the
first, user vectors that the model makes of their histories, would encode thousands of histories for
one batch of items. All of it serves training only.

Shapes: I items, L history length, R catalogue rows, U user rows, P choices, D embedding width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from contract.catalogue import FIRST_ROW, PADDING_ROW
from training.errors import TrainingError
from training.losses import NextItemLoss, Targets
from training.models.next_item import NO_TARGET, NextItemModel

StopGradient = Literal["none", "own", "rebuilt"]


class UserSequences:
    """The users of each item, oldest first: the log of the training part, swapped.

    `users_P` from 0, `rows_P`, `times_P`: who chose what when, int64 [P]. Users have rows as items
    have, from FIRST_ROW on; of one moment, the lower row comes first. Raises TrainingError when no
    item was chosen twice: there is no next user then.
    """

    def __init__(
        self, users_P: Tensor, rows_P: Tensor, times_P: Tensor, *, n_users: int, n_rows: int
    ) -> None:
        by_time_P = times_P.argsort(stable=True)
        order_P = by_time_P[rows_P[by_time_P].argsort(stable=True)]
        self._users_P = users_P[order_P] + FIRST_ROW
        n_chosen_R = rows_P.bincount(minlength=n_rows)
        self._ends_R = n_chosen_R.cumsum(0)
        self._starts_R = self._ends_R - n_chosen_R
        self.items = (n_chosen_R >= 2).nonzero()[:, 0]
        """Rows of the items that were chosen twice or more, int64."""
        self.counts_U = self._users_P.bincount(minlength=n_users + FIRST_ROW)
        """Choices of each user row, int64 [U]."""
        if not len(self.items):
            raise TrainingError("no item has two behaviors to learn the next user of an item from")

    def newest(self, rows_I: Tensor, length: int) -> Tensor:
        """Return the newest users of items, int64 [I, L], L <= `length`; 0 pads on the left."""
        starts_I, ends_I = self._starts_R[rows_I], self._ends_R[rows_I]
        length = min(length, int((ends_I - starts_I).max()))
        index_IL = ends_I.unsqueeze(1) + torch.arange(-length, 0)
        users_IL = self._users_P[index_IL.clamp(min=0)]
        return users_IL.masked_fill(index_IL < starts_I.unsqueeze(1), PADDING_ROW)


class DualTask(nn.Module):
    """The next user of an item, and consistency of what its users make of it with its own vector.

    `reader`: a model whose items are users. `user_loss`: of the next user. `user_weight`,
    `consistency_weight`: of the mean of either loss. `stop_gradient`: which side of the consistency
    does not follow the other; "none" lets both move.
    """

    def __init__(
        self,
        reader: NextItemModel,
        sequences: UserSequences,
        user_loss: NextItemLoss,
        *,
        history_length: int,
        user_weight: float,
        consistency_weight: float,
        stop_gradient: StopGradient = "none",
    ) -> None:
        super().__init__()
        self.reader = reader
        self._sequences = sequences
        self._user_loss = user_loss
        self._history_length = history_length
        self._user_weight = user_weight
        self._consistency_weight = consistency_weight
        self._stop_gradient: StopGradient = stop_gradient

    def draw(self, n_items: int) -> Tensor:
        """Return the rows of that many different items, or of all, int64 [I], at random."""
        items = self._sequences.items
        return items[torch.randperm(len(items))[:n_items]]

    def forward(self, model: NextItemModel, rows_I: Tensor) -> Tensor:
        """Return the weighted loss of the items `rows_I`, int64 [I] on the CPU.

        `model`: whose item vectors are rebuilt.
        """
        device = self.reader.item_table().device
        users_IL = self._sequences.newest(rows_I, self._history_length).to(device)
        vectors_ILD = self.reader.encode(users_IL, users_IL.new_zeros(*users_IL.shape, 0))
        loss = torch.zeros((), device=device)
        if self._user_weight:
            loss = loss + self._user_weight * self._next_user(vectors_ILD, users_IL)
        if self._consistency_weight:
            own_ID = model.item_vectors(rows_I.to(device))
            loss = loss + self._consistency_weight * inconsistency(
                own_ID, vectors_ILD[:, -1], stop_gradient=self._stop_gradient
            )
        return loss

    def _next_user(self, vectors_ILD: Tensor, users_IL: Tensor) -> Tensor:
        next_IL = torch.cat([users_IL[:, 1:], torch.full_like(users_IL[:, :1], NO_TARGET)], dim=1)
        learned_IL = (users_IL != PADDING_ROW) & (next_IL != NO_TARGET)
        targets = Targets(
            vectors=vectors_ILD[learned_IL],
            rows=next_IL[learned_IL],
            origins=learned_IL.nonzero()[:, 0],
            own=users_IL,
        )
        return self._user_loss(targets, self.reader.item_table()) / learned_IL.sum().clamp(min=1)


def inconsistency(
    own_ID: Tensor, rebuilt_ID: Tensor, *, stop_gradient: StopGradient = "none"
) -> Tensor:
    """Return the mean of 1 - cos(own, rebuilt), 0 .. 2.

    With `stop_gradient` "own" only the rebuilt embedding follows, with "rebuilt" only the item's
    own; with "none" both do, as if the two were summed. What keeps the vectors from all becoming
    one is the ranking losses, not this one.
    """
    if stop_gradient == "own":
        own_ID = own_ID.detach()
    elif stop_gradient == "rebuilt":
        rebuilt_ID = rebuilt_ID.detach()
    return (1 - cosine_similarity(own_ID, rebuilt_ID, dim=1)).mean()
