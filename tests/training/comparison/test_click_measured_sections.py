"""Sections of what was measured of click models."""

import math

import numpy as np
import pytest

from tests.training.comparison.click_runs import DIN, IMN, SMALL, write_run
from training.comparison.click_choice import DataSet, compare_clicks
from training.comparison.click_costs import LENGTHS, ClickCost
from training.comparison.click_measured_sections import attention_sections, cost_sections
from training.comparison.click_measurements import Attention, ClickMeasurements, cost_subjects
from training.comparison.walks import Walk

WALK = Walk(
    user_id="ann",
    target_item=77,
    item_ids=np.array([11, 12, 13]),
    ages_s=np.array([3 * 86_400, 43_200, 60]),
    weights=np.array([[0.2, 0.2, 0.1], [0.1, 0.8, 0.1]], dtype=np.float32),
)


@pytest.fixture
def data_sets(tmp_path, log) -> tuple[DataSet, ...]:
    write_run(tmp_path / "din", log, DIN)
    write_run(tmp_path / "sasrec", log, {"name": "sasrec_click", **SMALL})
    write_run(tmp_path / "imn1", log, {**IMN, "iterations": 1}, test=0.7)
    write_run(tmp_path / "imn2", log, {**IMN, "iterations": 2}, test=0.8)
    write_run(tmp_path / "imn3", log, test=0.8)
    return compare_clicks(sorted(tmp_path.iterdir()), {"world": log})


def test_costs_grow_with_the_exponents_beside_the_expected_orders(data_sets):
    costs = {
        name: {
            length: ClickCost(
                steps_per_s=1e3 / length**x, score_ms=length / 100, step_bytes=1000 * length**x
            )
            for length in LENGTHS
        }
        for name, x in (("din", 1), ("sasrec", 2))
    }
    subjects = cost_subjects(data_sets)
    complexity, cost = cost_sections(
        ClickMeasurements(attention={}, subjects=subjects, costs=costs)
    )
    din, sasrec = complexity.table.rows
    assert din == ("DIN", "1.00", "1.00", "1.00", "O(L d^2)", "O(L d)", "O(1)", "as described")
    assert sasrec[:6] == ("SASRec", "2.00", "1.00", "2.00", "O(L^2 d)", "O(L^2)")
    assert sasrec[7] == "O(L d^2), O(L d)"
    assert cost.table.rows[1] == ("DIN", "100", "10.00", "1.00", "0.1", "0.62")
    assert cost.table.rows[-1] == ("SASRec", "1000", "0.00", "10.00", "1000.0", "out of memory")
    assert cost.svg is not None
    assert "training steps/s" in cost.svg
    assert "Catalogue of 82 rows" in cost.text


def test_without_costs_there_is_no_section_of_them():
    assert cost_sections(ClickMeasurements(attention={}, subjects={}, costs={})) == []


def test_the_attention_is_told_and_drawn(data_sets):
    entropies = {"imn_1p": [1.5], "imn_2p": [1.25, 1.0]}
    attention = Attention(entropies=entropies, walker="imn_2p", walk=WALK)
    iterations, walk = attention_sections(
        data_sets, ClickMeasurements(attention={"world": attention}, subjects={}, costs={})
    )
    assert iterations.title == "Iterations on world"
    assert iterations.table.heads[2:4] == ("pass 1", "pass 2")
    assert iterations.table.rows == (
        ("IMN-1P", "0.7000", "1.5000", "", "imn1"),
        ("IMN-2P", "0.8000", "1.2500", "1.0000", "imn2"),
    )
    assert f"ln 8 = {math.log(8):.2f}" in iterations.text
    assert walk.title == "Attention of IMN-2P on world"
    assert walk.table.rows == (
        ("2", "12", "0.50", "0.2000", "0.8000"),
        ("1", "11", "3.00", "0.2000", "0.1000"),
        ("3", "13", "0.00", "0.1000", "0.1000"),
    )
    assert "user ann, who then chose item 77" in walk.text
    assert "add up to 0.50, 1.00" in walk.text
    for section in (iterations, walk):
        assert section.svg is not None
        assert "<svg" in section.svg
