"""Ranks of held-out items by models whose scores are known, one for each user.

Shapes: B requests, L history length, R catalogue rows, M held-out targets.
"""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from contract.catalogue import FIRST_ROW, UNKNOWN_ROW
from training.config import RunConfig, parse_config
from training.data.log import PreparedLog
from training.data.next_item_data import NextItemData, open_next_item_data
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource
from training.data.splits import Part
from training.errors import TrainingError
from training.models.encoder import ItemEncoder
from training.models.next_item import NextItemModel
from training.next_item_evaluation import RankingEvaluation
from training.ranking import PROTOCOLS, SAMPLED

N_USERS, N_ITEMS, LENGTH = 14, 25, 4
CPU = torch.device("cpu")


def config(**data: object) -> RunConfig:
    return parse_config(
        {
            "name": "run",
            "features": {"history_length": LENGTH},
            "data": {"split": "leave-one-out", **data},
            "model": {"name": "sasrec"},
        },
        "test",
    )


def write_log(folder: Path, rows: list[tuple[int, int, int]]) -> PreparedLog:
    names = ("user", "item", "timestamp")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    pl.DataFrame(columns).write_parquet(folder / "log.parquet")
    prepare(LogSource(path=folder / "log.parquet"), folder / "log", PrepareOptions())
    return PreparedLog(folder / "log")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> PreparedLog:
    """Histories of 4 to 17 behaviors, items come again; user 1's test item stands in its past."""
    rng = np.random.default_rng(3)
    rows = [
        (user, int(item), time)
        for user in range(1, N_USERS + 1)
        for time, item in enumerate(rng.integers(1, N_ITEMS + 1, 3 + user))
    ]
    rows[3] = (1, rows[0][1], 3)
    return write_log(tmp_path_factory.mktemp("evaluation"), rows)


@pytest.fixture(scope="module")
def data(log) -> NextItemData:
    return open_next_item_data(log, config())


class Oracle(NextItemModel):
    """Gives every user scores of its own for all rows, whatever was done."""

    def __init__(self, scores_UR: Tensor) -> None:
        super().__init__(ItemEncoder(scores_UR.shape[1], 2))
        self.scores_UR = scores_UR
        self.seen: list[tuple[int, int, bool]] = []

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        last_BD = self.encode_last(history_items, history_buckets, users)
        return last_BD.unsqueeze(1).expand(-1, history_items.shape[1], -1)

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        del history_buckets
        assert users is not None
        self.seen.append((*history_items.shape, self.training))
        return self.scores_UR[users]

    def item_table(self) -> Tensor:
        return torch.eye(self.scores_UR.shape[1])


def evaluation_of(
    data: NextItemData, part: Part = Part.TEST, n_negatives: int = 6
) -> RankingEvaluation:
    return RankingEvaluation(
        data.held_out[part], data.popularity, PROTOCOLS, n_negatives=n_negatives
    )


def random_scores(data: NextItemData, seed: int = 0) -> Tensor:
    """Return scores [users + 1, R] with ties."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N_USERS + 1, data.catalogue.n_rows)
    return torch.randint(0, 8, shape, generator=generator).float()


@pytest.mark.parametrize("part", [Part.VALID, Part.TEST], ids=["valid", "test"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ranks_are_those_of_one_user_at_a_time(log, data, part, protocol):
    """The whole past is no rival, also what is older than the model reads."""
    scores = random_scores(data)
    evaluation = evaluation_of(data, part)
    found = evaluation.ranks(Oracle(scores), CPU)[protocol]
    back = 1 if part == Part.TEST else 2
    for m in range(N_USERS):
        items = log.behaviors["item"][log.behavior_offsets[m] : log.behavior_offsets[m + 1]]
        rows = data.catalogue.rows(np.ascontiguousarray(items)).tolist()
        target, past = rows[-back], set(rows[:-back])
        rivals = set(range(FIRST_ROW, data.catalogue.n_rows))
        if protocol == "full":
            rivals -= past
        elif protocol in SAMPLED:
            rivals = set(evaluation.negatives[protocol][m].tolist()) - {0}
            assert protocol == "pop100" or not rivals & past
        of_user = scores[m + 1].tolist()
        if target == UNKNOWN_ROW:
            assert found[m] > len(rivals)
        else:
            beaten = [row for row in rivals - {target} if of_user[row] >= of_user[target]]
            assert found[m] == 1 + len(beaten)


def with_targets_at(data: NextItemData, score: float) -> Tensor:
    """Return scores of 0, and this one for each user's target."""
    scores = torch.zeros(N_USERS + 1, data.catalogue.n_rows)
    loader = data.held_out[Part.TEST]
    scores[torch.from_numpy(loader.rows.users).long() + 1, torch.from_numpy(loader.targets)] = score
    return scores


