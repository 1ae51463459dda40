"""The runs of the page of click models: told apart by name, and limited unless they are full."""

import pytest

from contract.errors import HistoryLogError
from tests.benchmarks.click_models import COMMON, MODELS, experiments, open_log

every_data = pytest.mark.parametrize("data", COMMON)


@every_data
@pytest.mark.parametrize("full", [False, True])
def test_no_two_runs_share_a_folder_or_settings(data, full):
    runs = list(experiments(data, full=full))
    names = [one.name(seed) for one in runs for seed in (1, 2)]
    assert len(set(names)) == len(names)
    configs = [one.config(1, full=full).model_dump_json() for one in runs]
    assert len(set(configs)) == len(configs)


@every_data
def test_full_runs_have_no_limit_of_time_and_the_others_have_one(data):
    assert all(
        one.config(1, full=False).train.max_train_s > 0 for one in experiments(data, full=False)
    )
    assert all(
        one.config(1, full=True).train.max_train_s == 0 for one in experiments(data, full=True)
    )


@every_data
def test_full_runs_are_of_every_model(data):
    found = {one.name(1) for one in experiments(data, full=True)}
    assert found >= {f"{data}-{model}" for model in MODELS}


def test_a_log_that_is_prepared_is_not_prepared_again(tmp_path):
    """Its folder is opened as it is, and found to be no log."""
    (tmp_path / "books").mkdir()
    with pytest.raises(HistoryLogError, match="is not a prepared log"):
        open_log("books", tmp_path / "nowhere", tmp_path)
