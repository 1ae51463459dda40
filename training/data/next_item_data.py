"""Everything that a next-item run needs of a prepared log."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contract.catalogue import FIRST_ROW, Catalogue
from training.config import RunConfig
from training.data.click_data import count_items, item_features, training_catalogue
from training.data.log import PreparedLog
from training.data.sequences import HeldOutLoader, SequenceLoader
from training.data.splits import Part, Split, leave_one_out
from training.errors import ConfigError

_EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Choices:
    """P behaviors of the training part: `users` from 0, catalogue `rows` of known items, and
    `times` in unix seconds, all int64 [P], user by user.
    """

    users: Tensor
    rows: Tensor
    times: Tensor


@dataclass(frozen=True, kw_only=True)
class NextItemData:
    """The split log, the catalogue of its training part, counts, features of items and
    loaders.

    `item_counts`, `popularity`: int64 [catalogue rows]; the first counts the training part, the
    other all parts. `features_of_row`: see `item_features`.
    """

    log: PreparedLog
    config: RunConfig
    split: Split
    catalogue: Catalogue
    item_counts: Tensor
    features_of_row: dict[str, Tensor]
    popularity: NDArray[np.int64]
    held_out: dict[Part, HeldOutLoader]

    def training_choices(self) -> Choices:
        """Return who chose what in the training part, and when."""
        chosen = np.flatnonzero(self.split.behaviors == Part.TRAIN)
        behaviors = self.log.behaviors[chosen]
        rows = self.catalogue.rows(np.ascontiguousarray(behaviors["item"], dtype=np.int64))
        known = rows >= FIRST_ROW
        users = self.log.behavior_users()[chosen[known]].astype(np.int64)
        return Choices(
            users=torch.from_numpy(users),
            rows=torch.from_numpy(rows[known]),
            times=torch.from_numpy(behaviors["time"][known].astype(np.int64)),
        )

    def training_loader(self, *, whole_rows: bool) -> SequenceLoader:
        """Return batches of whole rows, or of prefixes with their last target."""
        settings = self.config.next_item
        return SequenceLoader(
            self.log,
            self.split,
            self.catalogue,
            self.config.features,
            batch_size=self.config.train.batch_size,
            seed=self.config.train.seed,
            per_user=None if whole_rows else settings.prefixes_per_user,
            parts=settings.rows == "all",
            same_length=settings.same_length,
            unknown_rate=self.config.data.unknown_rate,
        )


def open_next_item_data(log: PreparedLog, config: RunConfig) -> NextItemData:
    """Split a prepared log, each user's last behavior for the test, the one before for validation
    (`leave_one_out`).

    Raises ConfigError when the run asks for another split.
    """
    if config.data.split != "leave-one-out":
        raise ConfigError(
            f"data.split: a next-item model is trained with split = 'leave-one-out', "
            f"got {config.data.split!r}"
        )
    split = leave_one_out(log, config.data.holdout_steps)
    catalogue = training_catalogue(log, split, config.data.min_item_count)
    counts = count_items(catalogue, log.behaviors["item"][split.behaviors == Part.TRAIN])
    popularity = count_items(catalogue, log.behaviors["item"])
    popularity[:FIRST_ROW] = 0
    return NextItemData(
        log=log,
        config=config,
        split=split,
        catalogue=catalogue,
        item_counts=torch.from_numpy(counts),
        features_of_row=item_features(log, catalogue),
        popularity=popularity,
        held_out={
            part: HeldOutLoader(
                log, split, part, catalogue, config.features, batch_size=_EVALUATION_BATCH
            )
            for part in (Part.VALID, Part.TEST)
        },
    )
