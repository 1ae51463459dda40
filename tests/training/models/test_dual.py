"""Items as sequences of users: what they are made of, their losses, and that no model keeps them.

Shapes: I items, L history length, R catalogue rows, U user rows, P choices, D embedding width.
"""

import json
import time

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from contract.catalogue import FIRST_ROW
from contract.features import FeatureSpec
from training.checkpoint import load_model, load_run_state
from training.config import NextItemConfig, RunConfig, parse_config
from training.data.next_item_data import open_next_item_data
from training.data.splits import Part
from training.distributed import Worker
from training.errors import ConfigError, TrainingError
from training.losses import NextItemLoss
from training.models.dual import DualTask, StopGradient, UserSequences, inconsistency
from training.models.encoder import ItemEncoder
from training.models.next_item import NextItemModel
from training.models.sasrec import SASRec
from training.tasks import NextItemTask, open_task
from training.trainer import CHECKPOINT, COST, METRICS, MODEL, train

ALONE = Worker(device=torch.device("cpu"))
WIDTH, LENGTH = 8, 6
SASREC = {"name": "sasrec", "embedding_dim": 8, "layers": 1, "heads": 1, "ffn_units": 8}

# Users 0 .. 3; items in rows 2 .. 5. Row 4 was chosen once only, row 5 never.
USERS = torch.tensor([0, 0, 0, 1, 1, 2, 3])
ROWS = torch.tensor([2, 3, 4, 3, 2, 2, 2])
TIMES = torch.tensor([30, 40, 50, 10, 20, 20, 90])


def sequences() -> UserSequences:
    return UserSequences(USERS, ROWS, TIMES, n_users=4, n_rows=6)


