"""What is measured of which runs of click models."""

from dataclasses import asdict

import numpy as np
import torch

from contract.catalogue import FIRST_ROW
from tests.training.comparison.click_runs import DIN, IMN, SMALL, write_run
from training.checkpoint import load_model
from training.comparison import walks
from training.comparison.click_choice import compare_clicks
from training.comparison.click_measurements import cost_subjects, measure_clicks
from training.data.click_data import open_click_data
from training.data.splits import Part
from training.models.imn import IterativeMemoryNetwork
from training.trainer import MODEL

CPU = torch.device("cpu")


def test_attention_is_of_the_first_seed_of_every_imn_and_shown_of_three_iterations(tmp_path, log):
    for k in (1, 2, 3, 4):
        write_run(tmp_path / f"imn{k}", log, {**IMN, "iterations": k})
    write_run(tmp_path / "plus", log, {**IMN, "enhancement_steps": 3})
    write_run(tmp_path / "seed", log, seed=2)
    write_run(tmp_path / "din", log, DIN)
    data_sets = compare_clicks(sorted(tmp_path.iterdir()), {"world": log})
    found = measure_clicks(data_sets, costs=False, device=CPU)
    attention = found.attention["world"]
    assert list(attention.entropies) == ["imn_1p", "imn_2p", "imn_3p", "imn_4p"]
    assert [len(by_pass) for by_pass in attention.entropies.values()] == [1, 2, 3, 4]
    trained = load_model(tmp_path / "imn3" / MODEL)
    assert isinstance(trained.model, IterativeMemoryNetwork)
    data = open_click_data(log, trained.config)
    expected = walks.entropy(trained.model, data.loaders[Part.TEST], CPU)
    assert attention.entropies["imn_3p"] == expected
    assert attention.walker == "imn_3p"
    walk = walks.walk(trained.model, trained.config, log, data, CPU)
    for name, value in asdict(walk).items():
        np.testing.assert_array_equal(getattr(attention.walk, name), value)
    assert not found.costs


def test_without_imn_there_is_no_attention(tmp_path, log):
    write_run(tmp_path / "din", log, DIN)
    data_sets = compare_clicks([tmp_path / "din"], {"world": log})
    assert measure_clicks(data_sets, costs=False, device=CPU).attention == {}


def test_of_other_iterations_the_most_are_shown(tmp_path, log):
    for k in (1, 2):
        write_run(tmp_path / f"imn{k}", log, {**IMN, "iterations": k})
    data_sets = compare_clicks(sorted(tmp_path.iterdir()), {"world": log})
    attention = measure_clicks(data_sets, costs=False, device=CPU).attention["world"]
    assert attention.walker == "imn_2p"


def test_memory_enhancement_is_looked_at_where_there_is_nothing_else(tmp_path, log):
    write_run(tmp_path / "plus", log, {**IMN, "iterations": 2, "enhancement_steps": 3})
    data_sets = compare_clicks([tmp_path / "plus"], {"world": log})
    attention = measure_clicks(data_sets, costs=False, device=CPU).attention["world"]
    assert attention.walker == "imn_2p_plus"
    assert [len(by_pass) for by_pass in attention.entropies.values()] == [2]


def test_costs_are_of_what_the_paper_measures_over_the_smallest_catalogue(tmp_path, log, plain_log):
    write_run(tmp_path / "a", log, DIN, learning_rate=0.5)
    write_run(tmp_path / "b", log, {**IMN, "iterations": 5})
    write_run(tmp_path / "c", plain_log, DIN)
    write_run(tmp_path / "d", plain_log, {"name": "mimn", **SMALL})
    data_sets = compare_clicks(sorted(tmp_path.iterdir()), {"world": log, "plain": plain_log})
    subjects = cost_subjects(data_sets)
    assert list(subjects) == ["din", "mimn"]
    assert subjects["din"].config.train.learning_rate == 0.5
    assert {one.n_rows for one in subjects.values()} == {FIRST_ROW + 8}
