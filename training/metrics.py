"""Metrics of click models over a whole split, never averaged over batches.

Where negatives were sampled, one may stand for several: `weights_N` says for how many, None for 1.

Shapes: N samples.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer] | NDArray[np.floating]
Scores = NDArray[np.floating]
Weights = NDArray[np.floating] | None

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


def log_loss(labels_N: Labels, probabilities_N: Scores, weights_N: Weights = None) -> float:
    """Return the mean negative log-likelihood, in nats, of the labels."""
    likelihood_N = np.where(labels_N > 0, probabilities_N, 1.0 - probabilities_N.astype(np.float64))
    return _mean(-np.log(np.clip(likelihood_N, 1e-12, None)), weights_N)


def brier_score(labels_N: Labels, probabilities_N: Scores, weights_N: Weights = None) -> float:
    """Return the mean squared difference of probability and label (Brier 1950), for one class.

    >>> brier_score(np.array([1, 0]), np.array([0.5, 0.5]))
    0.25
    """
    return _mean((probabilities_N.astype(np.float64) - (labels_N > 0)) ** 2, weights_N)


def calibration_ratio(
    labels_N: Labels, probabilities_N: Scores, weights_N: Weights = None
) -> float:
    """Return predicted clicks over actual clicks: 1 is calibrated, above 1 promises too much."""
    clicks = _mean(labels_N > 0, weights_N)
    return _mean(probabilities_N, weights_N) / clicks if clicks else float("nan")


def expected_calibration_error(
    labels_N: Labels, probabilities_N: Scores, weights_N: Weights = None
) -> float:
    """Return the mean distance of predicted from actual click rate over 20 bins of equal size."""
    order = np.argsort(probabilities_N, kind="stable")
    weights_N = np.ones(len(order)) if weights_N is None else weights_N
    gaps_N = probabilities_N.astype(np.float64) - (labels_N > 0)
    error = 0.0
    for chosen in np.array_split(order, min(_N_BINS, len(order))):
        error += abs(_mean(gaps_N[chosen], weights_N[chosen])) * float(weights_N[chosen].sum())
    return error / float(weights_N.sum())


def _mean(numbers_N: NDArray[Any], weights_N: Weights) -> float:
    return float(np.average(numbers_N.astype(np.float64), weights=weights_N))


def click_metrics(
    users_N: NDArray[np.int32],
    labels_N: Labels,
    scores_N: Scores,
    *,
    are_probabilities: bool,
    weights_N: Weights = None,
) -> dict[str, float]:
    """Return AUC and GAUC, and of probabilities their quality too, by `weights_N`."""
    metrics = {
        "auc": auc(labels_N, scores_N),
        "gauc": grouped_auc(users_N, labels_N, scores_N),
    }
    if are_probabilities:
        metrics |= probability_metrics(labels_N, scores_N, weights_N)
    return metrics


def probability_metrics(
    labels_N: Labels, probabilities_N: Scores, weights_N: Weights = None
) -> dict[str, float]:
    """Return log-loss, Brier score and calibration."""
    return {
        "log_loss": log_loss(labels_N, probabilities_N, weights_N),
        "brier_score": brier_score(labels_N, probabilities_N, weights_N),
        "calibration_ratio": calibration_ratio(labels_N, probabilities_N, weights_N),
        "expected_calibration_error": expected_calibration_error(
            labels_N, probabilities_N, weights_N
        ),
    }