def network(n_rows: int, seed: int) -> SASRec:
    """Return a SASRec without dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SASRec(
            ItemEncoder(n_rows, WIDTH),
            FeatureSpec(history_length=LENGTH),
            embedding_dim=WIDTH,
            n_layers=1,
            n_heads=2,
            ffn_units=8,
            dropout=0.0,
        )


def dual_task(
    *,
    user_weight=1.0,
    consistency_weight=1.0,
    stop_gradient: StopGradient = "none",
    settings: NextItemConfig | None = None,
) -> DualTask:
    pairs = sequences()
    return DualTask(
        network(4 + FIRST_ROW, seed=1),
        pairs,
        NextItemLoss(settings or NextItemConfig(), pairs.counts_U),
        history_length=LENGTH,
        user_weight=user_weight,
        consistency_weight=consistency_weight,
        stop_gradient=stop_gradient,
    )


def run_config(*, dual_weight=0.5, consistency_weight=0.5, seed=5, model=SASREC) -> RunConfig:
    return parse_config(
        {
            "name": "dual",
            "features": {"history_length": 16},
            "data": {"split": "leave-one-out"},
            "next_item": {
                "protocols": ["full"],
                "dual_weight": dual_weight,
                "consistency_weight": consistency_weight,
            },
            "model": model,
            "train": {"batch_size": 16, "max_epochs": 2, "checkpoint_every_s": 0.0, "seed": seed},
        },
        "test",
    )


class TestUserSequences:
    def test_users_by_hand(self):
        """Oldest first; users 1 and 2 chose row 2 in one second, and come in their own order."""
        assert sequences().newest(torch.tensor([2, 3]), LENGTH).tolist() == [
            [3, 4, 2, 5],
            [0, 0, 3, 2],
        ]

    def test_the_newest_stay(self):
        assert sequences().newest(torch.tensor([3, 2]), 3).tolist() == [[0, 3, 2], [4, 2, 5]]

    def test_items_and_users_are_counted(self):
        assert sequences().items.tolist() == [2, 3]
        assert sequences().counts_U.tolist() == [0, 0, 3, 2, 1, 1]

    def test_no_item_was_chosen_twice(self):
        with pytest.raises(TrainingError, match="no item has two behaviors"):
            UserSequences(USERS[:3], ROWS[:3], TIMES[:3], n_users=1, n_rows=6)

    def test_nothing_held_out_is_among_them(self, log):
        """Against a loop over the training part of the log."""
        data = open_next_item_data(log, run_config())
        choices = data.training_choices()
        pairs = UserSequences(
            choices.users,
            choices.rows,
            choices.times,
            n_users=log.header.n_users,
            n_rows=data.catalogue.n_rows,
        )
        users_of: dict[int, list[tuple[int, int]]] = {}
        is_learned = data.split.behaviors == Part.TRAIN
        for user, behavior in zip(
            log.behavior_users()[is_learned], log.behaviors[is_learned], strict=True
        ):
            users_of.setdefault(int(behavior["item"]), []).append((int(behavior["time"]), user))
        assert len(pairs.items) > 50
        for row in pairs.items.tolist():
            item = int(data.catalogue.item_ids[row - FIRST_ROW])
            expected = [user + FIRST_ROW for _, user in sorted(users_of[item])]
            assert pairs.newest(torch.tensor([row]), 10_000)[0].tolist() == expected


class TestInconsistency:
    def test_by_hand(self):
        """Equal direction 0, a right angle 1, opposite directions 2; the mean of all."""
        own = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
        rebuilt = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-4.0, -4.0]])
        assert inconsistency(own, rebuilt).item() == pytest.approx(1)
        assert inconsistency(own[:1], rebuilt[:1]).item() == pytest.approx(0)
        assert inconsistency(own[2:], rebuilt[2:]).item() == pytest.approx(2)

    @pytest.mark.parametrize(
        ("stop_gradient", "moves"),
        [("none", (True, True)), ("own", (False, True)), ("rebuilt", (True, False))],
    )
    def test_the_side_that_is_stopped_does_not_follow(self, stop_gradient, moves):
        own, rebuilt = (torch.tensor([[1.0, x]], requires_grad=True) for x in (2.0, -1.0))
        inconsistency(own, rebuilt, stop_gradient=stop_gradient).backward()
        assert (own.grad is not None, rebuilt.grad is not None) == moves


class TestLoss:
    def test_by_hand(self):
        """Row 2 has three next users to find, row 3 one; all users make the rebuilt embedding."""
        task, model = dual_task(user_weight=2.0, consistency_weight=3.0), network(6, seed=2)
        reader = task.reader
        losses, rebuilt = [], []
        for users in ([3, 4, 2, 5], [3, 2]):
            history = torch.tensor([users])
            vectors_LD = reader.encode(history, torch.zeros(1, len(users), 0))[0]
            logits_LU = vectors_LD[:-1] @ reader.item_table()[1:].T
            losses.append(functional.cross_entropy(logits_LU, history[0, 1:] - 1, reduction="sum"))
            rebuilt.append(vectors_LD[-1])
        own_ID = model.item_table()[[2, 3]]
        cosines = functional.cosine_similarity(own_ID, torch.stack(rebuilt), dim=1)
        expected = 2.0 * torch.stack(losses).sum() / 4 + 3.0 * (1 - cosines).mean()
        torch.testing.assert_close(task(model, torch.tensor([2, 3])), expected)

    @pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bce", "bpr"])
    def test_every_parameter_of_the_reader_learns(self, loss):
        """From all losses of a run; the model's own items learn too."""
        settings = NextItemConfig(loss=loss, n_negatives=3, exclude_own=False)
        task, model = dual_task(settings=settings), network(6, seed=2)
        torch.manual_seed(0)
        task(model, torch.tensor([2, 3])).backward()
        for name, parameter in task.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        grad_RD = model.items.items.weight.grad
        assert grad_RD is not None
        assert grad_RD[[2, 3]].any(dim=1).all()

    def test_a_stopped_side_is_no_concern_of_the_dual_task(self):
        task, model = dual_task(stop_gradient="own"), network(6, seed=2)
        task(model, torch.tensor([2, 3])).backward()
        assert model.items.items.weight.grad is None

    def test_a_weight_of_nothing_leaves_a_loss_out(self):
        model, rows = network(6, seed=2), torch.tensor([2, 3])

        def value(**weights):
            return dual_task(**weights)(model, rows).item()

        both = value(user_weight=1.0, consistency_weight=1.0)
        alone = value(consistency_weight=0.0) + value(user_weight=0.0)
        assert alone == pytest.approx(both)
        assert value(user_weight=0.0, consistency_weight=0.0) == 0

    def test_a_history_of_one_has_no_next_user(self):
        task = dual_task(consistency_weight=0.0)
        task._history_length = 1
        assert task(network(6, seed=2), torch.tensor([2])).item() == 0

    def test_items_are_drawn_without_repetition(self):
        task = dual_task()
        torch.manual_seed(3)
        drawn = [task.draw(1).item() for _ in range(30)]
        assert set(drawn) == {2, 3}
        assert sorted(task.draw(9).tolist()) == [2, 3]
        torch.manual_seed(3)
        assert [task.draw(1).item() for _ in range(30)] == drawn

    def test_an_order_of_users_is_learned(self):
        """Users come to every item by their numbers, from another one on: the next is no secret."""
        n_users, n_items = 12, 30
        starts = np.random.default_rng(0).integers(n_users, size=n_items)
        users = (starts[:, None] + np.arange(8)).ravel() % n_users
        rows = FIRST_ROW + np.repeat(np.arange(n_items), 8)
        times = np.tile(np.arange(8), n_items)
        pairs = UserSequences(
            *(torch.from_numpy(array) for array in (users, rows, times)),
            n_users=n_users,
            n_rows=n_items + FIRST_ROW,
        )
        task = DualTask(
            network(n_users + FIRST_ROW, seed=1),
            pairs,
            NextItemLoss(NextItemConfig(), pairs.counts_U),
            history_length=LENGTH,
            user_weight=1.0,
            consistency_weight=1.0,
        )
        model = network(n_items + FIRST_ROW, seed=2)
        optimizer = torch.optim.Adam([*task.parameters(), *model.parameters()], lr=0.02)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = task(model, pairs.items)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 2
        assert losses[-1] < 0.5


