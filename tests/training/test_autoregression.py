"""Rankings after a model's own predictions, by hand and against a loop over users."""

import numpy as np
import pytest
import torch
from torch import Tensor

from contract.catalogue import FIRST_ROW
from contract.encoding import encode
from tests.training.data.conftest import make_log as make_log
from training.__main__ import main
from training.autoregression import Step, autoregress
from training.checkpoint import TrainedModel, save_model
from training.config import RunConfig, parse_config
from training.data.log import PreparedLog
from training.data.next_item_data import NextItemData, open_next_item_data
from training.data.splits import Part
from training.errors import ConfigError, TrainingError
from training.models.build import build_model
from training.models.encoder import ItemEncoder
from training.models.next_item import NextItemModel
from training.next_item_evaluation import RankingEvaluation
from training.ranking import ranking_metrics

CPU = torch.device("cpu")
SASREC = {
    "name": "sasrec", "embedding_dim": 8, "layers": 1, "heads": 1, "ffn_units": 8,
    "user_embedding": True,
}  # fmt: skip
HSTU = {"name": "hstu", "embedding_dim": 8, "layers": 1}
AGE = {"name": "age_seconds", "unit_s": 1, "n_buckets": 1 << 32, "scale": "linear"}


class Successor(NextItemModel):
    """Finds the row after the last one of the history, and knows no more."""

    def __init__(self, n_rows: int) -> None:
        super().__init__(ItemEncoder(n_rows, n_rows))
        self.items.items = torch.nn.Embedding.from_pretrained(torch.eye(n_rows))

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        del history_buckets, users
        return self.items.table()[(history_items + 1) % len(self.items.table())]

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        return self.encode(history_items, history_buckets, users)[:, -1]


def config_of(model: dict[str, object], *, holdout_steps: int, history_length: int) -> RunConfig:
    return parse_config(
        {
            "name": "steps",
            "features": {"history_length": history_length, "granularities": [AGE]},
            "data": {"split": "leave-one-out", "holdout_steps": holdout_steps},
            "next_item": {"protocols": ["full"]},
            "model": model,
        },
        "test",
    )


def open_with_model(log: PreparedLog, config: RunConfig) -> tuple[NextItemData, NextItemModel]:
    """Return the data of a run and its model, untrained but with weights of a different size."""
    data = open_next_item_data(log, config)
    model = build_model(
        config.model,
        config.features,
        item_counts=data.item_counts,
        features_of_row=None,
        n_users=log.header.n_users,
        seed=3,
    )
    assert isinstance(model, NextItemModel)
    return data, model


def literal_ranks(
    model: NextItemModel, data: NextItemData, n_steps: int, *, feed_back: bool
) -> list[list[int]]:
    """Return the ranks of each step, from raw records and one user at a time."""
    log, catalogue, spec = data.log, data.catalogue, data.config.features
    table_RD = model.item_table()
    ranks: list[list[int]] = [[] for _ in range(n_steps)]
    for test in np.flatnonzero(data.split.behaviors == Part.TEST):
        user = int(log.behavior_users()[test])
        records = log.behaviors[log.behavior_offsets[user] : test].copy()
        fed: set[int] = set()
        for step in range(n_steps):
            truth = log.behaviors[test + step : test + step + 1].copy()
            inputs, _ = encode(
                [records[-spec.history_length :].tobytes()],
                np.zeros((1, 1), np.int64),
                truth["time"].astype(np.int64),
                catalogue,
                spec,
            )
            user_D = model.encode_last(
                torch.from_numpy(inputs.history_items),
                torch.from_numpy(inputs.history_buckets),
                torch.tensor([user + 1]),
            )[0]
            scores = (table_RD @ user_D).tolist()
            past = set(catalogue.rows(np.ascontiguousarray(records["item"])).tolist())
            rivals = set(range(FIRST_ROW, len(scores))) - past
            target = int(catalogue.rows(np.ascontiguousarray(truth["item"]))[0])
            if target < FIRST_ROW or target in fed:
                ranks[step].append(len(scores) - FIRST_ROW + 1)
            else:
                better = [row for row in rivals - {target} if scores[row] >= scores[target]]
                ranks[step].append(1 + len(better))
            if feed_back:
                best = max(rivals, key=lambda row: scores[row])
                fed.add(best)
                truth["item"] = catalogue.item_ids[best - FIRST_ROW]
            records = np.concatenate([records, truth])
    return ranks


