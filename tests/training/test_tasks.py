"""What the training loop sees of click models and of next-item models."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from contract.catalogue import FIRST_ROW
from tests.training.data.conftest import make_log as make_log
from tests.training.runs import next_item_config, run_config
from training.__main__ import main
from training.calibration import Calibration, fit
from training.config import RunConfig
from training.data.loader import ClickBatch
from training.data.log import PreparedLog
from training.data.splits import Part
from training.distributed import Worker
from training.errors import ConfigError, TrainingError
from training.evaluation import evaluate, to_tensors
from training.losses import draw_rows
from training.models.bert4rec import BERT4Rec
from training.models.imn import IterativeMemoryNetwork
from training.models.next_item import NextItemModel
from training.models.sasrec import SASRec
from training.tasks import NEGATIVES, ClickTask, NextItemTask, TrainingStep, open_task
from training.trainer import METRICS, MODEL, train

CPU = torch.device("cpu")
SMALL = {"embedding_dim": 8}
MODELS = {
    "fpmc": {"name": "fpmc", **SMALL},
    "fpmc with users": {"name": "fpmc", "user_factor": "table", **SMALL},
    "gru4rec": {"name": "gru4rec", "hidden_units": 8, **SMALL},
    "sasrec": {"name": "sasrec", "ffn_units": 8, "layers": 1, **SMALL},
    "sasrec, relative": {
        "name": "sasrec",
        "ffn_units": 8,
        "positions": "relative",
        "user_embedding": True,
        **SMALL,
    },
    "bert4rec": {"name": "bert4rec", "ffn_units": 8, **SMALL},
    "linrec": {"name": "linrec", "ffn_units": 8, **SMALL},
    "linrec, causal": {"name": "linrec", "ffn_units": 8, "causal": True, **SMALL},
    "hstu": {"name": "hstu", **SMALL},
    "pkm_act": {"name": "pkm_act", "ffn_units": 8, "keys_per_side": 4, "experts": 2, **SMALL},
    "pkm_act, causal": {
        "name": "pkm_act",
        "form": "causal",
        "ffn_units": 8,
        "keys_per_side": 4,
        "experts": 2,
        "chunk": 3,
        **SMALL,
    },
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def task_of(log: PreparedLog, config: RunConfig) -> NextItemTask:
    task = open_task(log, config)
    assert isinstance(task, NextItemTask)
    return task


def click_task_of(log: PreparedLog, model: dict[str, object]) -> ClickTask:
    task = open_task(log, run_config(model={"embedding_dim": 4, **model}))
    assert isinstance(task, ClickTask)
    return task


def first_batch(task: ClickTask) -> ClickBatch:
    return next(task.batches(0, first_batch=0, rank=0, world_size=1))


def model_of(task: NextItemTask) -> NextItemModel:
    assert isinstance(task.model, NextItemModel)
    return task.model


def gradients(
    task: NextItemTask, *, rank: int = 0, world_size: int = 1, number: int = 0
) -> list[torch.Tensor]:
    """Return the gradients of a batch's share, of every parameter."""
    batches = task.batches(0, first_batch=number, rank=rank, world_size=world_size)
    loss = task.loss(task.model, next(batches), CPU)
    return list(torch.autograd.grad(loss, list(task.model.parameters())))


