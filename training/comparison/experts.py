"""Which experts of a PKM-ACT are retrieved, counted over the test part of a log.

Shapes: Y layers, B requests, K experts retrieved for a request, N keys a side, E = N x N experts.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from training.checkpoint import load_model
from training.comparison.runs import FinishedRun
from training.config import PkmActConfig
from training.data.log import PreparedLog
from training.data.next_item_data import open_next_item_data
from training.data.splits import Part
from training.models.pkm_act import PkmAct
from training.trainer import MODEL


@torch.inference_mode()
def selections(run: FinishedRun, log: PreparedLog) -> NDArray[np.int64]:
    """Return how often each expert of each layer serves a test user, int64 [Y, E].

    Every user selects K experts in each layer. The run must be of a PKM-ACT with product keys.
    """
    trained = load_model(run.folder / MODEL)
    model, config = trained.model, trained.config.model
    assert isinstance(model, PkmAct)
    assert isinstance(config, PkmActConfig)
    n_experts = config.keys_per_side**2
    loader = open_next_item_data(log, trained.config).held_out[Part.TEST]
    counts_YE = np.zeros((len(model.layers), n_experts), dtype=np.int64)
    for _, batch in loader.batches():
        chosen_YBK = model.chosen_experts(
            torch.from_numpy(batch.history_items), torch.from_numpy(batch.history_buckets)
        )
        for counts_E, chosen_BK in zip(counts_YE, chosen_YBK.numpy(), strict=True):
            counts_E += np.bincount(chosen_BK.ravel(), minlength=n_experts)
    return counts_YE


def key_usage(counts_YE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of each layer's experts that were selected at least once, [Y].

    What figure 5 of the PKM-ACT paper calls the key usage rate.
    """
    usage_Y: NDArray[np.float64] = (counts_YE > 0).mean(axis=1)
    return usage_Y


def expert_load(counts_YE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the share of its layer's selections that each expert takes, [Y, E], falling."""
    falling_YE = -np.sort(-counts_YE, axis=1)
    load_YE: NDArray[np.float64] = falling_YE / falling_YE.sum(axis=1, keepdims=True)
    return load_YE
