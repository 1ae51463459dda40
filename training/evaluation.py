"""Scores of a whole split, and the metrics over them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from contract.bundle import ScoreKind
from contract.encoding import ModelInputs
from training.calibration import Calibration
from training.data.loader import ClickLoader
from training.errors import TrainingError
from training.metrics import auc, click_metrics, log_loss, probability_metrics
from training.models.build import Scorer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All N samples of a split: `users`, `labels`, `scores`, and true click `probabilities` where
    the log is a synthetic world's.
    """

    users: NDArray[np.int32]
    labels: NDArray[np.float32]
    scores: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None

    def metrics(self, kind: ScoreKind, *, negative_weight: float = 1.0) -> dict[str, float]:
        """Return the click metrics, and the ceiling that no model can pass where it is known.

        `negative_weight`: for how many negatives one stands where probabilities are judged.
        """
        metrics = click_metrics(
            self.users,
            self.labels,
            self.scores,
            are_probabilities=kind == "probability",
            weights_N=self._weights(negative_weight),
        )
        metrics["n_samples"] = float(len(self.labels))
        if self.probabilities is not None:
            metrics["ceiling_auc"] = auc(self.labels, self.probabilities)
            metrics["ceiling_log_loss"] = log_loss(self.labels, self.probabilities)
        return metrics

    def calibrated_metrics(
        self, calibration: Calibration, *, negative_weight: float = 1.0
    ) -> dict[str, float]:
        """Return the metrics of the calibrated probabilities, where `scores` are logits, and, named
        `..._uncalibrated`, what those of the plain ones were.
        """
        logits_N = torch.from_numpy(self.scores)
        probabilities_N = torch.sigmoid(calibration(logits_N)).numpy()
        metrics = replace(self, scores=probabilities_N).metrics(
            "probability", negative_weight=negative_weight
        )
        before = probability_metrics(
            self.labels, torch.sigmoid(logits_N).numpy(), self._weights(negative_weight)
        )
        return metrics | {f"{name}_uncalibrated": value for name, value in before.items()}

    def _weights(self, negative_weight: float) -> NDArray[np.float64]:
        return np.where(self.labels > 0, 1.0, negative_weight)


@torch.inference_mode()
def evaluate(
    model: nn.Module, kind: ScoreKind, loader: ClickLoader, device: torch.device
) -> Evaluation:
    """Score every sample of a loader's part, once, in evaluation mode; the mode is restored."""
    was_training = model.training
    scorer = Scorer(model, kind).eval()
    users, labels, scores, probabilities = [], [], [], []
    try:
        for batch in loader.epoch(0, shuffle=False):
            scores_BC = scorer(*to_tensors(batch.inputs, device)).cpu().numpy()
            scores.append(scores_BC[batch.mask])
            labels.append(batch.labels[batch.mask])
            users.append(np.repeat(batch.users, batch.mask.sum(axis=1)))
            if batch.probabilities is not None:
                probabilities.append(batch.probabilities[batch.mask])
    finally:
        model.train(was_training)
    if not labels:
        raise TrainingError("there is no sample to evaluate: this part of the split is empty")
    return Evaluation(
        users=np.concatenate(users),
        labels=np.concatenate(labels),
        scores=np.concatenate(scores),
        probabilities=np.concatenate(probabilities) if probabilities else None,
    )


def to_tensors(inputs: ModelInputs, device: torch.device) -> Iterator[Tensor]:
    """Yield a model's inputs in the order of its arguments, on `device`."""
    for array in inputs.as_feed().values():
        yield torch.from_numpy(array).to(device, non_blocking=True)
