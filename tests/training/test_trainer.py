"""The training loop: it learns, it is exact, and a kill at any moment changes nothing."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import run_config
from training.checkpoint import load_model, load_run_state
from training.config import RunConfig
from training.data.log import PreparedLog
from training.distributed import Worker
from training.errors import CheckpointError
from training.tasks import open_task
from training.trainer import CHECKPOINT, CONFIG, COST, METRICS, MODEL, REPORT, train

ALONE = Worker(device=torch.device("cpu"))


def run(config: RunConfig, log: PreparedLog, folder: Path, resume: bool = False):
    return train(config, log, folder, ALONE, show_progress=False, resume=resume)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Expect the same metrics and weights, to the last bit."""
    assert lines(one) == lines(other)
    weights = load_model(one / MODEL).model.state_dict()
    for name, tensor in load_model(other / MODEL).model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_training_lowers_the_loss_and_keeps_the_best_epoch(log, tmp_path):
    trained = run(run_config(max_epochs=6), log, tmp_path / "run")
    *epochs, test = lines(tmp_path / "run")
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert test["part"] == "test"
    assert trained.metrics == {key: value for key, value in test.items() if key != "part"}
    best = load_run_state(tmp_path / "run" / CHECKPOINT).progress
    assert best.best_metric == max(line["auc"] for line in epochs)


def test_the_run_folder_holds_everything(log, tmp_path):
    run(run_config(max_epochs=1), log, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {CONFIG, METRICS, MODEL, REPORT, CHECKPOINT, COST}
    resolved = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert resolved["train"]["seed"] == 5
    assert resolved["data"]["split"] == "time"
    page = (tmp_path / "run" / REPORT).read_text()
    assert "<svg" in page
    assert "test-run" in page
    assert not re.search(r"(src|href)=.http", page)  # it needs no other host


def test_early_stopping_waits_for_patience(log, tmp_path):
    """A learning rate of nearly nothing: the first epoch stays the best."""
    config = run_config(max_epochs=9, patience=2, learning_rate=1e-12)
    run(config, log, tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 1 + 2 + 1


def test_two_runs_of_one_seed_are_equal(log, tmp_path):
    for name in "ab":
        run(run_config(max_epochs=2), log, tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_seed_is_another_run(log, tmp_path):
    one = run(run_config(max_epochs=1), log, tmp_path / "a")
    other = run(run_config(max_epochs=1, seed=6), log, tmp_path / "b")
    assert one.metrics != other.metrics


class _KilledError(Exception):
    """Stands for a kill: nothing of the run gets to clean up after it."""


@pytest.mark.parametrize("batch", [1, 8, 21])
def test_a_run_that_is_stopped_anywhere_ends_as_if_it_never_was(log, tmp_path, batch):
    config = run_config()
    run(config, log, tmp_path / "whole")
    ticks = iter(range(10_000))

    def dying_clock() -> float:  # asked a few times a batch
        if next(ticks) > 2 * batch:
            raise _KilledError
        return time.monotonic()

    with pytest.raises(_KilledError):
        train(config, log, tmp_path / "stopped", ALONE, show_progress=False, clock=dying_clock)
    run(config, log, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_kill_minus_nine_loses_nothing(world_log, tmp_path):
    """A real process, really killed in the middle of an epoch, ends like an undisturbed one."""
    config = tmp_path / "run.toml"
    config.write_text(
        'name = "killed"\n[features]\nhistory_length = 16\n'
        '[model]\nname = "imn"\nembedding_dim = 4\nhead_units = [8]\n'
        "[train]\nbatch_size = 2\nmax_epochs = 3\ncheckpoint_every_s = 0.05\n"
    )
    command = [sys.executable, "-m", "training", "train", str(config), str(world_log)]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen([*command, str(stopped)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not _is_within_an_epoch(stopped / CHECKPOINT):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (stopped / MODEL).exists()
    subprocess.run([*command, str(stopped), "--resume", "--no-progress"], check=True)
    subprocess.run([*command, str(whole), "--no-progress"], check=True)
    assert_same_run(whole, stopped)


def _is_within_an_epoch(checkpoint: Path) -> bool:
    return checkpoint.exists() and load_run_state(checkpoint).progress.next_batch > 0


def test_a_finished_run_can_be_resumed_to_the_same_end(log, tmp_path):
    config = run_config(max_epochs=1)
    first = run(config, log, tmp_path / "run")
    assert run(config, log, tmp_path / "run", resume=True).metrics == first.metrics


def test_a_folder_with_a_run_is_not_overwritten(log, tmp_path):
    run(run_config(max_epochs=1), log, tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a run: go on with --resume"):
        run(run_config(max_epochs=1), log, tmp_path / "run")


def test_a_run_with_other_settings_is_not_resumed(log, tmp_path):
    run(run_config(max_epochs=1), log, tmp_path / "run")
    with pytest.raises(CheckpointError, match="other settings"):
        run(run_config(max_epochs=2), log, tmp_path / "run", resume=True)


def test_popularity_is_tested_without_training(log, tmp_path):
    trained = run(run_config(model={"name": "popularity"}), log, tmp_path / "run")
    assert "auc" in trained.metrics
    assert "log_loss" not in trained.metrics  # an affinity is no probability
    assert trained.score_kind == "affinity"


def test_gradients_of_shared_batches_add_up(log):
    """The parts of two processes give the gradient of one, to rounding."""
    config = run_config()
    task = open_task(log, config)
    model = task.model.double()

    def gradients(rank: int, world_size: int) -> list[torch.Tensor]:
        batch = next(task.batches(0, first_batch=0, rank=rank, world_size=world_size))
        twin = copy.deepcopy(model)
        loss = task.loss(twin, batch, ALONE.device)
        return list(torch.autograd.grad(loss, list(twin.parameters())))

    whole = gradients(0, 1)
    for total, one, other in zip(whole, gradients(0, 2), gradients(1, 2), strict=True):
        torch.testing.assert_close(one + other, total, rtol=1e-6, atol=1e-9)


def test_two_processes_train_the_model_of_one(world_log, tmp_path):
    """torchrun with gloo: the same metrics, to rounding."""
    config = tmp_path / "run.toml"
    config.write_text(
        'name = "two"\n[features]\nhistory_length = 16\n'
        '[model]\nname = "imn"\nembedding_dim = 4\nhead_units = [8]\n'
        "[train]\nbatch_size = 16\nmax_epochs = 2\n"
    )
    arguments = ["train", str(config), str(world_log)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
    ]
    subprocess.run(
        [*torchrun, "-m", "training", *arguments, str(tmp_path / "two"), "--no-progress"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        capture_output=True,
    )
    subprocess.run(
        [sys.executable, "-m", "training", *arguments, str(tmp_path / "one"), "--no-progress"],
        check=True,
    )
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in ("train_loss", "auc", "log_loss"):
            if name in one:
                assert two[name] == pytest.approx(one[name], abs=2e-3), name
