"""The training loop: it learns, it is exact, and a kill at any moment changes nothing."""

import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training.tasks
from tests.training.data.conftest import make_log as make_log
from tests.training.runs import next_item_config, run_config
from training.checkpoint import load_model, load_run_state
from training.config import RunConfig, load_config
from training.data.log import PreparedLog
from training.data.splits import Part
from training.distributed import Worker, join_workers
from training.errors import CheckpointError, TrainingError
from training.tasks import NEGATIVES, NextItemTask, open_task
from training.trainer import CHECKPOINT, CONFIG, COST, METRICS, MODEL, REPORT, train

ALONE = Worker(device=torch.device("cpu"))
SASREC = {"name": "sasrec", "embedding_dim": 8, "layers": 2, "ffn_units": 12}


def run(config: RunConfig, log: PreparedLog, folder: Path, resume: bool = False):
    return train(config, log, folder, ALONE, show_progress=False, resume=resume)


class _KilledError(Exception):
    """Stands for a kill: nothing of the run gets to clean up after it."""


def ticking(*, stop_at: int = 100_000) -> Callable[[], float]:
    """Return a clock that is a second later whenever it is asked."""
    seconds = itertools.count()

    def clock() -> float:
        now = next(seconds)
        if now >= stop_at:
            raise _KilledError
        return float(now)

    return clock


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


class TestCalibration:
    @pytest.mark.parametrize("method", ["platt", "isotonic"])
    def test_is_of_the_best_epoch_and_kept_with_it(self, log, tmp_path, method):
        """Training itself is the same; in what follows, metrics and scores are calibrated."""
        plain = run(run_config(max_epochs=2), log, tmp_path / "plain")
        trained = run(run_config(max_epochs=2, calibration=method), log, tmp_path / "run")
        assert lines(tmp_path / "run")[:-1] == lines(tmp_path / "plain")[:-1]
        assert plain.calibration is None
        kept = load_model(tmp_path / "run" / MODEL).calibration
        assert kept is not None
        assert trained.calibration is not None
        assert kept.as_fields() == trained.calibration.as_fields()
        assert kept.method == method

        task = open_task(log, run_config(calibration=method))
        again = task.calibrate(plain.model, ALONE.device)
        assert again is not None
        assert again.as_fields() == kept.as_fields()
        assert trained.metrics == task.evaluate(plain.model, Part.TEST, ALONE.device, kept)
        assert trained.metrics["auc"] == pytest.approx(plain.metrics["auc"], abs=1e-4)
        before = trained.metrics["log_loss_uncalibrated"]
        assert before == pytest.approx(plain.metrics["log_loss"], rel=1e-5)
        assert "expected_calibration_error_uncalibrated" in (
            (tmp_path / "run" / REPORT).read_text()
        )

    def test_that_cannot_be_fitted_loses_no_run(self, log, tmp_path, monkeypatch, caplog):
        def refuse(*_arguments: Any) -> None:
            raise TrainingError("too strange")

        monkeypatch.setattr(training.tasks, "fit", refuse)
        trained = run(run_config(max_epochs=1, calibration="platt"), log, tmp_path / "run")
        assert "probabilities are left uncalibrated: too strange" in caplog.text
        assert trained.calibration is None
        assert load_model(tmp_path / "run" / MODEL).calibration is None
        assert "log_loss" in trained.metrics
        assert "log_loss_uncalibrated" not in trained.metrics

    def test_of_a_stopped_run_is_that_of_a_whole_one(self, log, tmp_path):
        config = run_config(calibration="isotonic")
        run(config, log, tmp_path / "whole")
        stopped_run(config, log, tmp_path / "stopped", 20)
        assert_same_run(tmp_path / "whole", tmp_path / "stopped")
        whole, stopped = (
            load_model(tmp_path / name / MODEL).calibration for name in ("whole", "stopped")
        )
        assert whole is not None
        assert stopped is not None
        assert whole.as_fields() == stopped.as_fields()


def test_a_run_from_before_a_setting_goes_on_with_its_default(log, tmp_path):
    config = run_config(max_epochs=1)
    first = run(config, log, tmp_path / "run")
    content = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    del content["fields"]["config"]["train"]["calibration"]
    del content["fields"]["config"]["data"]["click_rate"]
    torch.save(content, tmp_path / "run" / CHECKPOINT)
    assert run(config, log, tmp_path / "run", resume=True).metrics == first.metrics
    with pytest.raises(CheckpointError, match="other settings"):
        run(run_config(max_epochs=1, calibration="platt"), log, tmp_path / "run", resume=True)