class TestOpened:
    def test_a_run_gets_the_task_of_its_model(self, log):
        assert isinstance(open_task(log, run_config()), ClickTask)
        task = task_of(log, next_item_config())
        assert isinstance(task.model, SASRec)
        assert isinstance(open_task(log, run_config()).model, IterativeMemoryNetwork)
        assert task.n_users == log.header.n_users
        assert len(task.item_counts) == task.catalogue.n_rows

    def test_validation_watches_the_first_protocol(self, log):
        assert open_task(log, run_config()).metric == "auc"
        assert task_of(log, next_item_config()).metric == "full_ndcg10"
        config = next_item_config(next_item={"protocols": ["uni100", "full"]})
        assert task_of(log, config).metric == "uni100_ndcg10"

    def test_a_model_that_looks_ahead_gets_prefixes(self, log):
        """So many a user; one that does not gets every target of a row."""
        linrec = {"name": "linrec", **SMALL}
        prefixes = task_of(log, next_item_config(model=linrec, next_item={"prefixes_per_user": 2}))
        assert prefixes.n_samples(0) == 2 * 60
        whole = task_of(log, next_item_config(model={**linrec, "causal": True}))
        assert whole.n_samples(0) == 60 * 8

    def test_a_log_of_rare_items_alone_is_refused(self, log):
        with pytest.raises(TrainingError, match="no item to learn"):
            open_task(log, next_item_config(data={"min_item_count": 10**6}))

    @pytest.mark.parametrize("model", [None, MODELS["linrec"]], ids=["rows", "prefixes"])
    def test_a_log_in_which_nothing_is_next_is_refused(self, make_log, model):
        """Of three behaviors two are held out."""
        log = make_log({"user": [1, 1, 1, 2], "item": [1, 2, 3, 1], "timestamp": [1, 2, 3, 1]})
        with pytest.raises(TrainingError, match="no user has two behaviors in the training part"):
            open_task(log, next_item_config(model=model))

    @pytest.mark.parametrize(
        "config",
        [
            pytest.param(next_item_config(calibration="platt"), id="of a next-item model"),
            pytest.param(
                run_config(model={"name": "popularity"}, calibration="platt"), id="of popularity"
            ),
            pytest.param(next_item_config(data={"click_rate": 0.1}), id="click rate"),
        ],
    )
    def test_affinities_are_not_calibrated(self, log, config):
        with pytest.raises(ConfigError, match=r"train\.calibration, data\.click_rate: for click"):
            open_task(log, config)

    @pytest.mark.parametrize(
        ("labels", "samples", "found"),
        [
            pytest.param([1, 1, 1, 1], "impressions", "samples of label 1 only", id="all clicked"),
            pytest.param([0, 0, 0, 0], "impressions", "samples of label 0 only", id="no clicks"),
            pytest.param([0, 0, 0, 0], "negatives", "no sample,", id="no clicks, negatives drawn"),
        ],
    )
    def test_a_validation_part_of_one_label_is_refused(
        self, make_log, tmp_path, labels, samples, found
    ):
        """Seconds 12 to 15. Nothing is trained, nor written."""
        log = make_log(
            {
                "user": [1, 2] * 10,
                "item": [5, 6, 7, 8] * 5,
                "timestamp": list(range(20)),
                "label": [0, 1, 1] * 4 + labels + [0, 1] * 2,
            }
        )
        data = {"samples": samples, "test_fraction": 0.2, "valid_fraction": 0.25}
        alone = Worker(device=CPU)
        with pytest.raises(TrainingError, match=f"the validation part holds {found}"):
            train(run_config(data=data), log, tmp_path / "run", alone, show_progress=False)
        assert not (tmp_path / "run").exists()
        open_task(log, run_config(data=data, model={"name": "popularity"}))  # trains nothing

    def test_clicks_to_which_no_negative_can_be_drawn_are_of_one_label(self, make_log):
        """There is one item, and all have chosen it."""
        columns = {"user": [1, 2] * 10, "item": [5] * 20, "timestamp": list(range(20))}
        with pytest.raises(TrainingError, match="the validation part holds samples of label 1"):
            open_task(make_log(columns), run_config())


