"""What the training loop needs to know of a kind of model: its batches, its loss, its metrics.

Click models learn which of the shown items was chosen; next-item models learn what comes next.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from contract.catalogue import FIRST_ROW, Catalogue
from training.calibration import Calibration, fit, negative_sampling_rate, unchanged
from training.config import (
    DienConfig,
    ModelConfig,
    NextItemModelConfig,
    RunConfig,
    SasRecConfig,
)
from training.data.click_data import open_click_data, reads_impressions
from training.data.loader import ClickBatch, ClickLoader
from training.data.log import PreparedLog
from training.data.next_item_data import NextItemData, open_next_item_data
from training.data.sequences import NO_TARGET, SequenceBatch
from training.data.splits import Part
from training.errors import ConfigError, TrainingError
from training.evaluation import evaluate, to_tensors
from training.losses import NextItemLoss, Targets, draw_rows
from training.models.build import build_model, score_kind
from training.models.dien import DIEN
from training.models.dual import DualTask, UserSequences
from training.models.item_codes import fit_codes, item_factors
from training.models.next_item import NextItemModel
from training.next_item_evaluation import RankingEvaluation

NEGATIVES = "negatives.npz"

_log = logging.getLogger(__name__)


class Batch(Protocol):
    """Something to learn from; all of it, not the share of one process."""

    @property
    def n_samples(self) -> int:
        """Samples of the whole batch."""

    @property
    def weight(self) -> float:
        """What its mean loss counts for in the gradient, 1 on average over an epoch."""


@runtime_checkable
class HasTrainingLoss(Protocol):
    """A click model that learns by more than the BCE of its logits."""

    def training_loss(
        self,
        history_items: Tensor,
        history_buckets: Tensor,
        candidate_items: Tensor,
        labels: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the loss, summed over the samples; `labels`, `mask`: [B, C], 1 for clicks and 1
        for samples.
        """


class ClickLoss:
    """BCE, or what a click model learns by instead, and the auxiliary loss of DIEN.

    `item_counts`: int64 [catalogue rows]; DIEN's negatives are drawn as often.
    """

    def __init__(self, settings: ModelConfig, item_counts: Tensor) -> None:
        self._auxiliary_weight = (
            settings.auxiliary_weight if isinstance(settings, DienConfig) else 0.0
        )
        chosen_R = item_counts.double()
        chosen_R[:FIRST_ROW] = 0
        self.cumulative_R = (chosen_R / chosen_R.sum()).cumsum(dim=0)

    def __call__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, Tensor, Tensor],
        labels_BC: Tensor,
        mask_BC: Tensor,
    ) -> Tensor:
        """Return the loss, summed over the samples.

        `inputs`: the model's, items [B, L], buckets [B, L, G] and candidates [B, C]. `labels_BC`,
        `mask_BC`: 1 for clicks and 1 for samples.
        """
        items, buckets, candidates = inputs
        if isinstance(model, HasTrainingLoss):
            loss = model.training_loss(items, buckets, candidates, labels_BC, mask_BC)
        else:
            logits_BC = model(items, buckets, candidates)
            loss_BC = binary_cross_entropy_with_logits(logits_BC, labels_BC, reduction="none")
            loss = (loss_BC * mask_BC).sum()
        if self._auxiliary_weight:
            assert isinstance(model, DIEN)
            # A mean of its own in every process, which counts as much as the process' samples do.
            loss = loss + self._auxiliary_weight * mask_BC.sum() * model.auxiliary_loss(
                items, buckets, draw_rows(self.cumulative_R, items.shape, items.device)
            )
        return loss