def test_a_run_with_settings_that_are_no_more_is_not_resumed(log, tmp_path):
    config = run_config(max_epochs=1)
    run(config, log, tmp_path / "run")
    content = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    content["fields"]["config"]["train"]["warp"] = 9
    torch.save(content, tmp_path / "run" / CHECKPOINT)
    with pytest.raises(CheckpointError, match="other settings"):
        run(config, log, tmp_path / "run", resume=True)


def test_that_of_a_next_item_model_holds_its_negatives_too(log, tmp_path):
    run(next_item_config(max_epochs=1), log, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {CONFIG, METRICS, MODEL, REPORT, CHECKPOINT, COST, NEGATIVES}
    assert "full_ndcg10" in (tmp_path / "run" / REPORT).read_text()


def test_every_target_counts_alike_whichever_batch_it_is_in(log, tmp_path, monkeypatch):
    """Batches hold rows of about one length, and so very different numbers of targets."""
    config = next_item_config(model={**SASREC, "dropout": 0.0}, max_epochs=1, batch_size=7)
    taken: list[list[torch.Tensor]] = []

    def step(optimizer: torch.optim.Adam) -> None:
        parameters = optimizer.param_groups[0]["params"]
        taken.append([parameter.grad.clone() for parameter in parameters])

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    run(config, log, tmp_path / "run")
    task = open_task(log, config)
    batches = list(task.batches(0, first_batch=0, rank=0, world_size=1))
    mean_targets = sum(batch.n_samples for batch in batches) / len(batches)
    assert len({batch.n_samples for batch in batches}) > 1
    parameters = list(task.model.train().parameters())
    for batch, found in zip(batches, taken, strict=True):
        summed = task.loss(task.model, batch, ALONE.device) * batch.n_samples
        expected = torch.autograd.grad(summed / mean_targets, parameters)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_next_item_model_learns_what_follows(make_log, tmp_path):
    """Every user goes round one circle of ten items: what is next is certain."""
    starts = range(40)
    log = make_log(
        {
            "user": [u for u in starts for _ in range(12)],
            "item": [1 + (u + n) % 10 for u in starts for n in range(12)],
            "timestamp": [n for _ in starts for n in range(12)],
        }
    )
    config = next_item_config(
        next_item={"protocols": ["full_history_included", "uni100"]}, max_epochs=30, patience=30
    )
    trained = run(config, log, tmp_path / "run")
    assert trained.metrics["full_history_included_ndcg10"] > 0.95
    assert trained.score_kind == "affinity"


class TestCost:
    def cost(self, folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / COST).read_text())
        return found

    def test_is_what_the_run_took(self, log, tmp_path):
        trained = run(next_item_config(max_epochs=2), log, tmp_path / "run")
        cost = self.cost(tmp_path / "run")
        assert cost["epochs"] == 2
        assert cost["best_epoch"] in (0, 1)
        assert cost["trained_s"] > 0
        assert cost["parameters"] == sum(p.numel() for p in trained.model.parameters())
        assert cost["device"] == "cpu"
        assert cost["threads"] == torch.get_num_threads()

    def test_of_a_resumed_run_is_that_of_all_its_steps(self, log, tmp_path):
        """A clock that ticks once a question: as many seconds as without the stop, about."""
        config = next_item_config(max_epochs=3)
        train(config, log, tmp_path / "whole", ALONE, show_progress=False, clock=ticking())
        stopped_run(config, log, tmp_path / "run", 20)
        whole, resumed = self.cost(tmp_path / "whole"), self.cost(tmp_path / "run")
        assert resumed["trained_s"] == pytest.approx(whole["trained_s"], abs=4)
        assert resumed | {"trained_s": 0} == whole | {"trained_s": 0}

    def test_of_popularity_is_nothing(self, log, tmp_path):
        run(run_config(model={"name": "popularity"}), log, tmp_path / "run")
        cost = self.cost(tmp_path / "run")
        assert (cost["epochs"], cost["trained_s"], cost["parameters"]) == (0, 0.0, 0)


