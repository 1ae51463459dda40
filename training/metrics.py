"""Metrics of click models over a whole split, never averaged over batches.

Shapes: N samples.
"""

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer] | NDArray[np.floating]
Scores = NDArray[np.floating]

_N_BINS = 20


def auc(labels_N: Labels, scores_N: Scores) -> float:
    """Return the probability that a positive outranks a negative; a tie counts half.

    NaN when all labels are equal.

    >>> auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
    0.75
    """
    return grouped_auc(np.zeros(len(labels_N), dtype=np.int32), labels_N, scores_N)


def grouped_auc(users_N: NDArray[np.int32], labels_N: Labels, scores_N: Scores) -> float:
    """Return the AUC within each user, averaged with the users' sample counts as weights (GAUC).

    Users with only positives or only negatives are left out; NaN when no user is left, or when a
    score is NaN: it has no rank.
    """
    if not len(users_N) or np.isnan(scores_N).any():
        return float("nan")
    order = np.lexsort((scores_N, users_N))
    users, scores, positive = users_N[order], scores_N[order], labels_N[order] > 0
    new_user = np.r_[True, users[1:] != users[:-1]]
    new_rank = new_user | np.r_[True, scores[1:] != scores[:-1]]
    user_first = np.flatnonzero(new_user)
    user_of_row = np.cumsum(new_user) - 1
    rank_first = np.flatnonzero(new_rank)
    rank_last = np.append(rank_first[1:], len(users)) - 1
    # Equal scores share the mean of their ranks; ranks count from 1 within each user.
    tied_rank = ((rank_first + rank_last) / 2)[np.cumsum(new_rank) - 1]
    rank = tied_rank - user_first[user_of_row] + 1

    n_samples = np.bincount(user_of_row)
    n_positive = np.bincount(user_of_row, weights=positive)
    n_pairs = n_positive * (n_samples - n_positive)
    rank_sum = np.bincount(user_of_row, weights=rank * positive)
    mixed = n_pairs > 0
    if not mixed.any():
        return float("nan")
    wins = rank_sum - n_positive * (n_positive + 1) / 2
    return float(np.average(wins[mixed] / n_pairs[mixed], weights=n_samples[mixed]))


def log_loss(labels_N: Labels, probabilities_N: Scores) -> float:
    """Return the mean negative log-likelihood, in nats, of the labels."""
    likelihood = np.where(labels_N > 0, probabilities_N, 1.0 - probabilities_N.astype(np.float64))
    return float(-np.log(np.clip(likelihood, 1e-12, None)).mean())


def calibration_ratio(labels_N: Labels, probabilities_N: Scores) -> float:
    """Return predicted clicks over actual clicks: 1 is calibrated, above 1 promises too much."""
    clicks = float((labels_N > 0).sum())
    return float(probabilities_N.sum(dtype=np.float64) / clicks) if clicks else float("nan")


def expected_calibration_error(labels_N: Labels, probabilities_N: Scores) -> float:
    """Return the mean distance of predicted from actual click rate over 20 bins of equal size."""
    order = np.argsort(probabilities_N, kind="stable")
    n = len(order)
    error = 0.0
    for chosen in np.array_split(order, min(_N_BINS, n)):
        gap = probabilities_N[chosen].mean(dtype=np.float64) - (labels_N[chosen] > 0).mean()
        error += abs(float(gap)) * len(chosen) / n
    return error


def click_metrics(
    users_N: NDArray[np.int32],
    labels_N: Labels,
    scores_N: Scores,
    *,
    are_probabilities: bool,
) -> dict[str, float]:
    """Return AUC and GAUC, and of probabilities log-loss and calibration too."""
    metrics = {
        "auc": auc(labels_N, scores_N),
        "gauc": grouped_auc(users_N, labels_N, scores_N),
    }
    if are_probabilities:
        metrics |= {
            "log_loss": log_loss(labels_N, scores_N),
            "calibration_ratio": calibration_ratio(labels_N, scores_N),
            "expected_calibration_error": expected_calibration_error(labels_N, scores_N),
        }
    return metrics