def test_by_hand(make_log):
    """User 1 goes on counting; user 2 skips four items once, and then goes on counting.

    What user 2 did is only found again by a model that is told of the skip. Users with four
    behaviors have none to hold out, but fill the catalogue.
    """
    users = [1] * 8 + [2] * 8 + [3 + n // 4 for n in range(40)]
    items = [*range(1, 9), *(11, 12, 13, 14, 15, 20, 21, 22), *range(1, 41)]
    log = make_log({"user": users, "item": items, "timestamp": list(range(len(items)))})
    data = open_next_item_data(log, config_of(SASREC, holdout_steps=3, history_length=10))
    assert data.catalogue.n_rows == 42
    steps = autoregress(Successor(42), data, 3, CPU)
    assert [one.step for one in steps] == [1, 2, 3]
    assert [one.fed_back["hr10"] for one in steps] == [0.5, 0.5, 0.5]
    assert [one.teacher_forced["hr10"] for one in steps] == [0.5, 1, 1]
    assert [one.teacher_forced["ndcg10"] for one in steps] == [0.5, 1, 1]


def test_a_target_that_was_predicted_too_early_is_missed(make_log):
    """The model likes 6, 7, 8 best, in this order; user 1 takes 7, 8, 6."""

    class Settled(Successor):
        def encode(
            self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
        ) -> Tensor:
            del history_buckets, users
            return torch.arange(42, 0, -1).float().expand(*history_items.shape, 42)

    items = [*range(1, 6), 7, 8, 6, *range(1, 41)]
    users = [1] * 8 + [3 + n // 4 for n in range(40)]
    log = make_log({"user": users, "item": items, "timestamp": list(range(48))})
    data = open_next_item_data(log, config_of(SASREC, holdout_steps=3, history_length=10))
    steps = autoregress(Settled(42), data, 3, CPU)
    assert [one.fed_back["mrr20"] for one in steps] == [1 / 2, 1 / 2, 0]
    assert [one.teacher_forced["mrr20"] for one in steps] == [1 / 2, 1 / 2, 1]


@pytest.mark.parametrize("model", [SASREC, HSTU], ids=["sasrec with users", "hstu with times"])
@pytest.mark.parametrize("history_length", [3, 100], ids=["fewer than steps", "all"])
def test_steps_are_those_of_a_loop_over_users(log, model, history_length):
    config = config_of(model, holdout_steps=6, history_length=history_length)
    data, network = open_with_model(log, config)
    with torch.inference_mode():
        own = literal_ranks(network.eval(), data, 5, feed_back=True)
        true = literal_ranks(network, data, 5, feed_back=False)
    assert own[1:] != true[1:]
    assert autoregress(network, data, 5, CPU) == [
        Step(
            step=n + 1,
            fed_back=ranking_metrics(np.array(own[n])),
            teacher_forced=ranking_metrics(np.array(true[n])),
        )
        for n in range(5)
    ]


def test_the_first_step_is_the_test_of_the_run(log):
    data, model = open_with_model(log, config_of(SASREC, holdout_steps=3, history_length=20))
    first = autoregress(model, data, 1, CPU)[0]
    loader = data.held_out[Part.TEST]
    metrics = RankingEvaluation(loader, data.popularity, ("full",), n_negatives=1).metrics(
        model, CPU
    )
    assert first.fed_back == first.teacher_forced
    expected = {f"full_{name}": value for name, value in first.fed_back.items()}
    assert {**expected, "n_samples": len(loader)} == metrics


def test_the_model_stays_in_the_mode_it_was_in(log):
    data, model = open_with_model(log, config_of(SASREC, holdout_steps=2, history_length=20))
    assert model.train().training
    autoregress(model, data, 2, CPU)
    assert model.training


@pytest.mark.parametrize("n_steps", [0, 3])
def test_steps_that_were_not_held_out(log, n_steps):
    """What lies behind them was learned from: a figure of it would be none."""
    data, model = open_with_model(log, config_of(SASREC, holdout_steps=2, history_length=20))
    with pytest.raises(
        ConfigError, match=rf"{n_steps} steps cannot be ranked: the run held out 2 behaviors"
    ):
        autoregress(model, data, n_steps, CPU)


def test_no_user_is_long_enough(log):
    data, model = open_with_model(log, config_of(SASREC, holdout_steps=200, history_length=20))
    with pytest.raises(TrainingError, match="no user has the 202 behaviors"):
        autoregress(model, data, 2, CPU)


def test_nothing_held_out_is_learned_from(log):
    """Neither as history, nor as target, nor in counts."""
    data, _ = open_with_model(log, config_of(SASREC, holdout_steps=5, history_length=500))
    n_users = log.header.n_users
    learned = len(log.behaviors) - 6 * n_users
    assert len(data.held_out[Part.TEST]) == n_users
    assert int(data.item_counts.sum()) == learned
    loader = data.training_loader(whole_rows=True)
    rows = loader.rows_of(0)
    assert sorted(rows.ends) == sorted(log.behavior_offsets[1:] - 7)


class TestCommand:
    def saved(self, log, tmp_path, model):
        config = config_of(model, holdout_steps=3, history_length=20)
        data = open_next_item_data(log, config)
        network = build_model(
            config.model, config.features, item_counts=data.item_counts, features_of_row=None,
            n_users=log.header.n_users, seed=3,
        )  # fmt: skip
        trained = TrainedModel(
            config=config,
            model=network,
            catalogue=data.catalogue,
            metrics={},
            data_fingerprint=log.header.fingerprint,
        )
        save_model(
            tmp_path / "model.pt",
            trained,
            item_counts=data.item_counts,
            features_of_row=None,
            n_users=log.header.n_users,
        )
        return network, data, str(tmp_path / "model.pt")

    def test_it_prints_a_line_for_each_step(self, log, tmp_path, capsys):
        network, data, path = self.saved(log, tmp_path, SASREC)
        assert main(["autoregress", path, str(log.folder), "--steps", "2"]) == 0
        title, _, header, *lines = capsys.readouterr().out.splitlines()
        assert title == "steps, 60 users"
        assert header.split() == ["step", *["NDCG@10", "HR@10"] * 2]
        assert [line.split() for line in lines] == [
            [
                str(one.step),
                *(
                    f"{form[name]:.4f}"
                    for form in (one.fed_back, one.teacher_forced)
                    for name in ("ndcg10", "hr10")
                ),
            ]
            for one in autoregress(network, data, 2, CPU)
        ]

    def test_too_many_steps_are_one_clear_line(self, log, tmp_path, capsys):
        *_, path = self.saved(log, tmp_path, SASREC)
        assert main(["autoregress", path, str(log.folder)]) == 2
        assert "error: 5 steps cannot be ranked" in capsys.readouterr().err

    def test_a_click_model_predicts_no_next_item(self, log, tmp_path, capsys):
        *_, path = self.saved(log, tmp_path, {"name": "popularity"})
        assert main(["autoregress", path, str(log.folder)]) == 2
        assert "popularity predicts no next item" in capsys.readouterr().err

    def test_another_log_is_refused(self, log, tmp_path, capsys, make_log):
        *_, path = self.saved(log, tmp_path, SASREC)
        other = make_log({"user": [1] * 9, "item": [1] * 9, "timestamp": list(range(9))})
        assert main(["autoregress", path, str(other.folder)]) == 2
        assert "was trained on another log" in capsys.readouterr().err