class Task(Protocol):
    """One kind of learning on one prepared log.

    `metric`: of a held-out part, the higher the better: the best epoch has the highest.
    `item_counts`: int64 [catalogue rows]. `features_of_row`: the features of items that the log
    has, by name int64 [catalogue rows]. `n_users`: users of the log.
    """

    metric: str
    catalogue: Catalogue
    item_counts: Tensor
    features_of_row: dict[str, Tensor]
    n_users: int
    model: nn.Module
    """As yet untrained."""

    @property
    def auxiliary(self) -> nn.Module | None:
        """Return what the loss trains beside the model, and no model keeps."""

    def n_samples(self, epoch: int) -> int:
        """Return the samples of one epoch."""

    def batches(
        self, epoch: int, *, first_batch: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch from `first_batch` on; of each, the rows of `rank`."""

    def loss(self, model: nn.Module, batch: Any, device: torch.device) -> Tensor:
        """Return the summed loss of this process' samples over the samples of the whole batch.

        Summed over the processes that share a batch, this is its mean loss: the gradient does not
        depend on how many processes there are.
        """

    def calibrate(self, model: nn.Module, device: torch.device) -> Calibration | None:
        """Return what makes calibrated logits of the model's, by the validation part; None where
        the run asks for nothing, or nothing can be told.
        """

    def evaluate(
        self,
        model: nn.Module,
        part: Part,
        device: torch.device,
        calibration: Calibration | None = None,
    ) -> dict[str, float]:
        """Return the metrics of a held-out part; `calibration`: what `calibrate` has returned."""

    def save_evaluation(self, folder: Path) -> None:
        """Write what the test metrics depend on beside model and log, if anything."""


def open_task(log: PreparedLog, config: RunConfig) -> Task:
    """Return the task that the run's model is made for."""
    is_changed = config.train.calibration != "none" or config.data.click_rate is not None
    if is_changed and score_kind(config.model) != "probability":
        raise ConfigError(
            f"train.calibration, data.click_rate: for click probabilities, which "
            f"{config.model.name} does not give"
        )
    if isinstance(config.model, NextItemModelConfig):
        return NextItemTask(log, config)
    return ClickTask(log, config)


class ClickTask:
    """BCE on shown, or sampled, candidates; validation watches the AUC.

    Where the run says which click rate is meant, and negatives are sampled, each stands for so many
    that its part has that rate: in calibrated probabilities, and in the metrics of those. Training
    and its validation know the samples alone.
    """

    metric = "auc"
    auxiliary = None

    def __init__(self, log: PreparedLog, config: RunConfig) -> None:
        self._kind = score_kind(config.model)
        self._calibration = config.train.calibration
        self._sampling_rate = _sampling_rate(log, config)
        self.data = open_click_data(log, config)
        self.catalogue = self.data.catalogue
        self.item_counts = self.data.item_counts
        self.features_of_row = self.data.features_of_row
        self.n_users = log.header.n_users
        self.model = _build(self, config)
        if any(True for _ in self.model.parameters()):
            _require_both_labels(self.data.loaders[Part.VALID])
        self._loss = ClickLoss(config.model, self.item_counts)

    def n_samples(self, epoch: int) -> int:
        """Return the samples of one epoch: all have the same."""
        del epoch
        return self.data.loaders[Part.TRAIN].n_samples

    def batches(
        self, epoch: int, *, first_batch: int, rank: int, world_size: int
    ) -> Iterator[ClickBatch]:
        """Yield the batches of one epoch."""
        return self.data.loaders[Part.TRAIN].epoch(
            epoch, shuffle=True, first_batch=first_batch, rank=rank, world_size=world_size
        )

    def loss(self, model: nn.Module, batch: ClickBatch, device: torch.device) -> Tensor:
        """Return the BCE, or what the model learns by instead, and the auxiliary loss of DIEN."""
        items, buckets, candidates = to_tensors(batch.inputs, device)
        labels_BC, mask_BC = (
            torch.from_numpy(array).to(device) for array in (batch.labels, batch.mask)
        )
        loss = self._loss(model, (items, buckets, candidates), labels_BC, mask_BC)
        return loss / max(batch.n_samples, 1)

    def calibrate(self, model: nn.Module, device: torch.device) -> Calibration | None:
        """Return the calibration that the run asks for; where the validation part does not allow
        it, say so and go on without.
        """
        calibration = None
        if self._calibration != "none":
            valid = evaluate(model, "affinity", self.data.loaders[Part.VALID], device)
            try:
                calibration = fit(self._calibration, valid.labels, valid.scores)
            except TrainingError as error:
                _log.warning("probabilities are left uncalibrated: %s", error)
        if self._sampling_rate != 1:
            calibration = (calibration or unchanged()).shifted(math.log(self._sampling_rate))
        return calibration

    def evaluate(
        self,
        model: nn.Module,
        part: Part,
        device: torch.device,
        calibration: Calibration | None = None,
    ) -> dict[str, float]:
        """Return AUC, GAUC and the quality of the probabilities, of calibrated ones before and
        after.
        """
        loader = self.data.loaders[part]
        if calibration is None:
            return evaluate(model, self._kind, loader, device).metrics(self._kind)
        return evaluate(model, "affinity", loader, device).calibrated_metrics(
            calibration, negative_weight=1 / self._sampling_rate
        )

    def save_evaluation(self, folder: Path) -> None:
        """Write nothing: samples depend on log and settings alone."""


class NextItemTask:
    """A loss of the next item; validation watches NDCG@10 under the run's first protocol."""

    def __init__(self, log: PreparedLog, config: RunConfig) -> None:
        settings = config.next_item
        self.metric = settings.watched_metric
        self.data = open_next_item_data(log, config)
        self.catalogue = self.data.catalogue
        self.item_counts = self.data.item_counts
        self.features_of_row = self.data.features_of_row
        self.n_users = log.header.n_users
        self.model = _build(self, config, _item_codes(self.data, config))
        assert isinstance(self.model, NextItemModel)
        self._train = self.data.training_loader(whole_rows=self.model.learns_whole_rows)
        if not self._train.n_samples(0):
            raise TrainingError("no user has two behaviors in the training part: nothing is next")
        self._loss = NextItemLoss(settings, self.item_counts)
        self.auxiliary = _dual_task(self.data, config)
        self._evaluations = {
            part: RankingEvaluation(
                self.data.held_out[part],
                self.data.popularity,
                settings.protocols if part == Part.TEST else settings.protocols[:1],
                n_negatives=settings.n_ranked,
            )
            for part in (Part.VALID, Part.TEST)
        }

    def n_samples(self, epoch: int) -> int:
        """Return the targets of one epoch."""
        return self._train.n_samples(epoch)

    def batches(
        self, epoch: int, *, first_batch: int, rank: int, world_size: int
    ) -> Iterator[SequenceBatch]:
        """Yield the batches of one epoch."""
        return self._train.epoch(epoch, first_batch=first_batch, rank=rank, world_size=world_size)

    def loss(self, model: nn.Module, batch: SequenceBatch, device: torch.device) -> Tensor:
        """Return the loss of the next item, and of the dual task where the run asks for it."""
        assert isinstance(model, NextItemModel)
        items, buckets, targets, users = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (batch.history_items, batch.history_buckets, batch.targets, batch.users)
        )
        vectors_ND, rows_N, origins_N = model.training_pairs(items, buckets, targets, users)
        learned = Targets(
            vectors=vectors_ND,
            rows=rows_N,
            origins=origins_N,
            own=torch.cat([items, targets[:, -1:]], dim=1),
        )
        n_learned = batch.n_samples * model.target_share
        loss = self._loss(learned, model.item_table()) / max(n_learned, 1.0)
        if self.auxiliary is not None:
            # A mean of its own in every process, which counts as much as the process' targets do.
            share = int((batch.targets != NO_TARGET).sum()) / max(batch.n_samples, 1)
            drawn = self.auxiliary.draw(len(batch.users))
            loss = loss + share * self.auxiliary(model, drawn)
        return loss

    def calibrate(self, model: nn.Module, device: torch.device) -> None:
        """Return nothing: of affinities only the order means something."""

    def evaluate(
        self,
        model: nn.Module,
        part: Part,
        device: torch.device,
        calibration: Calibration | None = None,
    ) -> dict[str, float]:
        """Return NDCG, HR and MRR, each under its protocol's name.

        Raises ConfigError for the training part.
        """
        assert isinstance(model, NextItemModel)
        assert calibration is None
        if part not in self._evaluations:
            raise ConfigError(
                f"a next-item model is ranked on its valid or test part, not on {part.name.lower()}"
            )
        return self._evaluations[part].metrics(model, device)

    def save_evaluation(self, folder: Path) -> None:
        """Write the sampled negatives of the test part."""
        if self._evaluations[Part.TEST].negatives:
            self._evaluations[Part.TEST].save_negatives(folder / NEGATIVES)