def test_a_perfect_model_has_the_best_of_each_metric(data):
    known = data.held_out[Part.TEST].targets >= FIRST_ROW
    assert known.all()
    metrics = evaluation_of(data).metrics(Oracle(with_targets_at(data, 1.0)), CPU)
    assert metrics.pop("n_samples") == N_USERS
    assert set(metrics) == {
        f"{protocol}_{metric}{k}"
        for protocol in PROTOCOLS
        for metric in ("ndcg", "hr", "mrr")
        for k in (10, 20)
    }
    assert set(metrics.values()) == {1.0}


@pytest.mark.parametrize("score", [0.0, -1.0, math.nan], ids=["equal", "lowest", "no number"])
def test_a_model_that_prefers_nothing_ranks_every_target_last(data, score):
    """So does one that prefers everything else, and one whose scores are no numbers."""
    evaluation = evaluation_of(data)
    ranks = evaluation.ranks(Oracle(with_targets_at(data, score)), CPU)
    n_items = data.catalogue.n_rows - FIRST_ROW
    assert (ranks["full_history_included"] == n_items).all()
    for m in range(N_USERS):
        target = int(data.held_out[Part.TEST].targets[m])
        past = set(data.held_out[Part.TEST].past_rows(m).tolist())
        # A target that was chosen before stays in the ranking.
        assert ranks["full"][m] == n_items - len(past - {target, UNKNOWN_ROW})
        for protocol in SAMPLED:
            drawn = evaluation.negatives[protocol][m]
            assert ranks[protocol][m] == (drawn != 0).sum() + 1


def test_what_is_older_than_the_model_reads_is_excluded_too(data):
    """A user's oldest item scores highest of all and still is no rival."""
    loader = data.held_out[Part.TEST]
    row = max(range(N_USERS), key=lambda m: len(loader.past_rows(m)))
    past, target = loader.past_rows(row), loader.targets[row]
    oldest = next(int(one) for one in past if one not in {*past[-LENGTH:], target})
    scores = with_targets_at(data, 1.0)
    scores[loader.rows.users[row] + 1, oldest] = 2.0
    ranks = evaluation_of(data).ranks(Oracle(scores), CPU)
    assert ranks["full"][row] == 1
    assert ranks["full_history_included"][row] == 2


def test_an_unknown_target_ranks_last(log):
    """However high the model scores the unknown item."""
    data = open_next_item_data(log, config(min_item_count=5))
    unknown = data.held_out[Part.TEST].targets == UNKNOWN_ROW
    assert unknown.any()
    ranks = evaluation_of(data).ranks(Oracle(with_targets_at(data, 1.0)), CPU)
    n_items = data.catalogue.n_rows - FIRST_ROW
    assert (ranks["full"][unknown] == n_items + 1).all()
    assert (ranks["full"][~unknown] == 1).all()


def test_negatives_are_the_same_for_every_model_and_seed_of_training(log, data, tmp_path):
    again = open_next_item_data(
        log, parse_config({**config().model_dump(mode="json"), "train": {"seed": 9}}, "test")
    )
    torch.manual_seed(1)
    one, other = evaluation_of(data), evaluation_of(again)
    one.ranks(Oracle(random_scores(data)), CPU)
    assert set(one.negatives) == set(SAMPLED)
    one.save_negatives(tmp_path / "negatives.npz")
    with np.load(tmp_path / "negatives.npz") as saved:
        assert set(saved) == set(SAMPLED)
        for protocol in SAMPLED:
            np.testing.assert_array_equal(one.negatives[protocol], other.negatives[protocol])
            np.testing.assert_array_equal(saved[protocol], one.negatives[protocol])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_a_model_is_ranked_in_evaluation_mode_and_left_as_it_was(data, training):
    model = Oracle(random_scores(data)).train(training)
    evaluation_of(data).ranks(model, CPU)
    assert model.training == training
    assert model.seen == [(N_USERS, LENGTH, False)]


def test_a_held_out_part_that_is_empty_is_an_error(tmp_path):
    log = write_log(tmp_path, [(1, 1, 1), (1, 2, 2), (2, 1, 3)])
    data = open_next_item_data(log, config())
    evaluation = evaluation_of(data)
    with pytest.raises(TrainingError, match="no held-out behavior to rank: no user has enough"):
        evaluation.metrics(Oracle(torch.zeros(3, data.catalogue.n_rows)), CPU)
