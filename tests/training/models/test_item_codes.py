"""Items of codes: what vectors are made of, where the codes come from, and that a run keeps them.

Shapes: R catalogue rows, M codes of an item, N items, F factors.
"""

import json
import time

import numpy as np
import pytest
import torch

from contract.catalogue import FIRST_ROW
from tests.training.models import next_item_checks as checks
from tests.training.models.next_item_checks import N_ROWS, SPEC
from training.checkpoint import load_model, load_run_state
from training.config import RunConfig, parse_config
from training.data.next_item_data import open_next_item_data
from training.data.splits import Part
from training.distributed import Worker
from training.errors import CheckpointError, ConfigError
from training.models.build import build_model
from training.models.item_codes import ItemCodes, fit_codes, item_factors, k_means, nearest
from training.models.next_item import NextItemModel
from training.models.sasrec import SASRec
from training.tasks import open_task
from training.trainer import CHECKPOINT, METRICS, MODEL, train

WIDTH, N_CODES, CODEBOOK = 6, 3, 4
ALONE = Worker(device=torch.device("cpu"))
both_forms = pytest.mark.parametrize("quantisation", ["product", "residual"])


def all_codes(n_rows=N_ROWS) -> torch.Tensor:
    """Return different codes for every item, digits of its number."""
    number_N = torch.arange(n_rows - FIRST_ROW)
    digits = [number_N // CODEBOOK**m % CODEBOOK for m in range(N_CODES)]
    head = torch.tensor([[0] * N_CODES, [1] * N_CODES])
    return torch.cat([head, FIRST_ROW + torch.stack(digits, dim=1)])


def items_of(quantisation) -> ItemCodes:
    return ItemCodes(all_codes(), WIDTH, codebook_size=CODEBOOK, quantisation=quantisation)


def tables_of(items: ItemCodes) -> list[torch.Tensor]:
    return [parameter for name, parameter in items.named_parameters() if "codebooks" in name]


def sasrec(quantisation) -> NextItemModel:
    return checks.with_large_weights(
        SASRec(
            items_of(quantisation),
            SPEC,
            embedding_dim=WIDTH,
            n_layers=2,
            n_heads=2,
            ffn_units=8,
            dropout=0.3,
        )
    )


def run_config(*, seed=5, **codes: object) -> RunConfig:
    model = {"name": "sasrec", "embedding_dim": 8, "layers": 1, "ffn_units": 8, "heads": 1}
    return parse_config(
        {
            "name": "codes",
            "features": {"history_length": 16},
            "data": {"split": "leave-one-out"},
            "next_item": {"protocols": ["full"]},
            "model": {**model, "codes": 4, "codebook_size": 8, **codes},
            "train": {"batch_size": 16, "max_epochs": 2, "checkpoint_every_s": 0.0, "seed": seed},
        },
        "test",
    )


class TestVectors:
    def test_a_product_is_the_parts_side_by_side(self):
        items = items_of("product")
        tables = tables_of(items)
        row = FIRST_ROW + 1 + 2 * CODEBOOK  # the digits 1, 2, 0
        expected = torch.cat([tables[0][3], tables[1][4], tables[2][2]])
        assert torch.equal(items(torch.tensor(row)), expected)

    def test_a_residual_is_the_sum_of_full_vectors(self):
        items = items_of("residual")
        tables = tables_of(items)
        row = FIRST_ROW + 1 + 2 * CODEBOOK
        expected = tables[0][3] + tables[1][4] + tables[2][2]
        torch.testing.assert_close(items(torch.tensor(row)), expected)

    @both_forms
    def test_the_table_is_the_vector_of_every_row(self, quantisation):
        items = items_of(quantisation)
        assert items.table().shape == (N_ROWS, WIDTH)
        assert torch.equal(items.table(), items(torch.arange(N_ROWS)))

    @both_forms
    def test_padding_is_zero_and_the_unknown_item_is_nobody_elses_vector(self, quantisation):
        items = items_of(quantisation)
        assert not items(torch.zeros(2, 3, dtype=torch.int64)).any()
        unknown_D = items(torch.tensor(1))
        others = [table[FIRST_ROW:] for table in tables_of(items)]
        before_RD = items.table().detach()
        with torch.no_grad():
            for other in others:
                other.add_(1)
        assert torch.equal(items(torch.tensor(1)), unknown_D)
        assert (items.table() != before_RD).all(dim=1).tolist() == [False] * 2 + [True] * 18

    @pytest.mark.parametrize(
        ("quantisation", "expected"),
        [("product", (CODEBOOK + 2) * WIDTH), ("residual", N_CODES * (CODEBOOK + 2) * WIDTH)],
    )
    @pytest.mark.parametrize("n_rows", [10, 60])
    def test_parameters_do_not_grow_with_the_catalogue(self, quantisation, expected, n_rows):
        items = ItemCodes(
            all_codes(n_rows), WIDTH, codebook_size=CODEBOOK, quantisation=quantisation
        )
        assert sum(parameter.numel() for parameter in items.parameters()) == expected

    @both_forms
    def test_vectors_start_as_long_as_those_of_a_table(self, quantisation):
        """About 1, whatever they are composed of."""
        codes = torch.randint(2, 66, (500, 8), generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            items = ItemCodes(codes, 64, codebook_size=64, quantisation=quantisation)
        assert items.table().norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)

    def test_a_width_that_codes_do_not_divide(self):
        with pytest.raises(ValueError, match="a width of 7 has no 3 equal parts"):
            ItemCodes(all_codes(), 7, codebook_size=CODEBOOK, quantisation="product")

    def test_a_code_that_no_codebook_has(self):
        with pytest.raises(ValueError, match="holds code 5, codebooks end at 4"):
            ItemCodes(all_codes(), 6, codebook_size=3, quantisation="product")


@both_forms
class TestRulesOfNextItemModels:
    def test_invariances(self, quantisation):
        model = sasrec(quantisation)
        checks.assert_padding_changes_nothing(model)
        checks.assert_company_changes_nothing(model)
        checks.assert_empty_history_is_finite(model)
        checks.assert_last_equals_encode(model)
        checks.assert_causal(model)

    def test_every_parameter_learns(self, quantisation):
        checks.assert_every_parameter_learns(sasrec(quantisation))

    def test_exports(self, quantisation, tmp_path):
        checks.assert_exports(sasrec(quantisation), SPEC, tmp_path)


def test_factors_are_those_of_a_dense_decomposition():
    """Up to the signs of singular vectors, which cosines do not see."""
    rng = np.random.default_rng(0)
    users, rows = rng.integers(0, 9, 80), rng.integers(2, 14, 80)
    factors_RF = item_factors(
        torch.from_numpy(users), torch.from_numpy(rows), n_rows=14, n_factors=4, seed=0
    )
    weights = np.zeros((14, 9))
    np.add.at(weights, (rows, users), 1)
    weights = np.log1p(weights)
    scale = np.sqrt(np.outer(weights.sum(1), weights.sum(0)))
    u, s, _ = np.linalg.svd(np.divide(weights, scale, where=scale > 0, out=np.zeros_like(scale)))
    expected = u[2:, :4] * s[:4]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = factors_RF[2:].numpy()
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3)