class TrainingStep(nn.Module):
    """A model and its task as one module whose output is the loss.

    Gradients of several processes are averaged by a wrapper around the module that is *called*; the
    loss of a next-item model calls more of the model than its forward.
    """

    def __init__(self, model: nn.Module, task: Task, *, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.auxiliary = task.auxiliary
        self.task = task
        self.bf16 = bf16

    def forward(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the loss of one batch."""
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return self.task.loss(self.model, batch, device)


def _sampling_rate(log: PreparedLog, config: RunConfig) -> float:
    """Return which share of the negatives of real traffic a part holds; 1 where it is not said."""
    data = config.data
    if data.click_rate is None:
        return 1.0
    if reads_impressions(log, data):
        raise ConfigError(
            "data.click_rate: for sampled negatives; labelled impressions have a rate of their own"
        )
    return negative_sampling_rate(data.click_rate, data.n_negatives)


def _require_both_labels(valid: ClickLoader) -> None:
    """Raise TrainingError where the validation part has no AUC to choose an epoch by."""
    found: set[float] = set()
    for batch in valid.epoch(0, shuffle=False):
        found.update(batch.labels[batch.mask].tolist())
        if len(found) > 1:
            return
    what = f"samples of label {found.pop():.0f} only" if found else "no sample"
    raise TrainingError(
        f"the validation part holds {what}, which leaves no AUC to choose the best epoch by; "
        "data.test_fraction and data.valid_fraction say which part it is"
    )


def _item_codes(data: NextItemData, config: RunConfig) -> Tensor | None:
    model, seed = config.model, config.train.seed
    if not (isinstance(model, SasRecConfig) and model.codes):
        return None
    choices = data.training_choices()
    factors_RF = item_factors(choices.users, choices.rows, n_rows=data.catalogue.n_rows, seed=seed)
    return fit_codes(
        factors_RF,
        codes=model.codes,
        codebook_size=model.codebook_size,
        quantisation=model.quantisation,
        seed=seed,
    )


def _dual_task(data: NextItemData, config: RunConfig) -> DualTask | None:
    settings = config.next_item
    if not (settings.dual_weight or settings.consistency_weight):
        return None
    if not isinstance(config.model, SasRecConfig):
        raise ConfigError(
            f"next_item.dual_weight, next_item.consistency_weight: for model.name = 'sasrec' only, "
            f"got {config.model.name!r}"
        )
    choices = data.training_choices()
    sequences = UserSequences(
        choices.users,
        choices.rows,
        choices.times,
        n_users=data.log.header.n_users,
        n_rows=data.catalogue.n_rows,
    )
    reader = build_model(
        config.model.model_copy(update={"codes": 0, "user_embedding": False}),
        config.features,
        item_counts=sequences.counts_U,
        features_of_row=None,
        # Not the model's: rows of users would start as the very vectors of rows of items.
        seed=config.train.seed + 1,
    )
    assert isinstance(reader, NextItemModel)
    return DualTask(
        reader,
        sequences,
        NextItemLoss(settings, sequences.counts_U),
        history_length=config.features.history_length,
        user_weight=settings.dual_weight,
        consistency_weight=settings.consistency_weight,
        stop_gradient=settings.consistency_stop,
    )


def _build(
    task: ClickTask | NextItemTask, config: RunConfig, code_of_row: Tensor | None = None
) -> nn.Module:
    return build_model(
        config.model,
        config.features,
        item_counts=task.item_counts,
        features_of_row=task.features_of_row,
        n_users=task.n_users,
        code_of_row=code_of_row,
        seed=config.train.seed,
    )
