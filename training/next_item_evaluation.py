"""Ranks of the held-out items of a log, under every protocol that a run names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.sequences import HeldOutLoader
from training.errors import TrainingError
from training.folders import staged_file
from training.models.next_item import NextItemModel
from training.ranking import (
    SAMPLED,
    Protocol,
    draw_negatives,
    rank_among,
    rank_in_catalogue,
    ranking_metrics,
)

_NEGATIVES_SEED = 2024


class RankingEvaluation:
    """Ranks every held-out target among its rivals.

    `popularity_R`: int64 [R], behaviors of each catalogue row in all parts of the log. Negatives of
    sampled protocols are drawn once, from a seed of their own: every model and every seed of
    training is ranked against the same ones.
    """

    def __init__(
        self,
        loader: HeldOutLoader,
        popularity_R: NDArray[np.int64],
        protocols: Sequence[Protocol],
        *,
        n_negatives: int,
    ) -> None:
        self._loader = loader
        self._protocols = tuple(protocols)
        self._pasts = [loader.past_rows(row) for row in range(len(loader))]
        targets = loader.targets
        self.negatives: dict[Protocol, NDArray[np.int64]] = {
            protocol: draw_negatives(
                protocol, popularity_R, targets, self._pasts, n_negatives, seed=_NEGATIVES_SEED
            )
            for protocol in self._protocols
            if protocol in SAMPLED
        }

    @torch.inference_mode()
    def ranks(
        self, model: NextItemModel, device: torch.device
    ) -> dict[Protocol, NDArray[np.int64]]:
        """Return the rank, from 1, of each held-out target under each protocol, int64 [M].

        Raises TrainingError when there is no target.
        """
        if not len(self._loader):
            raise TrainingError("no held-out behavior to rank: no user has enough behaviors")
        was_training = model.training
        model.eval()
        ranks = {p: np.zeros(len(self._loader), dtype=np.int64) for p in self._protocols}
        try:
            item_table_RD = model.item_table()
            for chosen, batch in self._loader.batches():
                user_BD = model.encode_last(
                    torch.from_numpy(batch.history_items).to(device),
                    torch.from_numpy(batch.history_buckets).to(device),
                    torch.from_numpy(batch.users).to(device),
                )
                scores_BR = user_BD @ item_table_RD.T
                targets_B = torch.from_numpy(batch.targets[:, -1].copy()).to(device)
                for protocol in self._protocols:
                    ranks_B = self._rank(protocol, scores_BR, targets_B, chosen)
                    ranks[protocol][chosen] = ranks_B.cpu().numpy()
        finally:
            model.train(was_training)
        return ranks

    def metrics(self, model: NextItemModel, device: torch.device) -> dict[str, float]:
        """Return NDCG, HR and MRR under each protocol, named `<protocol>_<metric><k>`."""
        metrics: dict[str, float] = {}
        for protocol, ranks in self.ranks(model, device).items():
            metrics |= ranking_metrics(ranks, prefix=f"{protocol}_")
        metrics["n_samples"] = float(len(self._loader))
        return metrics

    def save_negatives(self, path: Path) -> None:
        """Write the drawn negatives as catalogue rows, one array a protocol."""
        with staged_file(path) as staging, staging.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **dict(self.negatives.items()))

    def _rank(
        self, protocol: Protocol, scores_BR: Tensor, targets_B: Tensor, chosen: NDArray[np.int64]
    ) -> Tensor:
        if protocol == "full_history_included":
            return rank_in_catalogue(scores_BR, targets_B)
        if protocol == "full":
            pasts_BL = _pad([self._pasts[row] for row in chosen])
            excluded_BL = torch.from_numpy(pasts_BL).to(scores_BR.device)
            return rank_in_catalogue(scores_BR, targets_B, excluded_BL)
        negatives_BN = torch.from_numpy(self.negatives[protocol][chosen]).to(scores_BR.device)
        return rank_among(scores_BR, targets_B, negatives_BN)


def _pad(rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    padded = np.zeros((len(rows), max(1, *(len(row) for row in rows))), dtype=np.int64)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return padded
