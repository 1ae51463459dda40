"""Tables of click models: each number stands where it belongs, beside its budget."""

from pathlib import Path

import pytest

from tests.training.comparison.click_runs import DIN, IMN, SMALL, write_run
from training.comparison.click_choice import compare_clicks
from training.comparison.click_published import BOOKS_AUC
from training.comparison.click_sections import later_sections, sections
from training.comparison.tables import Section
from training.data.log import PreparedLog

METRICS = {
    "gauc": 0.61,
    "log_loss": 0.52,
    "brier_score": 0.23,
    "expected_calibration_error": 0.01,
}
BUDGET = {
    "epochs (best)": "4 (2)",
    "training s": "12",
    "device": "cpu, 1 thread",
    "seeds": "1",
    "ended by": "patience",
}


def made(folder: Path, **logs: PreparedLog) -> dict[str, Section]:
    data_sets = compare_clicks(sorted(folder.iterdir()), logs)
    return {one.title: one for one in [*sections(data_sets), *later_sections(data_sets)]}


def rows(section: Section) -> list[dict[str, str]]:
    return [dict(zip(section.table.heads, row, strict=True)) for row in section.table.rows]


def parts(section: Section, *heads: str) -> list[tuple[str, ...]]:
    return [tuple(row[head] for head in heads) for row in rows(section)]


class TestAuc:
    def test_each_data_set_has_a_column_beside_the_papers(self, tmp_path, log, plain_log):
        write_run(tmp_path / "a", log, test=0.71, metrics={"ceiling_auc": 0.93})
        write_run(tmp_path / "b", plain_log, test=0.72)
        write_run(tmp_path / "c", plain_log, {**IMN, "iterations": 4}, test=0.73)
        section = made(tmp_path, world=log, plain=plain_log)["AUC by model"]
        told = {row["model"]: row for row in rows(section)}
        assert section.table.heads == ("model", "world", "plain", "Books, IMN paper")
        assert tuple(told["IMN-3P"].values()) == ("IMN-3P", "0.7100", "0.7200", "0.8672")
        assert tuple(told["IMN-4P"].values()) == ("IMN-4P", "", "0.7300", "")
        assert tuple(told["DIEN"].values()) == ("DIEN", "", "", "0.8550")
        assert tuple(told["true probabilities"].values())[1:] == ("0.9300", "", "")
        assert len(told) == len(BOOKS_AUC) + 2
        assert "not say how its negatives are made" in section.text

    def test_a_log_that_knows_no_probabilities_has_no_ceiling(self, tmp_path, plain_log):
        write_run(tmp_path / "a", plain_log)
        section = made(tmp_path, plain=plain_log)["AUC by model"]
        assert section.table.rows[-1][0] == "IMN-3P+"
        assert "true click probabilities" not in section.text


class TestMetrics:
    def test_all_metrics_of_a_main_setup_stand_beside_its_budget(self, tmp_path, log):
        write_run(tmp_path / "a", log, valid=0.66, test=0.71, metrics=METRICS)
        (row,) = rows(made(tmp_path, world=log)["Metrics on world"])
        assert row == {
            "model": "IMN-3P",
            "validation AUC": "0.6600",
            "AUC": "0.7100",
            "GAUC": "0.6100",
            "log-loss": "0.5200",
            "Brier": "0.2300",
            "ECE calibrated": "",
            "ECE uncalibrated": "0.0100",
            **BUDGET,
            "run folders": "a",
        }

    def test_a_calibrated_run_has_both_errors(self, tmp_path, log):
        before = {"expected_calibration_error_uncalibrated": 0.04}
        write_run(tmp_path / "a", log, metrics=METRICS | before)
        section = made(tmp_path, world=log)["Metrics on world"]
        assert parts(section, "ECE calibrated", "ECE uncalibrated") == [("0.0100", "0.0400")]

    def test_seeds_are_averaged_with_their_spread(self, tmp_path, log):
        write_run(tmp_path / "a", log, test=0.7, seed=1)
        write_run(tmp_path / "b", log, test=0.8, seed=2)
        section = made(tmp_path, world=log)["Metrics on world"]
        expected = [("0.7500 ± 0.0707", "1, 2", "a, b")]
        assert parts(section, "AUC", "seeds", "run folders") == expected

    def test_the_samples_are_told(self, tmp_path, log, plain_log):
        write_run(tmp_path / "a", log)
        write_run(tmp_path / "b", plain_log, data={"n_negatives": 3})
        found = made(tmp_path, world=log, plain=plain_log)
        text = found["Metrics on world"].text
        assert "Tested on 288 labelled impressions. Split by time, the newest 20%" in text
        assert "read the newest 8 behaviors" in text
        text = found["Metrics on plain"].text
        assert "5 users, 8 items, 120 behaviors. Tested on 288 samples" in text
        assert "each with 3 negatives drawn uniformly" in text

    def test_a_limit_that_ended_a_training_is_told(self, tmp_path, log):
        write_run(tmp_path / "a", log, patience=4, max_epochs=4)
        section = made(tmp_path, world=log)["Metrics on world"]
        assert parts(section, "ended by") == [("shortened: max_epochs = 4",)]