class TestLoss:
    def test_is_the_mean_over_the_targets_of_the_batch(self, log):
        task = task_of(log, next_item_config())
        model = model_of(task).eval()
        batch = next(task.batches(0, first_batch=0, rank=0, world_size=1))
        targets = torch.from_numpy(batch.targets)
        vectors = model.encode(
            torch.from_numpy(batch.history_items), torch.from_numpy(batch.history_buckets)
        )
        logits = vectors[targets > 0] @ model.item_table()[1:].T
        expected = cross_entropy(logits, targets[targets > 0] - 1)
        torch.testing.assert_close(task.loss(model, batch, CPU), expected)

    def test_of_the_targets_that_a_model_hides_is_about_their_mean(self, log):
        """Of all targets, the model learns from a share."""
        task = task_of(log, next_item_config(model=MODELS["bert4rec"], batch_size=60))
        model = model_of(task)
        assert isinstance(model, BERT4Rec)
        batch = next(task.batches(0, first_batch=0, rank=0, world_size=1))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            losses = [task.loss(model.eval(), batch, CPU).item() for _ in range(30)]
        # Untrained, every item is about as likely; a row hides one item at least, so a bit more.
        even = np.log(task.catalogue.n_rows - 1)
        assert 0.9 * even < np.mean(losses) < 1.6 * even

    @pytest.mark.parametrize("name", [name for name in MODELS if name != "bert4rec"])
    def test_parts_of_two_processes_give_the_gradient_of_one(self, log, name):
        """To rounding. What BERT4Rec hides is drawn by each process."""
        model = MODELS[name]
        task = task_of(log, next_item_config(model={**model, **undropped(model)}, batch_size=7))
        parts = zip(
            gradients(task, rank=0, world_size=2),
            gradients(task, rank=1, world_size=2),
            strict=True,
        )
        for whole, (one, other) in zip(gradients(task), parts, strict=True):
            torch.testing.assert_close(one + other, whole, rtol=1e-4, atol=1e-6)

    @every_model
    @pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bce"])
    def test_of_no_row_is_0_with_a_gradient_for_every_parameter(self, log, model, loss):
        """A process for which a batch has no row left must still take part in the step."""
        config = next_item_config(model=model, next_item={"loss": loss}, batch_size=1)
        task = task_of(log, config)
        batch = next(task.batches(0, first_batch=0, rank=1, world_size=2))
        assert not batch.targets.any()
        assert task.loss(task.model, batch, CPU).item() == 0
        assert not any(part.any() for part in gradients(task, rank=1, world_size=2))

    @every_model
    def test_has_a_gradient_for_every_parameter(self, log, model):
        """Else the processes of a run would wait for it without end."""
        for part in gradients(task_of(log, next_item_config(model=model))):
            assert part.isfinite().all()


def undropped(model: dict[str, object]) -> dict[str, object]:
    settings: dict[str, object] = {} if model["name"] == "fpmc" else {"dropout": 0.0}
    return settings | ({"user_dropout": 0.0} if model["name"] == "sasrec" else {})


