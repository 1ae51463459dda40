"""Selections of experts, counted by hand on a small log."""

import numpy as np
import pytest
import torch

from tests.training.runs import run_config
from training.checkpoint import load_model
from training.comparison.experts import expert_load, key_usage, selections
from training.comparison.runs import read_run
from training.config import RunConfig, parse_config
from training.data.next_item_data import open_next_item_data
from training.data.splits import Part
from training.distributed import Worker
from training.models.pkm_act import PkmAct
from training.trainer import MODEL, train


def pkm_act(**settings: object) -> RunConfig:
    model = {"name": "pkm_act", "embedding_dim": 8, "ffn_units": 8, "keys_per_side": 4}
    config = run_config(model={**model, "experts": 2, **settings}, max_epochs=1)
    raw = config.model_dump(mode="json")
    return parse_config({**raw, "data": {"split": "leave-one-out"}}, "test")


@pytest.mark.parametrize("form", ["last", "causal"])
def test_every_test_user_selects_k_experts_in_each_layer(log, tmp_path, form):
    features = {"time_features": False}
    worker = Worker(device=torch.device("cpu"))
    train(pkm_act(form=form, **features), log, tmp_path / "run", worker, show_progress=False)
    counts_YE = selections(read_run(tmp_path / "run", "next-item"), log)

    trained = load_model(tmp_path / "run" / MODEL)
    assert isinstance(trained.model, PkmAct)
    expected_YE = np.zeros((2, 16), dtype=np.int64)
    loader = open_next_item_data(log, trained.config).held_out[Part.TEST]
    for _, batch in loader.batches():
        for b in range(len(batch.users)):
            chosen_Y1K = trained.model.chosen_experts(
                torch.from_numpy(batch.history_items[b : b + 1]),
                torch.from_numpy(batch.history_buckets[b : b + 1]),
            )
            for layer, chosen in enumerate(chosen_Y1K):
                expected_YE[layer, chosen.ravel().numpy()] += 1
    np.testing.assert_array_equal(counts_YE, expected_YE)
    assert counts_YE.sum(axis=1).tolist() == [2 * len(loader)] * 2


def test_key_usage_is_the_share_of_experts_with_a_selection():
    counts_YE = np.array([[3, 0, 1, 0], [1, 1, 1, 1]])
    assert key_usage(counts_YE).tolist() == [0.5, 1.0]


def test_load_falls_and_adds_up_in_each_layer():
    load_YE = expert_load(np.array([[1, 0, 3, 0], [2, 2, 2, 2]]))
    assert load_YE.tolist() == [[0.75, 0.25, 0.0, 0.0], [0.25] * 4]
