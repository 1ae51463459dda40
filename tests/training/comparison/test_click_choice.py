"""Which run of a click model is what: made-up runs, so that their metrics say it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.comparison.click_runs import DIN, IMN, SMALL, write_run
from training.comparison.click_choice import (
    DataSet,
    Variant,
    compare_clicks,
    display_name,
    label,
    ordered,
)
from training.comparison.runs import read_run
from training.data.log import PreparedLog
from training.errors import CheckpointError, ConfigError
from training.trainer import MODEL

NEGATIVES = {"samples": "negatives"}
Compare = Callable[[], DataSet]


@pytest.fixture
def compare(tmp_path: Path, log: PreparedLog) -> Compare:
    """Compare all runs under the test's folder, which are of one data set."""

    def one() -> DataSet:
        (data,) = compare_clicks(sorted(tmp_path.iterdir()), {"world": log})
        return data

    return one


def folders(setup_or_variant) -> list[str]:
    setup = getattr(setup_or_variant, "setup", setup_or_variant)
    return [run.folder.name for run in setup.runs]


def only_variant(data: DataSet) -> Variant:
    (variant,) = data.variants
    return variant


class TestData:
    def test_runs_find_their_log_by_its_fingerprint(self, tmp_path, log, plain_log):
        runs = [write_run(tmp_path / "w", log), write_run(tmp_path / "p", plain_log, DIN)]
        found = compare_clicks(runs, {"plain": plain_log, "world": log})
        assert [(data.name, data.samples, list(data.mains)) for data in found] == [
            ("plain", "negatives", ["din"]),
            ("world", "impressions", ["imn_3p"]),
        ]

    def test_sampled_negatives_of_a_labelled_log_are_other_data(self, tmp_path, log):
        runs = [write_run(tmp_path / "n", log, data=NEGATIVES), write_run(tmp_path / "i", log)]
        found = compare_clicks(runs, {"world": log})
        assert [(data.name, folders(data.mains["imn_3p"])) for data in found] == [
            ("world", ["i"]),
            ("world_negatives", ["n"]),
        ]

    def test_automatic_samples_are_what_they_come_to(self, tmp_path, log, compare):
        write_run(tmp_path / "auto", log, seed=1)
        write_run(tmp_path / "said", log, data={"samples": "impressions"}, seed=2)
        assert folders(compare().mains["imn_3p"]) == ["auto", "said"]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"test_fraction": 0.3}, r"data\.test_fraction = 0\.3, not 0\.2"),
            ({"valid_fraction": 0.3}, r"data\.valid_fraction = 0\.3, not 0\.1"),
            ({"max_candidates": 8}, r"data\.max_candidates = 8, not 32"),
            ({"min_item_count": 2}, r"data\.min_item_count = 2, not 1"),
            (
                {"n_negatives": 4, "negative_sampling": "popularity"},
                r"data\.n_negatives = 4, not 1; data\.negative_sampling = popularity, not uniform",
            ),
            ({"split": "leave-one-out"}, r"data\.split = leave-one-out, not time"),
        ],
    )
    def test_runs_tested_on_other_samples_are_refused(self, tmp_path, plain_log, data, message):
        runs = [write_run(tmp_path / "a", plain_log)]
        runs.append(write_run(tmp_path / "b", plain_log, DIN, data=data))
        with pytest.raises(
            ConfigError, match=rf"b: is tested on other samples than .*a: {message}$"
        ):
            compare_clicks(runs, {"plain": plain_log})

    def test_what_decides_nothing_about_the_test_may_differ(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log)
        write_run(tmp_path / "b", log, DIN, data={"unknown_rate": 0.1})
        assert list(compare().mains) == ["din", "imn_3p"]

    def test_a_run_of_no_log_is_refused(self, tmp_path, log, plain_log):
        run = write_run(tmp_path / "a", log)
        with pytest.raises(ConfigError, match=r"a: was trained on none of the logs: plain$"):
            compare_clicks([run], {"plain": plain_log})

    def test_one_log_has_one_name(self, tmp_path, log):
        run = write_run(tmp_path / "a", log)
        with pytest.raises(ConfigError, match=r"--log b: is the same log as a"):
            compare_clicks([run], {"a": log, "b": log})

    @pytest.mark.parametrize("name", ["ML-1M", "", "1m", "world_negatives"])
    def test_a_name_that_figures_cannot_have_is_refused(self, tmp_path, log, name):
        run = write_run(tmp_path / "a", log)
        with pytest.raises(ConfigError, match=rf"--log {name}: expected a name of lower-case"):
            compare_clicks([run], {name: log})

    def test_no_run_is_refused(self, log):
        with pytest.raises(ConfigError, match="no run to compare"):
            compare_clicks([], {"world": log})

    def test_one_run_twice_is_refused(self, tmp_path, log, compare):
        shutil.copytree(write_run(tmp_path / "a", log), tmp_path / "b")
        with pytest.raises(ConfigError, match=r"b: has the settings and the seed of .*a"):
            compare()

    def test_a_run_of_another_kind_of_models_is_refused(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log, {"name": "fpmc"})
        with pytest.raises(CheckpointError, match=r"holds a run of fpmc, expected one of a click"):
            compare()

    def test_an_unfinished_run_is_refused(self, tmp_path, log, compare):
        (write_run(tmp_path / "a", log) / MODEL).unlink()
        with pytest.raises(CheckpointError, match=r"model\.pt: no such file"):
            compare()


