"""Figures of click models by their names."""

import math

import numpy as np
import pytest

from tests.training.comparison.click_runs import DIN, IMN, write_run
from training.comparison.click_choice import compare_clicks
from training.comparison.click_costs import ClickCost
from training.comparison.click_figures import figures
from training.comparison.click_measurements import Attention, ClickMeasurements
from training.comparison.walks import Walk

NOTHING = ClickMeasurements(attention={}, subjects={}, costs={})


def test_main_setups_have_a_figure_for_each_metric(tmp_path, log):
    metrics = {
        "gauc": 0.61,
        "log_loss": 0.52,
        "brier_score": 0.23,
        "expected_calibration_error": 0.01,
        "expected_calibration_error_uncalibrated": 0.04,
        "calibration_ratio": 1.1,
    }
    write_run(tmp_path / "a", log, test=0.71, metrics=metrics)
    assert figures(compare_clicks([tmp_path / "a"], {"world": log}), NOTHING) == {
        "world_imn_3p_auc": 0.71,
        "world_imn_3p_gauc": 0.61,
        "world_imn_3p_log_loss": 0.52,
        "world_imn_3p_brier_score": 0.23,
        "world_imn_3p_ece": 0.01,
        "world_imn_3p_ece_uncalibrated": 0.04,
    }


def test_seeds_have_a_deviation(tmp_path, log):
    runs = [write_run(tmp_path / f"{n}", log, test=0.7 + n / 10, seed=n) for n in (1, 2)]
    named = figures(compare_clicks(runs, {"world": log}), NOTHING)
    assert named == {
        "world_imn_3p_auc": pytest.approx(0.85),
        "world_imn_3p_auc_sd": pytest.approx(0.1 / 2**0.5),
    }


def test_variants_are_named_by_what_they_are(tmp_path, log, plain_log):
    write_run(tmp_path / "a", log, test=0.70, metrics={"ceiling_auc": 0.9})
    write_run(tmp_path / "b", log, {**IMN, "distance": False}, test=0.71)
    write_run(tmp_path / "c", log, {**IMN, "enhancement_steps": 3}, test=0.72)
    write_run(tmp_path / "d", log, test=0.73, length=4)
    write_run(tmp_path / "e", log, valid=0.5, test=0.74, learning_rate=0.01)
    write_run(tmp_path / "f", plain_log, DIN, test=0.75)
    write_run(tmp_path / "g", plain_log, {**DIN, "item_features": ["brand"]}, test=0.76)
    data_sets = compare_clicks(sorted(tmp_path.iterdir()), {"world": log, "plain": plain_log})
    assert figures(data_sets, NOTHING) == {
        "world_imn_3p_auc": 0.70,
        "world_imn_3p_without_distance_auc": 0.71,
        "world_imn_3p_plus_auc": 0.72,
        "world_imn_3p_plus_without_enhancement_auc": 0.70,
        "world_imn_3p_L4_auc": 0.73,
        "world_imn_3p_L8_auc": 0.70,
        "world_imn_3p_learning_rate_0_01_auc": 0.74,
        "world_ceiling_auc": 0.9,
        "plain_din_auc": 0.75,
        "plain_din_item_features_auc": 0.76,
    }


def test_what_is_no_number_is_no_figure(tmp_path, log):
    write_run(tmp_path / "a", log, metrics={"gauc": math.nan})
    data_sets = compare_clicks([tmp_path / "a"], {"world": log})
    assert list(figures(data_sets, NOTHING)) == ["world_imn_3p_auc"]


def test_measurements_have_figures(tmp_path, log):
    write_run(tmp_path / "a", log)
    none = np.zeros(0, dtype=np.int64)
    weights = np.zeros((2, 0), dtype=np.float32)
    walk = Walk(user_id="u", target_item=1, item_ids=none, ages_s=none, weights=weights)
    entropies = {"imn_1p": [2.0], "imn_2p": [3.0, 4.0]}
    cost = ClickCost(steps_per_s=4.0, score_ms=2.0, step_bytes=3_000_000)
    measured = ClickMeasurements(
        attention={"world": Attention(entropies=entropies, walker="imn_2p", walk=walk)},
        subjects={},
        costs={"din": {50: cost, 100: cost}},
    )
    named = figures(compare_clicks([tmp_path / "a"], {"world": log}), measured)
    assert (
        named.items()
        >= {
            "world_imn_1p_entropy_pass1": 2.0,
            "world_imn_2p_entropy_pass1": 3.0,
            "world_imn_2p_entropy_pass2": 4.0,
            "din_steps_per_s_L50": 4.0,
            "din_score_ms_L100": 2.0,
            "din_step_mb_L100": 3.0,
        }.items()
    )
