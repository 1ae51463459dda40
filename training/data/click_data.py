"""Everything that a run needs of a prepared log: catalogue, counts and one loader a part."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contract.catalogue import FIRST_ROW, Catalogue
from training.config import DataConfig, RunConfig
from training.data.loader import ClickLoader
from training.data.log import PreparedLog
from training.data.negatives import NegativeSampler
from training.data.samples import Moments, behavior_moments, impression_moments
from training.data.splits import Part, Split, leave_one_out, split_by_time
from training.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ClickData:
    """The catalogue of the training part, its item counts and features, and the loaders.

    `item_counts`: int64 [catalogue rows]. `features_of_row`: see `item_features`.
    """

    catalogue: Catalogue
    item_counts: Tensor
    features_of_row: dict[str, Tensor]
    loaders: dict[Part, ClickLoader]


def open_click_data(log: PreparedLog, config: RunConfig) -> ClickData:
    """Split a prepared log and make its samples, as the run says."""
    data = config.data
    from_impressions = reads_impressions(log, data)
    split = (
        leave_one_out(log, data.holdout_steps)
        if data.split == "leave-one-out"
        else split_by_time(
            log, test_fraction=data.test_fraction, valid_fraction=data.valid_fraction
        )
    )
    catalogue = training_catalogue(log, split, data.min_item_count)
    counts = count_items(catalogue, log.behaviors["item"][split.behaviors == Part.TRAIN])
    negatives = None
    if not from_impressions:
        weights = counts[FIRST_ROW:] if data.negative_sampling == "popularity" else None
        negatives = NegativeSampler(log, catalogue.item_ids, weights)

    def loader(part: Part) -> ClickLoader:
        return ClickLoader(
            log,
            _moments(log, split, part, data, from_impressions=from_impressions),
            catalogue,
            config.features,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            negatives=negatives,
            n_negatives=data.n_negatives,
            unknown_rate=data.unknown_rate if part == Part.TRAIN else 0.0,
        )

    return ClickData(
        catalogue=catalogue,
        item_counts=torch.from_numpy(counts),
        features_of_row=item_features(log, catalogue),
        loaders={part: loader(part) for part in Part},
    )


def reads_impressions(log: PreparedLog, data: DataConfig) -> bool:
    """Return whether samples are labelled impressions, not behaviors with drawn negatives.

    Raises ConfigError for settings that the log, or each other, does not allow.
    """
    if data.samples == "impressions" and not log.header.has_labels:
        raise ConfigError("data.samples: the log has no labels; use samples = 'negatives'")
    from_impressions = data.samples != "negatives" and log.header.has_labels
    if from_impressions and data.split == "leave-one-out":
        raise ConfigError(
            "data.split: leave-one-out splits behaviors; use it with samples = 'negatives'"
        )
    return from_impressions


def _moments(
    log: PreparedLog, split: Split, part: Part, data: DataConfig, *, from_impressions: bool
) -> Moments:
    if from_impressions:
        return impression_moments(log, split, part, max_candidates=data.max_candidates)
    return behavior_moments(log, split, part)


def training_catalogue(log: PreparedLog, split: Split, min_item_count: int) -> Catalogue:
    """Return the items that were chosen or shown in the training part, often enough."""
    seen = np.concatenate(
        [
            log.behaviors["item"][split.behaviors == Part.TRAIN],
            log.impressions["item"][split.impressions == Part.TRAIN],
        ]
    )
    items, n_rows = np.unique(seen, return_counts=True)
    return Catalogue(items[n_rows >= min_item_count])


def count_items(catalogue: Catalogue, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each catalogue row stands among `items`, int64 [rows]."""
    rows = catalogue.rows(np.ascontiguousarray(items))
    return np.bincount(rows, minlength=catalogue.n_rows).astype(np.int64)


def item_features(log: PreparedLog, catalogue: Catalogue) -> dict[str, Tensor]:
    """Return, by feature of items, the feature's row of each catalogue row, int64 [rows]; 0 for
    none, as padding and the unknown item have.
    """
    found = np.searchsorted(log.items, catalogue.item_ids)
    features = {}
    for name, row_of_item in log.item_features.items():
        rows = np.zeros(catalogue.n_rows, dtype=np.int64)
        rows[FIRST_ROW:] = row_of_item[found]
        features[name] = torch.from_numpy(rows)
    return features
