"""The training loop: Adam, early stopping on validation, exact resumption after a kill.

A run folder holds
    config.json      the settings, resolved
    checkpoint.pt    everything to go on with, replaced every minute or so
    metrics.jsonl    one line an epoch, then one for the test part
    model.pt         the best epoch's weights and their calibration, with test metrics: what the
                     exporter takes
    cost.json        epochs, seconds of training, parameters, device
    negatives.npz    of a next-item model: what its targets were ranked against
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

import numpy as np
import torch
from torch import nn
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
from training.config import RunConfig, parse_config
from training.data.log import PreparedLog
from training.data.splits import Part
from training.distributed import Worker
from training.errors import CheckpointError, ConfigError, TrainingError
from training.folders import staged_file
from training.report import write_report
from training.tasks import Batch, TrainingStep, open_task

CHECKPOINT = "checkpoint.pt"
MODEL = "model.pt"
METRICS = "metrics.jsonl"
CONFIG = "config.json"
REPORT = "report.html"
COST = "cost.json"


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
        self.task = open_task(log, config)
        self.model = self.task.model.to(worker.device)
        # An empty module where there is nothing to train beside the model.
        self.auxiliary = (self.task.auxiliary or nn.Module()).to(worker.device)
        parameters = [*self.model.parameters(), *self.auxiliary.parameters()]
        self.optimizer = (
            torch.optim.Adam(
                parameters,
                lr=config.train.learning_rate,
                betas=(0.9, config.train.adam_beta2),
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
            best_metric=float("-inf"),
            best_epoch=-1,
            validations_since_best=0,
            trained_s=0.0,
            finished=False,
            log=[],
        )

    def restore(self, state: RunState) -> None:
        """Go on where `state` was saved."""
        if not self._has_settings(state.config):
            raise CheckpointError(f"{self.folder} holds a run with other settings")
        if state.data_fingerprint != self.fingerprint:
            raise CheckpointError(f"{self.folder} holds a run on another log")
        self.model.load_state_dict(state.model)
        self.auxiliary.load_state_dict(state.auxiliary)
        self.best_model = state.best_model
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state.optimizer)
        self.progress = state.progress

    def _has_settings(self, saved: dict[str, Any]) -> bool:
        try:
            # Settings that came after the run was saved have their defaults.
            return parse_config(saved, CHECKPOINT) == self.config
        except ConfigError:
            return False

    def finish(self) -> TrainedModel:
        """Train what is left, then calibrate the best epoch on the validation part and test it."""
        if self.worker.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / CONFIG, self.config.model_dump(mode="json"))
        if self.optimizer is not None:
            # Dropout draws from torch's generator, which is not this run's to change.
            with torch.random.fork_rng():
                self._train(self.optimizer)
        self.model.load_state_dict(self.best_model)
        calibration, metrics = None, {}
        if self.worker.is_first:
            device = self.worker.device
            calibration = self.task.calibrate(self.model, device)
            metrics = self.task.evaluate(self.model, Part.TEST, device, calibration)
        trained = TrainedModel(
            config=self.config,
            model=self.model.eval(),
            catalogue=self.task.catalogue,
            metrics=metrics,
            data_fingerprint=self.fingerprint,
            calibration=calibration,
        )
        if self.worker.is_first:
            save_model(
                self.folder / MODEL,
                trained,
                item_counts=self.task.item_counts,
                features_of_row=self.task.features_of_row,
                n_users=self.task.n_users,
            )
            self.task.save_evaluation(self.folder)
            _write_json(self.folder / COST, self._cost())
            lines = [*self.progress.log, {"part": "test", **metrics}]
            _write_lines(self.folder / METRICS, lines)
            write_report(self.folder / REPORT, self.config, lines, metric=self.task.metric)
        return trained

    def _cost(self) -> dict[str, Any]:
        device = self.worker.device
        is_gpu = device.type == "cuda"
        return {
            "epochs": self.progress.epoch,
            "best_epoch": self.progress.best_epoch,
            "trained_s": round(self.progress.trained_s, 1),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
            "threads": torch.get_num_threads(),
        }

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        network: nn.Module = TrainingStep(
            self.model, self.task, bf16=self.config.train.precision == "bf16"
        )
        if self.worker.world_size > 1:
            network = DistributedDataParallel(network)
        self.model.train()
        while not self.progress.finished:
            started = self.clock()
            self._train_epoch(network, optimizer)
            self._close_epoch(self.clock() - started)
            self._save(optimizer)

    def _train_epoch(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        progress = self.progress
        saved_at = counted_to = self.clock()
        batches = self.task.batches(
            progress.epoch,
            first_batch=progress.next_batch,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
        )
        with self._bar(self.task.n_samples(progress.epoch), progress) as bar:
            for batch in batches:
                # A step's randomness is its own: a resumed run draws what a whole one would have.
                torch.manual_seed(self._seed_of_step(progress))
                optimizer.zero_grad()
                loss = network(batch, self.worker.device)
                # DDP averages gradients over the processes; the loss is to be summed over them.
                (loss * (batch.weight * self.worker.world_size)).backward()
                optimizer.step()
                now = self.clock()
                progress = self._advance(batch, self.worker.sum(loss.item()), now - counted_to)
                counted_to = now
                if bar is not None:
                    bar.update(batch.n_samples)
                    bar.set_postfix(loss=f"{progress.loss_sum / max(progress.n_samples, 1):.4f}")
                if self.clock() - saved_at >= self.config.train.checkpoint_every_s:
                    self._save(optimizer)
                    saved_at = self.clock()

    def _seed_of_step(self, progress: Progress) -> int:
        place = (self.config.train.seed, progress.epoch, progress.next_batch, self.worker.rank)
        return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _advance(self, batch: Batch, loss: float, seconds: float) -> Progress:
        done = self.progress
        self.progress = replace(
            done,
            next_batch=done.next_batch + 1,
            loss_sum=done.loss_sum + loss * batch.n_samples,
            n_samples=done.n_samples + batch.n_samples,
            trained_s=done.trained_s + seconds,
        )
        return self.progress

    def _close_epoch(self, seconds: float) -> None:
        """Validate, keep the weights if they are the best so far, and decide whether to stop."""
        done, settings = self.progress, self.config.train
        # One clock decides for all processes.
        out_of_time = self.worker.broadcast(float(0 < settings.max_train_s <= done.trained_s))
        last = bool(out_of_time) or done.epoch + 1 >= settings.max_epochs
        loss = done.loss_sum / max(done.n_samples, 1)
        if not math.isfinite(loss):
            # Ranks are numbers all the same: no metric of a next-item model would tell.
            raise TrainingError(f"epoch {done.epoch + 1}: training diverged, its loss is {loss}")
        line: dict[str, Any] = {"part": "valid", "epoch": done.epoch, "train_loss": loss}
        progress = replace(done, epoch=done.epoch + 1, next_batch=0, loss_sum=0.0, n_samples=0)
        outcome = "not validated"
        if last or progress.epoch % settings.validate_every == 0:
            metrics = self._validate()
            line |= metrics
            progress = self._judge(progress, metrics[self.task.metric])
            outcome = f"validation {self.task.metric} {metrics[self.task.metric]:.4f}"
            if progress.best_epoch == done.epoch:
                outcome += " (best so far)"
        finished = last or progress.validations_since_best >= settings.patience
        self.progress = replace(progress, finished=finished, log=[*done.log, line])
        if self.show_progress:
            tqdm.write(
                f"epoch {progress.epoch}: training loss {loss:.4f}, {outcome}, "
                f"{done.n_samples / seconds:,.0f} samples/s"
            )

    def _validate(self) -> dict[str, float]:
        """Return the validation part's metrics; of the processes but the first, the watched one."""
        metrics = {self.task.metric: 0.0}
        if self.worker.is_first:
            metrics = self.task.evaluate(self.model, Part.VALID, self.worker.device)
        metrics[self.task.metric] = self.worker.broadcast(metrics[self.task.metric])
        return metrics

    def _judge(self, progress: Progress, metric: float) -> Progress:
        """Return the progress after a validation, and keep the weights when they are the best."""
        if math.isnan(metric):
            raise TrainingError(
                f"epoch {progress.epoch}: the validation {self.task.metric} is not a number: "
                "training diverged"
            )
        if metric <= progress.best_metric:
            return replace(progress, validations_since_best=progress.validations_since_best + 1)
        self.best_model = copy.deepcopy(self.model.state_dict())
        return replace(
            progress,
            best_metric=metric,
            best_epoch=progress.epoch - 1,
            validations_since_best=0,
        )

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
                auxiliary=self.auxiliary.state_dict(),
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