class TestNames:
    @pytest.mark.parametrize(
        ("model", "name", "printed"),
        [
            ({"name": "youtube_dnn"}, "youtube_dnn", "YouTube DNN"),
            ({"name": "dien"}, "dien", "DIEN"),
            ({"name": "mimn"}, "mimn", "MIMN"),
            ({"name": "ubr4ctr"}, "ubr4ctr", "UBR4CTR"),
            ({"name": "sasrec_click"}, "sasrec", "SASRec"),
            ({"name": "imn", "iterations": 1}, "imn_1p", "IMN-1P"),
            ({"name": "imn", "enhancement_steps": 2}, "imn_3p_plus", "IMN-3P+"),
        ],
    )
    def test_models_are_called_as_papers_call_them(self, tmp_path, log, model, name, printed):
        run = read_run(write_run(tmp_path / "a", log, {**model, **SMALL}), "click")
        assert display_name(run.config) == name
        assert label(name) == printed

    def test_imn_stands_last_in_order_of_its_iterations(self):
        names = ["imn_10p", "imn_3p_plus", "imn_2p", "ubr4ctr", "imn_3p", "din", "youtube_dnn"]
        expected = ["youtube_dnn", "din", "ubr4ctr", "imn_2p", "imn_3p", "imn_3p_plus", "imn_10p"]
        assert ordered(names) == expected


class TestMains:
    def test_the_best_validation_decides_and_brings_its_seeds_along(self, tmp_path, log, compare):
        write_run(tmp_path / "a1", log, valid=0.5, test=0.6, seed=1)
        write_run(tmp_path / "a2", log, valid=0.7, test=0.7, seed=2)
        write_run(tmp_path / "b", log, valid=0.65, test=0.9, learning_rate=0.01)
        main = compare().mains["imn_3p"]
        assert folders(main) == ["a1", "a2"]
        auc = main.test("auc")
        assert auc is not None
        assert auc.mean == pytest.approx(0.65)
        assert auc.deviation == pytest.approx(0.1 / 2**0.5)

    @pytest.mark.parametrize("ablated", [{"attention": "none"}, {"item_features": ["brand"]}])
    def test_a_main_setup_is_the_model_as_it_is(self, tmp_path, plain_log, ablated):
        runs = [write_run(tmp_path / "a", plain_log, valid=0.5)]
        runs.append(write_run(tmp_path / "b", plain_log, {**IMN, **ablated}, valid=0.9))
        (data,) = compare_clicks(runs, {"plain": plain_log})
        assert folders(data.mains["imn_3p"]) == ["a"]

    def test_main_setups_have_the_history_length_of_most_runs(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log, valid=0.6, length=8)
        write_run(tmp_path / "b", log, valid=0.9, length=16)
        write_run(tmp_path / "c", log, DIN, length=8)
        data = compare()
        assert data.history_length == 8
        assert folders(data.mains["imn_3p"]) == ["a"]

    def test_of_two_lengths_with_as_many_runs_the_longer_is_the_main_one(
        self, tmp_path, log, compare
    ):
        write_run(tmp_path / "a", log, length=8)
        write_run(tmp_path / "b", log, length=16)
        assert compare().history_length == 16

    def test_a_model_without_the_main_length_has_no_main_setup(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log, length=16)
        write_run(tmp_path / "b", log, seed=2, length=16)
        write_run(tmp_path / "c", log, DIN, length=8)
        data = compare()
        assert list(data.mains) == ["imn_3p"]
        assert list(data.lengths) == ["din"]
        assert folders(data.lengths["din"][8]) == ["c"]
        assert data.variants == ()

    def test_a_model_that_is_only_ablated_is_refused(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log, {**IMN, "attention": "dot"})
        with pytest.raises(ConfigError, match=r"a: there is no run of imn_3p as it is"):
            compare()

    def test_the_ceiling_is_what_the_runs_say(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log)
        assert compare().ceiling is None
        write_run(tmp_path / "b", log, DIN, metrics={"ceiling_auc": 0.9})
        assert compare().ceiling == 0.9


