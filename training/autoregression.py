"""How far a model sees: it goes on from its own predictions (Huang, "Revisiting Self-Attentive
Sequential Recommendation", section Autoregression).

Shapes: M users, B rows of a batch, L history length, R catalogue rows, D width, S steps.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from contract.catalogue import FIRST_ROW
from training.data.next_item_data import NextItemData
from training.data.sequences import HeldOutLoader
from training.data.splits import LATER, Part
from training.errors import ConfigError, TrainingError
from training.models.next_item import NextItemModel
from training.ranking import rank_in_catalogue, ranking_metrics

_BATCH = 256
_FED_BACK, _TRUE = 0, 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """The metrics of `ranking_metrics` at one step, from 1: after the model's own predictions, and
    after what users really did ("teacher-forced").
    """

    step: int
    fed_back: dict[str, float]
    teacher_forced: dict[str, float]


@torch.inference_mode()
def autoregress(
    model: NextItemModel, data: NextItemData, n_steps: int, device: torch.device
) -> list[Step]:
    """Rank the n-th held-out item of every user after n - 1 predictions of the model itself.

    The best item that a user has not had becomes the newest behavior, and so on; the target of a
    step is the true held-out item of that place. All items are ranked but those of the history,
    true or fed back: the first step is the "full" protocol of the test part. A target of the true
    history is ranked all the same, as it is there; a target that was fed back before ranks last:
    the model has spent it on another place, and without its rivals it would win. Moments are those
    of the true behaviors, for fed-back ones and for the ranking: a next-item model does not say
    when. Raises ConfigError unless the run held out `n_steps` behaviors or more: what lies behind
    them was learned from.
    """
    held_out = data.config.data.holdout_steps
    if not 1 <= n_steps <= held_out:
        raise ConfigError(
            f"{n_steps} steps cannot be ranked: the run held out {held_out} behaviors of a user "
            "(data.holdout_steps)"
        )
    n_users = len(data.held_out[Part.TEST])
    if not n_users:
        raise TrainingError(f"no user has the {held_out + 2} behaviors that holding out needs")
    was_training = model.training
    model.eval()
    fed_MS = np.zeros((n_users, n_steps), dtype=np.int64)
    steps = []
    try:
        item_table_RD = model.item_table()
        for step in range(n_steps):
            ranks_2M = _take_step(model, item_table_RD, data, step, fed_MS, device)
            own, true = (ranking_metrics(ranks_M) for ranks_M in ranks_2M)
            steps.append(Step(step=step + 1, fed_back=own, teacher_forced=true))
    finally:
        model.train(was_training)
    return steps


def _take_step(
    model: NextItemModel,
    item_table_RD: Tensor,
    data: NextItemData,
    step: int,
    fed_MS: NDArray[np.int64],
    device: torch.device,
) -> NDArray[np.int64]:
    """Return the ranks [2, M] after fed-back and after true behaviors; fills fed_MS[:, step]."""
    first, loader = data.held_out[Part.TEST], _loader_of(data, step)
    ranks_2M = np.zeros((2, len(loader)), dtype=np.int64)
    for chosen, batch in loader.batches():
        targets_B = torch.from_numpy(batch.targets[:, -1].copy()).to(device)
        fed_BS = fed_MS[chosen, :step]
        length = batch.history_items.shape[1]
        # The true behaviors since the first step make room for the predictions.
        known_BL = batch.history_items[:, : max(0, length - step)]
        own_BL = np.concatenate([known_BL, fed_BS], axis=1)[:, -length:]
        own_past_BL = np.concatenate([_pasts(first, chosen), fed_BS], axis=1)
        both = {
            _FED_BACK: (own_BL, own_past_BL),
            _TRUE: (batch.history_items, _pasts(loader, chosen)),
        }
        for form, (items_BL, past_BL) in both.items():
            user_BD = model.encode_last(
                torch.from_numpy(items_BL).to(device),
                torch.from_numpy(batch.history_buckets).to(device),
                torch.from_numpy(batch.users).to(device),
            )
            scores_BR = user_BD @ item_table_RD.T
            excluded_BL = torch.from_numpy(past_BL).to(device)
            ranks_B = rank_in_catalogue(scores_BR, targets_B, excluded_BL)
            ranks_2M[form, chosen] = ranks_B.cpu().numpy()
            if form == _FED_BACK:
                spent_B = (fed_BS == batch.targets[:, -1:]).any(axis=1)
                ranks_2M[form, chosen[spent_B]] = scores_BR.shape[1] - FIRST_ROW + 1
                scores_BR.scatter_(1, excluded_BL, float("-inf"))
                best_B = FIRST_ROW + scores_BR[:, FIRST_ROW:].argmax(dim=1)
                fed_MS[chosen, step] = best_B.cpu().numpy()
    return ranks_2M


def _loader_of(data: NextItemData, step: int) -> HeldOutLoader:
    """Return the loader whose targets are `step` behaviors after the test's, user by user."""
    parts = np.full_like(data.split.behaviors, LATER)
    parts[np.flatnonzero(data.split.behaviors == Part.TEST) + step] = Part.TEST
    return HeldOutLoader(
        data.log,
        replace(data.split, behaviors=parts),
        Part.TEST,
        data.catalogue,
        data.config.features,
        batch_size=_BATCH,
    )


def _pasts(loader: HeldOutLoader, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    pasts = [torch.from_numpy(loader.past_rows(row)) for row in chosen.tolist()]
    padded_BL: NDArray[np.int64] = pad_sequence(pasts, batch_first=True).numpy()
    return padded_BL