def test_factors_do_not_tell_how_popular_an_item_is():
    """Row 3 was chosen nine times as often as row 2, by the same users."""
    users = torch.tensor([0, 1, 2] * 10 + [3, 4] * 5)
    rows = torch.tensor([2] * 3 + [3] * 27 + [4] * 10)
    factors_RF = item_factors(users, rows, n_rows=6, seed=0)
    cosines_RR = factors_RF @ factors_RF.T
    assert cosines_RR[2, 3] == pytest.approx(1, abs=1e-5)
    assert cosines_RR[2, 4] == pytest.approx(0, abs=1e-5)
    assert not factors_RF[[0, 1, 5]].any()  # nobody chose them
    assert factors_RF.shape == (6, 64)


def test_factors_depend_on_the_seed_alone():
    users, rows = torch.arange(60) % 7, 2 + torch.arange(60) * 5 % 11
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = item_factors(users, rows, n_rows=13, n_factors=4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(item_factors(users, rows, n_rows=13, n_factors=4, seed=3), one)


class TestKMeans:
    def test_separate_clusters_are_found(self):
        generator = torch.Generator().manual_seed(0)
        centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
        points = centres.repeat(20, 1) + torch.randn(60, 2, generator=generator) * 0.1
        found = k_means(points, 3, generator)
        distances, which = torch.cdist(centres, found).min(dim=1)
        assert (distances < 0.2).all()
        assert sorted(which.tolist()) == [0, 1, 2]

    def test_no_more_centroids_than_points(self):
        points = torch.tensor([[1.0], [2.0]])
        found = k_means(points, 5, torch.Generator().manual_seed(0))
        assert sorted(found[:, 0].tolist()) == [1, 2]

    def test_a_centroid_without_points_starts_again_where_points_are_badly_served(self):
        """All but one point are equal: of three centroids, one at least begins on nothing."""
        points = torch.tensor([[0.0]] * 30 + [[5.0]])
        for seed in range(10):
            found = k_means(points, 3, torch.Generator().manual_seed(seed))
            assert {0.0, 5.0} <= set(found[:, 0].tolist())

    def test_nearest_gives_index_and_distance(self):
        index, distance = nearest(torch.tensor([[0.0], [4.0]]), torch.tensor([[5.0], [1.0]]))
        assert index.tolist() == [1, 0]
        assert distance.tolist() == [1, 1]


@both_forms
class TestFit:
    def test_no_two_items_share_all_codes(self, quantisation):
        factors_RF = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
        codes_RM = fit_codes(
            factors_RF, codes=3, codebook_size=8, quantisation=quantisation, seed=0
        )
        assert codes_RM.shape == (300, 3)
        assert codes_RM.dtype == torch.int64
        assert codes_RM[0].tolist() == [0] * 3
        assert codes_RM[1].tolist() == [1] * 3
        assert codes_RM[2:].min() == 2
        assert codes_RM[2:].max() <= 9
        assert len(codes_RM.unique(dim=0)) == 300

    def test_a_seed_decides_all(self, quantisation):
        factors_RF = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))

        def fitted(seed):
            return fit_codes(
                factors_RF, codes=3, codebook_size=8, quantisation=quantisation, seed=seed
            )

        one = fitted(1)
        torch.manual_seed(7)
        assert torch.equal(fitted(1), one)
        assert not torch.equal(fitted(2), one)

    def test_items_of_the_same_users_share_codes(self, quantisation):
        """Four groups of users, each with items of its own."""
        group_P = torch.arange(400) % 4
        rng = np.random.default_rng(0)
        users = group_P * 10 + torch.from_numpy(rng.integers(0, 10, 400))
        rows = 2 + group_P * 5 + torch.from_numpy(rng.integers(0, 5, 400))
        factors_RF = item_factors(users, rows, n_rows=22, n_factors=4, seed=0)
        codes_RM = fit_codes(
            factors_RF, codes=2, codebook_size=8, quantisation=quantisation, seed=0
        )
        groups_of_code: dict[int, set[int]] = {}
        for row in range(2, 22):
            groups_of_code.setdefault(int(codes_RM[row, 0]), set()).add((row - 2) // 5)
        assert all(len(groups) == 1 for groups in groups_of_code.values())

    def test_items_without_room_go_where_there_is_room(self, quantisation):
        """All factors are equal, so all items would share their first code: 16 of 4 x 4 fit."""
        codes_RM = fit_codes(
            torch.ones(18, 4), codes=2, codebook_size=4, quantisation=quantisation, seed=0
        )
        assert len(codes_RM[2:].unique(dim=0)) == 16

    def test_one_item_too_many(self, quantisation):
        with pytest.raises(ConfigError, match="17 items cannot be told apart by 2 codes of 4"):
            fit_codes(
                torch.ones(19, 4), codes=2, codebook_size=4, quantisation=quantisation, seed=0
            )


def test_residual_codes_take_what_is_left_over():
    """Items stand at a + b of four coarse and three fine steps: two codes tell them all."""
    coarse = torch.tensor([-30.0, -10.0, 10.0, 30.0])
    fine = torch.tensor([-1.0, 0.0, 1.0])
    factors_N1 = (coarse[:, None] + fine).reshape(-1, 1)
    factors_R1 = torch.cat([torch.zeros(2, 1), factors_N1])
    codes_RM = fit_codes(factors_R1, codes=3, codebook_size=4, quantisation="residual", seed=0)
    assert codes_RM[2:, 0].unique(return_counts=True)[1].tolist() == [3] * 4
    assert codes_RM[2:, 1].unique(return_counts=True)[1].tolist() == [4] * 3
    assert codes_RM[2:, 2].tolist() == [2] * 12  # nothing is left to tell apart


class TestRun:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            pytest.param({"codes": 1}, "1 leaves none to fit", id="only one"),
            pytest.param({"codes": 3}, "3 of them do not divide embedding_dim = 8", id="parts"),
            pytest.param({"quantisation": "tree"}, "quantisation", id="no such way"),
        ],
    )
    def test_settings_that_make_no_codes(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            run_config(**settings)

    def test_any_number_of_full_vectors_can_be_summed(self):
        assert run_config(codes=3, quantisation="residual").model.name == "sasrec"

    def test_no_codes_is_a_table_of_items(self):
        config = run_config(codes=0)
        model = build_model(
            config.model, config.features, item_counts=torch.ones(20), features_of_row=None
        )
        assert isinstance(model, SASRec)
        assert not isinstance(model.items, ItemCodes)

    def test_codes_come_from_the_training_part_alone(self, log):
        config = run_config()
        data = open_next_item_data(log, config)
        choices = data.training_choices()
        factors_RF = item_factors(
            choices.users, choices.rows, n_rows=data.catalogue.n_rows, seed=config.train.seed
        )
        expected = fit_codes(
            factors_RF, codes=4, codebook_size=8, quantisation="product", seed=config.train.seed
        )
        items = open_task(log, config).model.items
        assert isinstance(items, ItemCodes)
        assert torch.equal(items.code_of_row, expected)
        # Who chose what when, against a loop over the log.
        split, ids = data.split.behaviors, data.catalogue.item_ids
        assert list(
            zip(choices.users.tolist(), choices.rows.tolist(), choices.times.tolist(), strict=True)
        ) == [
            (user, int(np.searchsorted(ids, behavior["item"])) + FIRST_ROW, behavior["time"])
            for user, behavior, part in zip(log.behavior_users(), log.behaviors, split, strict=True)
            if part == Part.TRAIN
        ]

    def test_a_checkpoint_holds_the_codes(self, log, tmp_path):
        """The model is built without them, and scores as it did."""
        trained = train(run_config(), log, tmp_path / "run", ALONE, show_progress=False)
        loaded = load_model(tmp_path / "run" / MODEL)
        assert isinstance(loaded.model, SASRec)
        assert isinstance(trained.model, SASRec)
        assert torch.equal(loaded.model.items.table(), trained.model.items.table())
        assert loaded.model.items.table()[2:].any(dim=1).all()

    def test_a_checkpoint_of_other_codes_is_refused(self, log, tmp_path):
        train(run_config(), log, tmp_path / "run", ALONE, show_progress=False)
        path = tmp_path / "run" / MODEL
        content = torch.load(path, weights_only=True)
        content["fields"]["config"]["model"]["codes"] = 2
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="code_of_row"):
            load_model(path)

    def test_a_stopped_run_goes_on_with_its_codes(self, log, tmp_path):
        config = run_config()
        train(config, log, tmp_path / "whole", ALONE, show_progress=False)
        ticks = iter(range(10_000))

        def dying_clock() -> float:
            if next(ticks) > 8:
                raise InterruptedError
            return time.monotonic()

        stopped = tmp_path / "stopped"
        with pytest.raises(InterruptedError):
            train(config, log, stopped, ALONE, show_progress=False, clock=dying_clock)
        assert load_run_state(stopped / CHECKPOINT).progress.next_batch
        train(config, log, stopped, ALONE, show_progress=False, resume=True)
        lines = [
            [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
            for folder in (tmp_path / "whole", stopped)
        ]
        assert lines[0] == lines[1]
