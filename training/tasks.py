"""What the training loop needs to know of a kind of model: its batches, its loss, its metrics.

Click models learn which of the shown items was chosen; next-item models learn what comes next.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from contract.catalogue import Catalogue
from training.config import NextItemModelConfig, RunConfig, SasRecConfig
from training.data.click_data import open_click_data
from training.data.loader import ClickBatch
from training.data.log import PreparedLog
from training.data.next_item_data import NextItemData, open_next_item_data
from training.data.sequences import NO_TARGET, SequenceBatch
from training.data.splits import Part
from training.errors import ConfigError, TrainingError
from training.evaluation import evaluate, to_tensors
from training.losses import NextItemLoss, Targets
from training.models.build import build_model, score_kind
from training.models.dual import DualTask, UserSequences
from training.models.item_codes import fit_codes, item_factors
from training.models.next_item import NextItemModel
from training.next_item_evaluation import RankingEvaluation

NEGATIVES = "negatives.npz"


class Batch(Protocol):
    """Something to learn from; all of it, not the share of one process."""

    @property
    def n_samples(self) -> int:
        """Samples of the whole batch."""

    @property
    def weight(self) -> float:
        """What its mean loss counts for in the gradient, 1 on average over an epoch."""


class Task(Protocol):
    """One kind of learning on one prepared log.

    `metric`: of a held-out part, the higher the better: the best epoch has the highest.
    `item_counts`, `category_of_row`: int64 [catalogue rows]. `n_users`: users of the log.
    """

    metric: str
    catalogue: Catalogue
    item_counts: Tensor
    category_of_row: Tensor | None
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

    def evaluate(self, model: nn.Module, part: Part, device: torch.device) -> dict[str, float]:
        """Return the metrics of a held-out part."""

    def save_evaluation(self, folder: Path) -> None:
        """Write what the test metrics depend on beside model and log, if anything."""


def open_task(log: PreparedLog, config: RunConfig) -> Task:
    """Return the task that the run's model is made for."""
    if isinstance(config.model, NextItemModelConfig):
        return NextItemTask(log, config)
    return ClickTask(log, config)


class ClickTask:
    """BCE on shown, or sampled, candidates; validation watches the AUC."""

    metric = "auc"
    auxiliary = None

    def __init__(self, log: PreparedLog, config: RunConfig) -> None:
        self._kind = score_kind(config.model)
        self.data = open_click_data(log, config)
        self.catalogue = self.data.catalogue
        self.item_counts = self.data.item_counts
        self.category_of_row = self.data.category_of_row
        self.n_users = log.header.n_users
        self.model = _build(self, config)

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
        """Return the BCE."""
        logits_BC = model(*to_tensors(batch.inputs, device))
        loss_BC = binary_cross_entropy_with_logits(
            logits_BC, torch.from_numpy(batch.labels).to(device), reduction="none"
        )
        return (loss_BC * torch.from_numpy(batch.mask).to(device)).sum() / max(batch.n_samples, 1)

    def evaluate(self, model: nn.Module, part: Part, device: torch.device) -> dict[str, float]:
        """Return AUC, GAUC and calibration."""
        loader = self.data.loaders[part]
        return evaluate(model, self._kind, loader, device).metrics(self._kind)

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
        self.category_of_row = self.data.category_of_row
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

    def evaluate(self, model: nn.Module, part: Part, device: torch.device) -> dict[str, float]:
        """Return NDCG, HR and MRR, each under its protocol's name.

        Raises ConfigError for the training part.
        """
        assert isinstance(model, NextItemModel)
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
        category_of_row=None,
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
        category_of_row=task.category_of_row,
        n_users=task.n_users,
        code_of_row=code_of_row,
        seed=config.train.seed,
    )
