"""Where a target stands in a ranking, and the metrics of that: NDCG, HR and MRR at k.

A ranking's protocol decides what the target is ranked against; without its name a figure means
nothing. Shapes: B requests, R catalogue rows, N negatives.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contract.catalogue import FIRST_ROW

Protocol = Literal["full", "full_history_included", "pop100", "pop100_history_excluded", "uni100"]
"""full: the whole catalogue without the items of the user's history.
full_history_included: the whole catalogue.
pop100: negatives drawn by popularity, with replacement, only the target is excluded; an item drawn
twice counts once (RecBole's).
pop100_history_excluded: negatives drawn by popularity without replacement, none of the user's
history (BERT4Rec's).
uni100: negatives drawn uniformly without replacement, none of the user's history.
"""
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
SAMPLED: tuple[Protocol, ...] = ("pop100", "pop100_history_excluded", "uni100")
CUTOFFS = (10, 20)


def rank_in_catalogue(
    scores_BR: Tensor, targets_B: Tensor, excluded_BL: Tensor | None = None
) -> Tensor:
    """Return the rank int64 [B] of each target among all known items, from 1; ties count against.

    `targets_B`: rows; a target that the catalogue does not know ranks last. `excluded_BL`: rows
    that are left out, such as the user's history; the target itself is never left out.
    """
    targets_B1 = targets_B[:, None]
    target_scores_B1 = scores_BR.gather(1, targets_B1)
    # Not "at least": a score that is no number counts against the target, whosever it is.
    rivals_BR = ~(scores_BR < target_scores_B1)
    if excluded_BL is not None:
        rivals_BR.scatter_(1, excluded_BL, value=False)
    rivals_BR.scatter_(1, targets_B1, value=False)
    ranks_B = rivals_BR[:, FIRST_ROW:].sum(dim=1) + 1
    last = scores_BR.shape[1] - FIRST_ROW + 1
    return ranks_B.masked_fill(targets_B < FIRST_ROW, last)


def rank_among(scores_BR: Tensor, targets_B: Tensor, negatives_BN: Tensor) -> Tensor:
    """Return the rank int64 [B] of each target among negatives, from 1; ties count against.

    `negatives_BN`: rows, 0 where there is none. A target that the catalogue does not know ranks
    last.
    """
    target_scores_B1 = scores_BR.gather(1, targets_B[:, None])
    real_BN = negatives_BN != 0
    rivals_BN = ~(scores_BR.gather(1, negatives_BN) < target_scores_B1) & real_BN
    last_B = real_BN.sum(dim=1) + 1
    return torch.where(targets_B < FIRST_ROW, last_B, rivals_BN.sum(dim=1) + 1)


def draw_negatives(
    protocol: Protocol,
    weights_R: NDArray[np.int64],
    targets_B: NDArray[np.int64],
    histories: Sequence[NDArray[np.int64]],
    n_negatives: int,
    *,
    seed: int,
) -> NDArray[np.int64]:
    """Return negatives' rows int64 [B, N] of a sampled protocol, 0 where there is none to draw.

    `weights_R`: popularity of each row over all parts of the log; rows below FIRST_ROW must have
    weight 0. `histories`: the rows of each user's behaviors. The draw depends on `seed` only.
    """
    rng = np.random.default_rng(seed)
    if protocol == "pop100":
        return _with_replacement(weights_R, targets_B, n_negatives, rng)
    if protocol == "uni100":
        weights_R = (weights_R > 0).astype(np.int64)
    negatives_BN = np.zeros((len(targets_B), n_negatives), dtype=np.int64)
    for b, (target, history) in enumerate(zip(targets_B, histories, strict=True)):
        allowed_R = weights_R.astype(np.float64)
        allowed_R[history] = 0
        allowed_R[target] = 0
        drawn = _without_replacement(allowed_R, n_negatives, rng)
        negatives_BN[b, : len(drawn)] = drawn
    return negatives_BN


def ranking_metrics(ranks_B: NDArray[np.int64], prefix: str = "") -> dict[str, float]:
    """Return NDCG, HR and MRR at 10 and 20 of targets' ranks, each averaged over B.

    >>> ranking_metrics(np.array([1, 3, 11]))["hr10"]
    0.6666666666666666
    """
    metrics = {}
    for k in CUTOFFS:
        hit_B = ranks_B <= k
        metrics[f"{prefix}ndcg{k}"] = float((hit_B / np.log2(ranks_B + 1.0)).mean())
        metrics[f"{prefix}hr{k}"] = float(hit_B.mean())
        metrics[f"{prefix}mrr{k}"] = float((hit_B / ranks_B).mean())
    return metrics


def _with_replacement(
    weights_R: NDArray[np.int64],
    targets_B: NDArray[np.int64],
    n_negatives: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    cumulative_R = np.cumsum(weights_R)

    def draw(n: int) -> NDArray[np.int64]:
        tickets = rng.integers(cumulative_R[-1], size=n)
        return np.searchsorted(cumulative_R, tickets, side="right").astype(np.int64)

    negatives_BN = draw(len(targets_B) * n_negatives).reshape(len(targets_B), n_negatives)
    if np.count_nonzero(weights_R) > 1:
        while (again_BN := negatives_BN == targets_B[:, None]).any():
            negatives_BN[again_BN] = draw(int(again_BN.sum()))
    else:
        negatives_BN[negatives_BN == targets_B[:, None]] = 0
    negatives_BN.sort(axis=1)
    repeated_BN = negatives_BN[:, 1:] == negatives_BN[:, :-1]
    negatives_BN[:, 1:][repeated_BN] = 0
    return negatives_BN


def _without_replacement(
    weights_R: NDArray[np.float64], n: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    # Successive sampling by exponential clocks: the n smallest of E / weight are a draw without
    # replacement (Efraimidis and Spirakis, 2006), in one pass over the catalogue.
    rows = np.flatnonzero(weights_R)
    clocks = rng.standard_exponential(len(rows)) / weights_R[rows]
    if n >= len(rows):
        return rows
    return rows[np.argpartition(clocks, n - 1)[:n]]