class TestVariants:
    def test_ablations_stand_below_their_model_with_the_difference(self, tmp_path, log):
        write_run(tmp_path / "a", log, test=0.70)
        write_run(tmp_path / "b", log, {**IMN, "distance": False}, test=0.68, batch_size=32)
        write_run(tmp_path / "c", log, {**IMN, "enhancement_steps": 3}, test=0.71)
        section = made(tmp_path, world=log)["Ablations on world"]
        assert parts(section, "model", "ablation", "AUC", "difference", "run folders") == [
            ("IMN-3P", "as it is", "0.7000", "", "a"),
            ("IMN-3P", "without distance", "0.6800", "-0.0200", "b"),
            ("IMN-3P+", "as it is", "0.7100", "", "c"),
            ("IMN-3P+", "without enhancement", "0.7000", "-0.0100", "a"),
        ]
        assert rows(section)[1]["differs in"] == (
            "model.distance = false, not true; train.batch_size = 32, not 512"
        )
        assert rows(section)[1].items() >= BUDGET.items()
        assert section.svg is not None
        assert "IMN-3P+ without enhancement" in section.svg

    def test_lengths_stand_in_order_and_make_a_line(self, tmp_path, log):
        for length, auc in ((16, 0.72), (4, 0.68), (8, 0.70)):
            write_run(tmp_path / f"a{length}", log, DIN, test=auc, length=length)
        write_run(tmp_path / "b", log, DIN, length=8, test=0.70, seed=2)
        section = made(tmp_path, world=log)["AUC over the history length on world"]
        assert parts(section, "model", "L", "AUC", "difference") == [
            ("DIN", "4", "0.6800", "-0.0200"),
            ("DIN", "8", "0.7000 ± 0.0000", ""),
            ("DIN", "16", "0.7200", "+0.0200"),
        ]
        assert section.svg is not None
        assert "history length L" in section.svg

    def test_features_stand_beside_the_model_without(self, tmp_path, plain_log):
        write_run(tmp_path / "a", plain_log, DIN, test=0.70)
        write_run(tmp_path / "b", plain_log, {**DIN, "item_features": ["brand"]}, test=0.75)
        section = made(tmp_path, plain=plain_log)["Features of items on plain"]
        assert parts(section, "model", "features", "AUC", "difference") == [
            ("DIN", "none", "0.7000", ""),
            ("DIN", "brand", "0.7500", "+0.0500"),
        ]
        assert parts(section, "differs in")[1] == ("model.item_features = brand, not none",)

    def test_what_differs_in_anything_else_is_named(self, tmp_path, log):
        write_run(tmp_path / "a", log, valid=0.7)
        write_run(tmp_path / "b", log, valid=0.6, learning_rate=0.01)
        section = made(tmp_path, world=log)["Other runs on world"]
        assert parts(section, "setup", "differs in") == [
            ("main", ""),
            ("other", "train.learning_rate = 0.01, not 0.001"),
        ]

    def test_sections_without_runs_are_left_out(self, tmp_path, log):
        write_run(tmp_path / "a", log)
        write_run(tmp_path / "b", log, {"name": "dien", **SMALL})
        assert list(made(tmp_path, world=log)) == ["AUC by model", "Metrics on world"]


def test_all_rows_are_as_wide_as_their_heads(tmp_path, log):
    write_run(tmp_path / "a", log)
    write_run(tmp_path / "b", log, {**IMN, "walk": "target"})
    write_run(tmp_path / "c", log, length=4)
    write_run(tmp_path / "d", log, valid=0.5, learning_rate=0.1)
    for section in made(tmp_path, world=log).values():
        assert {len(row) for row in section.table.rows} == {len(section.table.heads)}


@pytest.mark.parametrize("name", BOOKS_AUC)
def test_published_figures_lie_where_the_paper_has_them(name):
    assert 0.82 < BOOKS_AUC[name] < 0.87