class TestVariants:
    @pytest.mark.parametrize(
        ("changed", "name"),
        [
            ({"attention": "none"}, "without_attention"),
            ({"attention": "dot"}, "dot_product"),
            ({"weights": "softmax"}, "softmax"),
            ({"distance": False}, "without_distance"),
            ({"walk": "target"}, "without_iterative_walk"),
            ({"cross": "delayed"}, "delayed_cross"),
            ({"segment": 4}, "segmented"),
        ],
    )
    def test_a_part_that_is_otherwise_makes_an_ablation(
        self, tmp_path, log, compare, changed, name
    ):
        write_run(tmp_path / "a", log)
        write_run(tmp_path / "b", log, {**IMN, **changed})
        variant = only_variant(compare())
        assert (variant.kind, variant.name, variant.model) == ("ablation", name, "imn_3p")

    def test_a_model_without_enhancement_is_an_ablation_of_the_one_with_it(
        self, tmp_path, log, compare
    ):
        write_run(tmp_path / "a", log)
        write_run(tmp_path / "b", log, {**IMN, "enhancement_steps": 3})
        data = compare()
        variant = only_variant(data)
        assert (variant.kind, variant.name) == ("ablation", "without_enhancement")
        assert (variant.model, folders(variant)) == ("imn_3p_plus", ["a"])
        assert data.differences(variant) == {"model.enhancement_steps": (0, 3)}

    def test_another_length_makes_a_variant_of_it(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log, length=16)
        write_run(tmp_path / "b", log, length=8)
        data = compare()
        assert (only_variant(data).kind, only_variant(data).name) == ("length", "L8")
        assert {length: folders(s) for length, s in data.lengths["imn_3p"].items()} == {
            8: ["b"],
            16: ["a"],
        }

    def test_features_of_items_make_a_variant_of_them(self, tmp_path, plain_log):
        runs = [write_run(tmp_path / "a", plain_log, DIN)]
        runs.append(write_run(tmp_path / "b", plain_log, {**DIN, "item_features": ["brand"]}))
        variant = only_variant(compare_clicks(runs, {"plain": plain_log})[0])
        assert (variant.kind, variant.name) == ("side features", "item_features")

    def test_the_budget_may_differ_beside_it(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log)
        write_run(
            tmp_path / "b", log, {**IMN, "distance": False},
            batch_size=32, max_epochs=5, patience=3, max_train_s=9.0, seed=7,
        )  # fmt: skip
        data = compare()
        assert only_variant(data).kind == "ablation"
        assert list(data.differences(only_variant(data))) == [
            "model.distance",
            "train.batch_size",
            "train.max_epochs",
            "train.patience",
            "train.max_train_s",
        ]

    @pytest.mark.parametrize(
        ("model", "settings", "name"),
        [
            ({}, {"learning_rate": 0.01}, "learning_rate_0_01"),
            ({}, {"batch_size": 32}, "batch_size_32"),
            ({"distance": False}, {"learning_rate": 0.01}, "distance_false_learning_rate_0_01"),
            ({"distance": False}, {"length": 4}, "history_length_4_distance_false"),
            ({"distance": False, "walk": "target"}, {}, "distance_false_walk_target"),
        ],
    )
    def test_any_other_variant_is_named_by_all_differences(
        self, tmp_path, log, compare, model, settings, name
    ):
        write_run(tmp_path / "a", log, valid=0.7)
        write_run(tmp_path / "a2", log, valid=0.7, seed=2)
        write_run(tmp_path / "b", log, {**IMN, **model}, valid=0.6, **settings)
        variant = only_variant(compare())
        assert (variant.kind, variant.name) == ("other", name)

    def test_of_two_of_a_name_the_best_validation_has_it(self, tmp_path, log, compare):
        write_run(tmp_path / "a", log, valid=0.9)
        write_run(tmp_path / "b", log, {**IMN, "distance": False}, valid=0.6)
        write_run(tmp_path / "c", log, {**IMN, "distance": False}, valid=0.7, batch_size=32)
        assert [(v.kind, v.name, folders(v)) for v in compare().variants] == [
            ("ablation", "without_distance", ["c"]),
            ("other", "distance_false", ["b"]),
        ]