class TestRun:
    def test_nothing_is_added_unless_it_is_asked_for(self, log):
        assert open_task(log, run_config(dual_weight=0, consistency_weight=0)).auxiliary is None

    def test_the_loss_of_a_run_is_the_sum_of_both(self, log):
        device = torch.device("cpu")
        task = open_task(log, run_config())
        plain = open_task(log, run_config(dual_weight=0, consistency_weight=0))
        model = plain.model.eval()
        assert isinstance(model, NextItemModel)
        assert isinstance(task.auxiliary, DualTask)
        task.auxiliary.eval()
        batch = next(task.batches(0, first_batch=0, rank=0, world_size=1))
        torch.manual_seed(7)
        total = task.loss(model, batch, device)
        torch.manual_seed(7)
        alone = task.auxiliary(model, task.auxiliary.draw(16))
        torch.testing.assert_close(total, plain.loss(model, batch, device) + alone)

    def test_processes_that_share_a_batch_add_up_to_one_mean(self, log):
        """The last four of twenty have no row of sixteen, and no share."""

        class One(DualTask):
            def forward(self, model: NextItemModel, rows_I: Tensor) -> Tensor:
                del model, rows_I
                return torch.ones(())

        task = open_task(log, run_config())
        assert isinstance(task, NextItemTask)
        model, device = task.model.eval(), torch.device("cpu")
        batches = [
            next(task.batches(0, first_batch=0, rank=rank, world_size=20)) for rank in range(20)
        ]
        task.auxiliary = None
        alone = [task.loss(model, batch, device).item() for batch in batches]
        pairs = sequences()
        task.auxiliary = One(
            network(6, seed=1),
            pairs,
            NextItemLoss(NextItemConfig(), pairs.counts_U),
            history_length=LENGTH,
            user_weight=1.0,
            consistency_weight=1.0,
        )
        both = [task.loss(model, batch, device).item() for batch in batches]
        shares = np.array(both) - np.array(alone)
        assert shares.sum() == pytest.approx(1)
        assert shares[16:].tolist() == [0] * 4

    def test_the_model_that_is_kept_has_nothing_of_it(self, log, tmp_path):
        plain = run_config(dual_weight=0, consistency_weight=0)
        for name, config in (("dual", run_config()), ("plain", plain)):
            train(config, log, tmp_path / name, ALONE, show_progress=False)
        dual, other = (load_model(tmp_path / name / MODEL).model for name in ("dual", "plain"))
        assert dual.state_dict().keys() == other.state_dict().keys()
        assert not torch.equal(dual.state_dict()["norm.weight"], other.state_dict()["norm.weight"])
        costs = [
            json.loads((tmp_path / name / COST).read_text())["parameters"]
            for name in ("dual", "plain")
        ]
        assert costs[0] == costs[1]

    def test_the_reader_learns_in_a_run(self, log, tmp_path):
        config = run_config()
        auxiliary = open_task(log, config).auxiliary
        assert auxiliary is not None
        before = auxiliary.state_dict()
        train(config, log, tmp_path / "run", ALONE, show_progress=False)
        after = load_run_state(tmp_path / "run" / CHECKPOINT).auxiliary
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[name], after[name]) for name in after)

    def test_items_and_users_do_not_start_as_one(self, log):
        task = open_task(log, run_config())
        assert isinstance(task.auxiliary, DualTask)
        assert isinstance(task.model, SASRec)
        users, items = task.auxiliary.reader.item_table(), task.model.item_table()
        assert users.shape == (log.header.n_users + FIRST_ROW, 8)
        assert not torch.equal(users[2:10], items[2:10])

    @pytest.mark.parametrize("batch", [1, 6])
    def test_a_stopped_run_ends_as_if_it_never_was(self, log, tmp_path, batch):
        """To the last bit, of what is not kept as well."""
        config = run_config()
        train(config, log, tmp_path / "whole", ALONE, show_progress=False)
        ticks = iter(range(10_000))

        def dying_clock() -> float:  # asked a few times a batch
            if next(ticks) > 2 * batch:
                raise InterruptedError
            return time.monotonic()

        stopped = tmp_path / "stopped"
        with pytest.raises(InterruptedError):
            train(config, log, stopped, ALONE, show_progress=False, clock=dying_clock)
        train(config, log, stopped, ALONE, show_progress=False, resume=True)
        folders = (tmp_path / "whole", stopped)
        one, other = (load_run_state(folder / CHECKPOINT) for folder in folders)
        for kept in ("auxiliary", "model"):
            weights, others = getattr(one, kept), getattr(other, kept)
            assert weights.keys() == others.keys()
            assert all(torch.equal(weights[name], others[name]) for name in weights)
        lines = [
            [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
            for folder in folders
        ]
        assert lines[0] == lines[1]

    def test_it_goes_with_items_of_codes(self, log, tmp_path):
        config = run_config(model={**SASREC, "codes": 4, "codebook_size": 8})
        trained = train(config, log, tmp_path / "run", ALONE, show_progress=False)
        assert trained.metrics["full_ndcg20"] > 0

    def test_another_model_has_no_dual(self, log):
        config = run_config(model={"name": "gru4rec", "embedding_dim": 8, "hidden_units": 8})
        with pytest.raises(ConfigError, match=r"for model\.name = 'sasrec' only, got 'gru4rec'"):
            open_task(log, config)