class TestLossOfClicks:
    def loss_of(
        self, log: PreparedLog, model: dict[str, object]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of the first batch, and the BCE of its logits."""
        task = click_task_of(log, model)
        batch = first_batch(task)
        with torch.no_grad():
            loss = task.loss(task.model, batch, CPU)
            logits_BC = task.model(*to_tensors(batch.inputs, CPU))
        labels_BC = torch.from_numpy(batch.labels)
        return loss, binary_cross_entropy_with_logits(logits_BC[batch.mask], labels_BC[batch.mask])

    @pytest.mark.parametrize("name", ["imn", "youtube_dnn", "din", "sasrec_click"])
    def test_is_the_bce(self, log, name):
        torch.testing.assert_close(*self.loss_of(log, {"name": name}))

    def test_of_dien_has_that_of_the_next_behavior_beside_it(self, log):
        """Untrained, about log 2 for the true and as much for the drawn one."""
        without, bce = self.loss_of(log, {"name": "dien", "auxiliary_weight": 0.0})
        torch.testing.assert_close(without, bce)
        for weight in (1.0, 3.0):
            loss, bce = self.loss_of(log, {"name": "dien", "auxiliary_weight": weight})
            assert (loss - bce).item() == pytest.approx(weight * 2 * math.log(2), rel=0.2)

    def test_of_mimn_has_that_of_slots_used_unevenly(self, log):
        loss, bce = self.loss_of(log, {"name": "mimn"})
        torch.testing.assert_close(loss, bce)
        loss, bce = self.loss_of(log, {"name": "mimn", "utilisation_weight": 10.0})
        assert loss > bce

    def test_of_ubr4ctr_trains_the_selection(self, log):
        task = click_task_of(log, {"name": "ubr4ctr"})
        task.loss(task.model, first_batch(task), CPU).backward()
        assert all(parameter.grad is not None for parameter in task.model.parameters())

    def test_negatives_of_dien_are_drawn_by_popularity(self, log):
        task = click_task_of(log, {"name": "dien"})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rows = draw_rows(task._loss.cumulative_R, (100, 1000), CPU)
        counts = task.item_counts.double()
        counts[:FIRST_ROW] = 0
        found = torch.bincount(rows.flatten(), minlength=len(counts)) / rows.numel()
        torch.testing.assert_close(found.double(), counts / counts.sum(), rtol=0, atol=0.005)


class TestStep:
    @every_model
    def test_in_bf16_is_about_that_in_float32(self, log, model):
        """Weights, loss and gradients stay float32."""
        task = task_of(log, next_item_config(model={**model, **undropped(model)}))
        batch = next(task.batches(0, first_batch=0, rank=0, world_size=1))
        found = {}
        for bf16 in (False, True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                loss = TrainingStep(task.model, task, bf16=bf16)(batch, CPU)
            task.model.zero_grad()
            loss.backward()
            assert loss.dtype == torch.float32
            grads = [p.grad for p in task.model.parameters() if p.grad is not None]
            assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
            found[bf16] = loss.item()
        assert found[True] == pytest.approx(found[False], rel=0.03)
        assert found[True] != found[False]

    def test_has_the_models_parameters(self, log):
        task = task_of(log, next_item_config())
        step = TrainingStep(task.model, task)
        assert list(step.parameters()) == list(task.model.parameters())


class TestEvaluation:
    def test_of_the_test_part_is_under_every_protocol(self, log):
        task = task_of(log, next_item_config())
        valid = task.evaluate(task.model, Part.VALID, CPU)
        test = task.evaluate(task.model, Part.TEST, CPU)
        protocols = {name.rpartition("_")[0] for name in test} - {"n"}
        assert protocols == {"full", "pop100", "pop100_history_excluded"}
        assert {name.rpartition("_")[0] for name in valid} == {"full", "n"}
        assert valid["n_samples"] == test["n_samples"] == 60

    def test_of_the_training_part_is_refused(self, log):
        task = task_of(log, next_item_config())
        with pytest.raises(ConfigError, match="ranked on its valid or test part, not on train"):
            task.evaluate(task.model, Part.TRAIN, CPU)

    def test_keeps_what_its_targets_were_ranked_against(self, log, tmp_path):
        task = task_of(log, next_item_config(next_item={"protocols": ["full", "uni100"]}))
        task.save_evaluation(tmp_path)
        with np.load(tmp_path / NEGATIVES) as saved:
            assert set(saved) == {"uni100"}
            assert saved["uni100"].shape == (60, 20)

    @pytest.mark.parametrize(
        "config", [run_config(), next_item_config(next_item={"protocols": ["full"]})]
    )
    def test_keeps_nothing_where_nothing_was_drawn(self, log, tmp_path, config):
        open_task(log, config).save_evaluation(tmp_path)
        assert list(tmp_path.iterdir()) == []


def click_task(log: PreparedLog, **settings: Any) -> ClickTask:
    task = open_task(log, run_config(**settings))
    assert isinstance(task, ClickTask)
    return task


class Knows(nn.Module):
    """A click model with the logit of a known rate for all items, but a little for each row."""

    def __init__(self, rate: float, per_row: float = 1e-3) -> None:
        super().__init__()
        self.logit = math.log(rate / (1 - rate))
        self.per_row = per_row

    def forward(self, _items, _buckets, candidates):
        return self.logit + self.per_row * candidates.float()


class Indifferent(nn.Module):
    """A click model to which all items are alike."""

    def forward(self, _items, _buckets, candidates):
        return torch.zeros(candidates.shape)


class TestCalibration:
    @pytest.mark.parametrize("method", ["platt", "isotonic"])
    def test_is_that_of_the_validation_part(self, log, method):
        task = click_task(log, calibration=method)
        model = Knows(0.3, per_row=-1e-3)  # in this log the first rows are clicked more often
        found = task.calibrate(model, CPU)
        valid = evaluate(model, "affinity", task.data.loaders[Part.VALID], CPU)
        expected = fit(method, valid.labels, valid.scores)
        assert found is not None
        assert found.as_fields() == expected.as_fields()

    def test_of_a_run_that_asks_for_none_is_none(self, log):
        task = click_task(log)
        assert task.calibrate(task.model, CPU) is None
        other = task_of(log, next_item_config())
        other.calibrate(other.model, CPU)

    def test_that_nothing_tells_is_left_out_and_said(self, log, caplog):
        task = click_task(log, calibration="platt")
        assert task.calibrate(Indifferent(), CPU) is None
        (message,) = (record.getMessage() for record in caplog.records)
        assert message == (
            "probabilities are left uncalibrated: the logits are all equal, or not finite"
        )

    def test_of_sampled_negatives_is_for_the_click_rate_that_is_said(self, log):
        """Each click has three negatives; with one in a hundred it has 99."""
        data = {"samples": "negatives", "n_negatives": 3, "click_rate": 0.01}
        task = click_task(log, data=data)
        found = task.calibrate(task.model, CPU)
        assert found is not None
        assert found(torch.tensor(0.25)).item() == pytest.approx(0.25 - math.log(33))
        assert found.method == "none"

    def test_is_moved_to_that_rate_where_both_are_asked_for(self, log):
        data = {"samples": "negatives", "n_negatives": 3}
        fitted, moved = (
            task.calibrate(task.model, CPU)
            for task in (
                click_task(log, data=data, calibration="platt"),
                click_task(log, data={**data, "click_rate": 0.01}, calibration="platt"),
            )
        )
        assert fitted is not None
        assert moved is not None
        difference = moved(torch.tensor(0.5)) - fitted(torch.tensor(0.5))
        assert difference.item() == pytest.approx(-math.log(33), abs=1e-5)

    def test_metrics_are_those_before_and_after(self, log):
        task = click_task(log, calibration="platt")
        plain = task.evaluate(task.model, Part.TEST, CPU)
        line = Calibration("platt", slope=1.0, knots=[0.0], values=[2.0])
        found = task.evaluate(task.model, Part.TEST, CPU, line)
        names = {"log_loss", "brier_score", "calibration_ratio", "expected_calibration_error"}
        assert found.keys() - plain.keys() == {f"{name}_uncalibrated" for name in names}
        for name in plain:
            before = found.get(f"{name}_uncalibrated", found[name])
            assert before == pytest.approx(plain[name], rel=1e-6), name
        assert found["calibration_ratio"] > 1.5 * plain["calibration_ratio"]

    def test_metrics_are_those_of_the_click_rate_that_is_said(self, log):
        """Of the samples of which one in four is a click, one in a hundred is."""
        data = {"samples": "negatives", "n_negatives": 3, "click_rate": 0.01}
        task = click_task(log, data=data)
        model = Knows(rate=1 / 4)
        found = task.evaluate(model, Part.TEST, CPU, task.calibrate(model, CPU))
        assert found["calibration_ratio"] == pytest.approx(1, abs=0.1)
        assert found["calibration_ratio_uncalibrated"] == pytest.approx(25, rel=0.1)
        # That of a coin which falls on one side once in a hundred times.
        entropy = -0.01 * math.log(0.01) - 0.99 * math.log(0.99)
        assert found["log_loss"] == pytest.approx(entropy, rel=0.05)
        assert found["brier_score"] == pytest.approx(0.01 * 0.99, rel=0.05)


@pytest.fixture(scope="module")
def finished(world_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a SASRec with user embeddings."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = next_item_config(model=MODELS["sasrec, relative"], max_epochs=2)
    train(config, PreparedLog(world_log), folder, Worker(device=CPU), show_progress=False)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


class TestCommand:
    """`python -m training evaluate`."""

    def test_of_the_test_part_gives_the_metrics_of_the_run(self, finished, world_log, capsys):
        assert main(["evaluate", str(finished / MODEL), str(world_log)]) == 0
        printed = capsys.readouterr().out
        expected = lines(finished)[-1]
        assert expected.pop("part") == "test"
        assert len(expected) == 3 * 6 + 1
        for name, value in expected.items():
            shown = f"{value:,.0f}" if name == "n_samples" else f"{value:.4f}"
            assert re.search(rf"^  {name} *{shown}$", printed, re.MULTILINE), name

    def test_of_the_validation_part_gives_what_training_watched(self, finished, world_log, capsys):
        best = max(line["full_ndcg10"] for line in lines(finished)[:-1])
        assert main(["evaluate", str(finished / MODEL), str(world_log), "--part", "valid"]) == 0
        assert re.search(rf"full_ndcg10 +{best:.4f}\n", capsys.readouterr().out)

    def test_of_the_training_part_is_refused_in_one_line(self, finished, world_log, capsys):
        assert main(["evaluate", str(finished / MODEL), str(world_log), "--part", "train"]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: .* not on train\n", error)
