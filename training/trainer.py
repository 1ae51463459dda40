"""The training loop: BCE, Adam, early stopping on validation AUC, exact resumption after a kill.

A run folder holds
    config.json      the settings, resolved
    checkpoint.pt    everything to go on with, replaced every minute or so
    metrics.jsonl    one line an epoch, then one for the test part
    model.pt         the best epoch's weights, with test metrics: what the exporter takes
    report.html      one page with curves
"""

import copy
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from training.checkpoint import (
    Progress,
    RunState,
    TrainedModel,
    load_run_state,
    save_model,
    save_run_state,
)
from training.config import RunConfig
from training.data.click_data import ClickData, open_click_data
from training.data.loader import ClickBatch
from training.data.log import PreparedLog
from training.data.splits import Part
from training.distributed import Worker
from training.errors import CheckpointError, TrainingError
from training.evaluation import evaluate, to_tensors
from training.folders import staged_file
from training.models.build import build_model, score_kind
from training.report import write_report

CHECKPOINT = "checkpoint.pt"
MODEL = "model.pt"
METRICS = "metrics.jsonl"
CONFIG = "config.json"
REPORT = "report.html"


def train(
    config: RunConfig,
    log: PreparedLog,
    run_folder: Path,
    worker: Worker,
    *,
    resume: bool = False,
    show_progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> TrainedModel:
    """Train one model and return its best epoch, tested; all files are written to `run_folder`.

    With `resume`, goes on from the folder's checkpoint, if it has one, to the very weights and
    metrics of a run that was never stopped. Raises CheckpointError when the folder holds a run
    already and `resume` is off, or a run of other settings or data.
    """
    run = _Run(config, log, run_folder, worker, show_progress=show_progress, clock=clock)
    checkpoint = run_folder / CHECKPOINT
    if checkpoint.exists():
        if not resume:
            raise CheckpointError(f"{run_folder} holds a run: go on with --resume, or name another")
        run.restore(load_run_state(checkpoint))
    return run.finish()


def batch_loss(model: nn.Module, batch: ClickBatch, device: torch.device) -> Tensor:
    """Return the summed BCE of this process' samples over the samples of the whole batch.

    Summed over the processes that share a batch, this is its mean loss: the gradient does not
    depend on how many processes there are.
    """
    logits_BC = model(*to_tensors(batch.inputs, device))
    loss_BC = binary_cross_entropy_with_logits(
        logits_BC, torch.from_numpy(batch.labels).to(device), reduction="none"
    )
    return (loss_BC * torch.from_numpy(batch.mask).to(device)).sum() / max(batch.n_samples, 1)


class _Run:
    """One run in progress."""

    def __init__(
        self,
        config: RunConfig,
        log: PreparedLog,
        folder: Path,
        worker: Worker,
        *,
        show_progress: bool,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.folder, self.worker, self.clock = config, folder, worker, clock
        self.fingerprint = log.header.fingerprint
        self.show_progress = show_progress and worker.is_first
        self.kind = score_kind(config.model)
        self.data: ClickData = open_click_data(log, config)
        self.model = build_model(
            config.model,
            config.features,
            item_counts=self.data.item_counts,
            category_of_row=self.data.category_of_row,
            seed=config.train.seed,
        ).to(worker.device)
        parameters = list(self.model.parameters())
        self.optimizer = (
            torch.optim.Adam(
                parameters,
                lr=config.train.learning_rate,
                weight_decay=config.train.weight_decay,
            )
            if parameters
            else None
        )
        self.best_model = copy.deepcopy(self.model.state_dict())
        self.progress = Progress(
            epoch=0,
            next_batch=0,
            loss_sum=0.0,
            n_samples=0,
            best_auc=float("-inf"),
            best_epoch=-1,
            finished=False,
            log=[],
        )

    def restore(self, state: RunState) -> None:
        """Go on where `state` was saved."""
        if state.config != self.config.model_dump(mode="json"):
            raise CheckpointError(f"{self.folder} holds a run with other settings")
        if state.data_fingerprint != self.fingerprint:
            raise CheckpointError(f"{self.folder} holds a run on another log")
        self.model.load_state_dict(state.model)
        self.best_model = state.best_model
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state.optimizer)
        self.progress = state.progress

    def finish(self) -> TrainedModel:
        """Train what is left, then test the best epoch."""
        if self.worker.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / CONFIG, self.config.model_dump(mode="json"))
        if self.optimizer is not None:
            self._train(self.optimizer)
        self.model.load_state_dict(self.best_model)
        metrics = self._evaluate(Part.TEST) if self.worker.is_first else {}
        trained = TrainedModel(
            config=self.config,
            model=self.model.eval(),
            catalogue=self.data.catalogue,
            metrics=metrics,
            data_fingerprint=self.fingerprint,
        )
        if self.worker.is_first:
            save_model(
                self.folder / MODEL,
                trained,
                item_counts=self.data.item_counts,
                category_of_row=self.data.category_of_row,
            )
            lines = [*self.progress.log, {"part": "test", **metrics}]
            _write_lines(self.folder / METRICS, lines)
            write_report(self.folder / REPORT, self.config, lines)
        return trained

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        network: nn.Module = self.model
        if self.worker.world_size > 1:
            network = DistributedDataParallel(self.model)
        self.model.train()
        while not self.progress.finished:
            started = self.clock()
            self._train_epoch(network, optimizer)
            self._close_epoch(self.clock() - started)
            self._save(optimizer)

    def _train_epoch(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loader, progress = self.data.loaders[Part.TRAIN], self.progress
        saved_at = self.clock()
        batches = loader.epoch(
            progress.epoch,
            shuffle=True,
            first_batch=progress.next_batch,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
        )
        with self._bar(loader.n_samples, progress) as bar:
            for batch in batches:
                optimizer.zero_grad()
                loss = batch_loss(network, batch, self.worker.device)
                # DDP averages gradients over the processes; the loss is to be summed over them.
                (loss * self.worker.world_size).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                progress = self._advance(batch, self.worker.sum(loss.item()))
                if bar is not None:
                    bar.update(batch.n_samples)
                    bar.set_postfix(loss=f"{progress.loss_sum / progress.n_samples:.4f}")
                if self.clock() - saved_at >= self.config.train.checkpoint_every_s:
                    self._save(optimizer)
                    saved_at = self.clock()

    def _advance(self, batch: ClickBatch, loss: float) -> Progress:
        done = self.progress
        self.progress = replace(
            done,
            next_batch=done.next_batch + 1,
            loss_sum=done.loss_sum + loss * batch.n_samples,
            n_samples=done.n_samples + batch.n_samples,
        )
        return self.progress

    def _close_epoch(self, seconds: float) -> None:
        """Validate, keep the weights if they are the best so far, and decide whether to stop."""
        done = self.progress
        metrics = self._evaluate(Part.VALID) if self.worker.is_first else {"auc": 0.0}
        auc = self.worker.broadcast(metrics["auc"])
        if math.isnan(auc):
            raise TrainingError(
                f"epoch {done.epoch + 1}: the validation AUC is not a number: training diverged, "
                "or the validation part holds one label only"
            )
        best_auc, best_epoch = done.best_auc, done.best_epoch
        if auc > best_auc:
            best_auc, best_epoch = auc, done.epoch
            self.best_model = copy.deepcopy(self.model.state_dict())
        epoch = done.epoch + 1
        line = {
            "part": "valid",
            "epoch": done.epoch,
            "train_loss": done.loss_sum / max(done.n_samples, 1),
            **metrics,
        }
        self.progress = Progress(
            epoch=epoch,
            next_batch=0,
            loss_sum=0.0,
            n_samples=0,
            best_auc=best_auc,
            best_epoch=best_epoch,
            finished=(
                epoch >= self.config.train.max_epochs
                or done.epoch - best_epoch >= self.config.train.patience
            ),
            log=[*done.log, line],
        )
        if self.show_progress:
            rate = done.n_samples / seconds
            tqdm.write(
                f"epoch {epoch}: training loss {line['train_loss']:.4f}, validation AUC {auc:.4f}, "
                f"{rate:,.0f} samples/s{' (best so far)' if best_epoch == done.epoch else ''}"
            )

    def _evaluate(self, part: Part) -> dict[str, float]:
        loader = self.data.loaders[part]
        return evaluate(self.model, self.kind, loader, self.worker.device).metrics(self.kind)

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.worker.is_first:
            return
        save_run_state(
            self.folder / CHECKPOINT,
            RunState(
                config=self.config.model_dump(mode="json"),
                data_fingerprint=self.fingerprint,
                progress=self.progress,
                model=self.model.state_dict(),
                best_model=self.best_model,
                optimizer=optimizer.state_dict(),
            ),
        )
        _write_lines(self.folder / METRICS, self.progress.log)

    def _bar(
        self, n_samples: int, progress: Progress
    ) -> AbstractContextManager["tqdm[Any] | None"]:
        if not self.show_progress:
            return nullcontext(None)
        return tqdm(
            total=n_samples,
            initial=progress.n_samples,
            desc=f"{self.config.name} epoch {progress.epoch + 1}/{self.config.train.max_epochs}",
            unit=" samples",
            unit_scale=True,
            mininterval=0.5,
        )


def _write_json(path: Path, value: Any) -> None:
    with staged_file(path) as staging:
        staging.write_text(json.dumps(value, indent=2) + "\n")


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    with staged_file(path) as staging:
        staging.write_text("".join(json.dumps(line) + "\n" for line in lines))