class TestTimeLimit:
    def epochs(self, log: PreparedLog, folder: Path, **train_settings: Any) -> list[dict[str, Any]]:
        config = next_item_config(max_epochs=6, patience=9, **train_settings)
        train(config, log, folder, ALONE, show_progress=False, clock=ticking())
        *epochs, _ = lines(folder)
        return epochs

    def test_ends_training_with_the_epoch_in_which_it_is_reached(self, log, tmp_path):
        """The time of validation does not count, nor does a stop in the middle of an epoch."""
        assert len(self.epochs(log, tmp_path / "free")) == 6
        epoch_s = json.loads((tmp_path / "free" / COST).read_text())["trained_s"] / 6
        for limit, n_epochs in ((0.5, 1), (1.0, 1), (2.5, 3), (9.0, 6)):
            folder = tmp_path / str(limit)
            epochs = self.epochs(log, folder, max_train_s=limit * epoch_s)
            assert len(epochs) == n_epochs
            # The epochs that there are were trained as without a limit.
            assert epochs == lines(tmp_path / "free")[:n_epochs]

    def test_validates_the_last_epoch_in_any_case(self, log, tmp_path):
        (epoch,) = self.epochs(log, tmp_path / "run", max_train_s=1.0, validate_every=4)
        assert "full_ndcg10" in epoch
        assert (tmp_path / "run" / MODEL).exists()

    def test_ends_a_run_for_good(self, log, tmp_path):
        config = next_item_config(max_epochs=6, max_train_s=1.0)
        folder = tmp_path / "run"
        first = train(config, log, folder, ALONE, show_progress=False, clock=ticking())
        again = run(config, log, folder, resume=True)
        assert len(lines(folder)) == 2
        assert again.metrics == first.metrics


class TestValidateEvery:
    def test_so_many_epochs_and_after_the_last(self, log, tmp_path):
        run(next_item_config(max_epochs=5, patience=5, validate_every=2), log, tmp_path / "run")
        *epochs, _ = lines(tmp_path / "run")
        assert ["full_ndcg10" in line for line in epochs] == [False, True, False, True, True]
        assert all(line["train_loss"] > 0 for line in epochs)
        best = load_run_state(tmp_path / "run" / CHECKPOINT).progress
        validated = {line["epoch"]: line["full_ndcg10"] for line in epochs if len(line) > 3}
        assert best.best_metric == max(validated.values()) == validated[best.best_epoch]

    def test_patience_counts_validations(self, log, tmp_path):
        """A learning rate of nearly nothing: what the second epoch is like stays the best."""
        config = next_item_config(max_epochs=9, patience=2, validate_every=2, learning_rate=1e-12)
        run(config, log, tmp_path / "run")
        assert len(lines(tmp_path / "run")) == 2 + 2 * 2 + 1

    def test_trains_the_weights_of_every_epoch(self, log, tmp_path):
        """It changes when is measured, not what is learned."""
        for every in (1, 3):
            config = next_item_config(max_epochs=3, validate_every=every)
            run(config, log, tmp_path / str(every))
        one, other = (load_run_state(tmp_path / n / CHECKPOINT) for n in "13")
        for name, tensor in one.model.items():
            assert torch.equal(tensor, other.model[name]), name


def test_in_bf16_weights_stay_float32_and_training_about_the_same(log, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        config = next_item_config(precision=precision, batch_size=8)
        trained = run(config, log, tmp_path / precision)
        assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
        found[precision] = [line["train_loss"] for line in lines(tmp_path / precision)[:-1]]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.02)
    assert found["bf16"] != found["fp32"]


@pytest.mark.parametrize("config", [run_config, next_item_config], ids=["clicks", "next items"])
def test_a_run_that_diverges_is_an_error(log, tmp_path, config):
    """Whose ranks would be numbers all the same."""
    with pytest.raises(TrainingError, match=r"epoch 1: training diverged, its loss is (nan|inf)"):
        run(config(learning_rate=1e30), log, tmp_path / "run")
    assert not (tmp_path / "run" / MODEL).exists()


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


def stopped_run(config: RunConfig, log: PreparedLog, folder: Path, ticks: int) -> None:
    """Start a run and stop it when it has asked its clock so often; it does so a few times a batch.

    Resume it then.
    """
    with pytest.raises(_KilledError):
        train(config, log, folder, ALONE, show_progress=False, clock=ticking(stop_at=ticks))
    train(config, log, folder, ALONE, resume=True, show_progress=False, clock=ticking())


@pytest.mark.parametrize("batch", [1, 8, 21])
def test_a_run_that_is_stopped_anywhere_ends_as_if_it_never_was(log, tmp_path, batch):
    run(run_config(), log, tmp_path / "whole")
    stopped_run(run_config(), log, tmp_path / "stopped", 2 * batch)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


