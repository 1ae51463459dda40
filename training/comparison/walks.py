"""What IMN's attention does from pass to pass: its weights, how spread they are, one walk to show
(IMN, Figure 5).

Shapes: P passes, B moments, C candidates, L history length, G time granularities.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contract.catalogue import PADDING_ROW, UNKNOWN_ROW
from training.config import RunConfig
from training.data.click_data import ClickData
from training.data.histories import HistoryGatherer
from training.data.loader import ClickLoader
from training.data.log import PreparedLog
from training.data.splits import Part
from training.errors import TrainingError
from training.evaluation import to_tensors
from training.models.imn import IterativeMemoryNetwork

MAX_BATCHES = 20
# Weights of one behavior alone are never spread, whatever the model does.
_FEWEST_BEHAVIORS = 2


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A moment at which a user chose an item.

    `user`: index in the log. `time`: unix seconds. `start`, `end`: what a model reads of the
    history is behaviors[start:end] of the log.
    """

    user: int
    time: int
    start: int
    end: int
    target_item: int


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A model's passes over one user's history towards one target that the user chose.

    `item_ids`, `ages_s` int64 [L]: the behaviors, oldest first, and seconds from each to the
    target. `weights` float32 [P, L]: as the model has them, not normalised over L.
    """

    user_id: str
    target_item: int
    item_ids: NDArray[np.int64]
    ages_s: NDArray[np.int64]
    weights: NDArray[np.float32]


def attention(
    model: IterativeMemoryNetwork,
    history_items: Tensor,
    history_buckets: Tensor,
    candidate_items: Tensor,
) -> Tensor:
    """Return the weights of every pass, [P, B, C, L], exactly 0 for padding; without gradient.

    Arguments as of the model's forward. Raises ConfigError for a segmented model, whose passes are
    over segments.
    """
    with torch.no_grad():
        _, weights_BCPL = model.explain(history_items, history_buckets, candidate_items)
    return weights_BCPL.movedim(2, 0)


def entropy(
    model: IterativeMemoryNetwork,
    loader: ClickLoader,
    device: torch.device,
    max_batches: int = MAX_BATCHES,
) -> list[float]:
    """Return, pass by pass, the mean entropy of the weights over a part's samples, in nats.

    H = -sum_j p_j ln p_j, p_j = w_j / sum_i w_i: ln n where n behaviors weigh the same, 0 where one
    has all the weight. Samples with fewer than 2 behaviors are left out; of a larger part than
    `max_batches`, the batches are drawn at random, the same in every call.

    Raises TrainingError where no sample is left, ConfigError as `attention` does.
    """
    found: list[NDArray[np.float32]] = []  # of each batch [P, samples]
    # Shuffled: in their own order, batches begin with the shortest histories.
    for batch in itertools.islice(loader.epoch(0, shuffle=True), max_batches):
        items_BL, buckets_BLG, candidates_BC = to_tensors(batch.inputs, device)
        n_behaviors_B1 = (batch.inputs.history_items != PADDING_ROW).sum(axis=1, keepdims=True)
        counted_BC = batch.mask & (n_behaviors_B1 >= _FEWEST_BEHAVIORS)
        entropy_PBC = entropies(attention(model, items_BL, buckets_BLG, candidates_BC))
        found.append(entropy_PBC.cpu().numpy()[:, counted_BC])
    if not any(one.size for one in found):
        raise TrainingError(
            f"no sample has {_FEWEST_BEHAVIORS} behaviors: there is nothing to weigh"
        )
    means_P: list[float] = np.concatenate(found, axis=1).mean(axis=1, dtype=np.float64).tolist()
    return means_P


def entropies(weights: Tensor) -> Tensor:
    """Return the entropy [...] of weights [..., L] normalised over L, in nats; 0 of none."""
    total = weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    parts: Tensor = torch.special.entr(weights / total)
    return parts.sum(dim=-1)


def pick(config: RunConfig, data: ClickData, part: Part = Part.TEST) -> Pick:
    """Return the moment to show: of a part's moments at which a known item was chosen, those with
    the most behaviors that the run's model reads, and of these the newest.

    Raises TrainingError where no known item was chosen after any behavior.
    """
    moments = data.loaders[part].moments
    chosen = np.flatnonzero(moments.labels)
    items = moments.candidate_items[chosen]
    owners = np.searchsorted(moments.candidate_offsets, chosen, side="right") - 1
    n_read = np.minimum(
        moments.ends[owners] - moments.starts[owners], config.features.history_length
    )
    n_read[data.catalogue.rows(items) == UNKNOWN_ROW] = 0
    if not n_read.any():
        raise TrainingError(
            f"{part.name.lower()} part: no known item was chosen after any behavior"
        )
    # The last key decides first.
    best = np.lexsort((moments.times[owners], n_read))[-1]
    owner = owners[best]
    return Pick(
        user=int(moments.users[owner]),
        time=int(moments.times[owner]),
        start=int(moments.ends[owner] - n_read[best]),
        end=int(moments.ends[owner]),
        target_item=int(items[best]),
    )


def walk(
    model: IterativeMemoryNetwork,
    config: RunConfig,
    log: PreparedLog,
    data: ClickData,
    device: torch.device,
) -> Walk:
    """Return the walk over the test moment that `pick` finds; errors as of it and `attention`."""
    picked = pick(config, data)
    histories = HistoryGatherer(log, data.catalogue, config.features, unknown_rate=0.0)
    rows_BL, buckets_BLG = histories.gather(
        np.array([picked.start]), np.array([picked.end]), np.array([picked.time]), np.uint64(0)
    )
    target_BC = data.catalogue.rows(np.array([[picked.target_item]]))
    weights_PBCL = attention(
        model, *(torch.from_numpy(array).to(device) for array in (rows_BL, buckets_BLG, target_BC))
    )
    behaviors = log.behaviors[picked.start : picked.end]
    return Walk(
        user_id=log.user_id(picked.user),
        target_item=picked.target_item,
        item_ids=np.array(behaviors["item"]),
        ages_s=picked.time - behaviors["time"].astype(np.int64),
        weights=weights_PBCL[:, 0, 0, -len(behaviors) :].cpu().numpy(),
    )