# Everything that is drawn in training: dropout, hidden users and items, negatives, prefixes.
DRAWN = [
    pytest.param(
        {
            "model": {**SASREC, "dropout": 0.3, "user_embedding": True},
            "data": {"unknown_rate": 0.1},
        },
        id="dropout",
    ),
    pytest.param(
        {"model": SASREC, "next_item": {"loss": "bce", "negatives": "popularity", "rows": "all"}},
        id="negatives",
    ),
    pytest.param(
        {"model": {"name": "linrec", "embedding_dim": 8, "ffn_units": 8}, "validate_every": 2},
        id="prefixes",
    ),
]


@pytest.mark.parametrize("settings", DRAWN)
def test_so_does_one_of_a_next_item_model_to_the_last_bit(log, tmp_path, settings):
    """Four batches an epoch, stopped in the first, in the second and between two."""
    config = next_item_config(**settings, max_epochs=2)
    run(config, log, tmp_path / "whole")
    for ticks in (6, 14, 22):
        folder = tmp_path / f"stopped-{ticks}"
        stopped_run(config, log, folder, ticks)
        assert_same_run(tmp_path / "whole", folder)


def test_what_a_run_draws_leaves_torchs_generator_as_it_was(log, tmp_path):
    before = torch.random.get_rng_state()
    run(next_item_config(max_epochs=1), log, tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_each_step_draws_anew(log, tmp_path, monkeypatch):
    """In its epoch, and in every other."""
    draws = []
    plain_loss = NextItemTask.loss

    def loss(*arguments: Any) -> torch.Tensor:
        draws.append(torch.random.get_rng_state().numpy().tobytes())
        return plain_loss(*arguments)

    monkeypatch.setattr(NextItemTask, "loss", loss)
    run(next_item_config(max_epochs=2), log, tmp_path / "run")
    assert len(draws) == 2 * 4
    assert len(set(draws)) == len(draws)


def test_kill_minus_nine_loses_nothing(world_log, tmp_path):
    """A real process, really killed in the middle of an epoch, ends like an undisturbed one."""
    config = tmp_path / "run.toml"
    config.write_text(
        'name = "killed"\n[features]\nhistory_length = 16\n'
        '[model]\nname = "imn"\nembedding_dim = 4\nhead_units = [8]\n'
        "[train]\nbatch_size = 2\nmax_epochs = 2\ncheckpoint_every_s = 0.05\n"
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
    with join_workers() as worker:  # on the device that the command takes
        train(load_config(config), PreparedLog(world_log), whole, worker, show_progress=False)
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


RUN_FILES = {
    "clicks": (
        'name = "two"\n[features]\nhistory_length = 16\n'
        '[model]\nname = "imn"\nembedding_dim = 4\nhead_units = [8]\n'
        "[train]\nbatch_size = 16\nmax_epochs = 2\n"
    ),
    # Of 60 rows, the last batch holds one: the second process has none of it.
    "next items": (
        'name = "two"\n[features]\nhistory_length = 16\n'
        '[data]\nsplit = "leave-one-out"\nunknown_rate = 0.1\n'
        '[model]\nname = "sasrec"\nembedding_dim = 4\nffn_units = 8\ndropout = 0.0\n'
        "user_embedding = true\nuser_dropout = 0.0\n"
        "[train]\nbatch_size = 59\nmax_epochs = 2\nlearning_rate = 0.01\n"
    ),
}


@pytest.mark.parametrize("kind", RUN_FILES)
def test_two_processes_train_the_model_of_one(world_log, tmp_path, kind):
    """torchrun with gloo: the same losses, metrics and weights, to rounding."""
    config = tmp_path / "run.toml"
    config.write_text(RUN_FILES[kind])
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
    one = load_config(config)
    train(one, PreparedLog(world_log), tmp_path / "one", ALONE, show_progress=False)
    both = zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True)
    for expected, found in both:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 2e-2 if "100" in name else 2e-3
            assert found[name] == pytest.approx(value, abs=tolerance), name
    weights = load_model(tmp_path / "one" / MODEL).model.state_dict()
    for name, tensor in load_model(tmp_path / "two" / MODEL).model.state_dict().items():
        # A bias of keys changes no softmax: its gradient is rounding, which Adam makes large.
        if not name.endswith("key_value.bias"):
            torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4, msg=name)
