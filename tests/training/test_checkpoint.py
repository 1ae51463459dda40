"""Checkpoints on disk."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from contract.catalogue import FIRST_ROW, Catalogue
from tests.training.models.inputs import inputs
from tests.training.runs import run_config
from training.calibration import Calibration
from training.checkpoint import (
    FORMAT_VERSION,
    TrainedModel,
    load_model,
    load_run_state,
    save_model,
)
from training.errors import CheckpointError
from training.models.build import build_model

COUNTS = torch.arange(20)
ROWS = (COUNTS - FIRST_ROW).clamp(min=0)
FEATURES = {"author": ROWS, "brand": ROWS % 5, "category": ROWS % 3}


@pytest.fixture
def saved(tmp_path):
    """A model with two of the log's three features, saved; returns it with its path."""
    config = run_config(
        model={"name": "imn", "embedding_dim": 4, "item_features": ["category", "brand"]}
    )
    model = build_model(
        config.model, config.features, item_counts=COUNTS, features_of_row=FEATURES, seed=1
    )
    trained = TrainedModel(
        config=config,
        model=model.eval(),
        catalogue=Catalogue(np.arange(1, 19)),
        metrics={"auc": 0.5},
        data_fingerprint="f",
    )
    save_model(tmp_path / "model.pt", trained, item_counts=COUNTS, features_of_row=FEATURES)
    return trained, tmp_path / "model.pt"


def test_a_loaded_model_scores_as_the_saved_one(saved):
    trained, path = saved
    loaded = load_model(path)
    batch = inputs([5, 0])
    assert torch.equal(loaded.model(*batch), trained.model(*batch))
    assert loaded.config == trained.config
    assert loaded.catalogue.item_ids.tolist() == trained.catalogue.item_ids.tolist()
    assert not loaded.model.training


def test_its_calibration_is_loaded_and_in_its_scores(saved):
    trained, path = saved
    curve = Calibration("isotonic", slope=0.7, knots=[-0.1, 0.05], values=[-2.0, -1.9])
    save_model(
        path,
        replace(trained, calibration=curve),
        item_counts=COUNTS,
        features_of_row=FEATURES,
    )
    loaded = load_model(path)
    batch = inputs([5, 0])
    assert loaded.calibration is not None
    assert loaded.calibration.as_fields() == curve.as_fields()
    assert torch.equal(loaded.model(*batch), trained.model(*batch))
    expected = torch.sigmoid(curve(trained.model(*batch)))
    assert torch.equal(loaded.scorer()(*batch), expected)
    assert not torch.equal(trained.scorer()(*batch), expected)


def test_a_model_from_before_calibrations_has_none(saved):
    trained, path = saved
    content = torch.load(path, weights_only=True)
    del content["fields"]["calibration"]
    del content["fields"]["config"]["train"]["calibration"]
    del content["fields"]["config"]["data"]["click_rate"]
    torch.save(content, path)
    loaded = load_model(path)
    assert loaded.calibration is None
    assert loaded.config == trained.config
    batch = inputs([5, 0])
    assert torch.equal(loaded.scorer()(*batch), torch.sigmoid(trained.model(*batch)))


def test_features_that_the_model_does_not_read_are_left_out(saved):
    _, path = saved
    kept = torch.load(path, weights_only=True)["fields"]["features_of_row"]
    assert list(kept) == ["category", "brand"]


class TestFromBeforeFeatures:
    def save(self, path: Path, *, use_category: bool) -> TrainedModel:
        """Write what a model without features was saved as when there was only a category."""
        config = run_config()
        model = build_model(
            config.model, config.features, item_counts=COUNTS, features_of_row=None, seed=1
        )
        trained = TrainedModel(
            config=config, model=model.eval(), catalogue=Catalogue(np.arange(1, 19)), metrics={},
            data_fingerprint="f",
        )  # fmt: skip
        save_model(path, trained, item_counts=COUNTS, features_of_row=None)
        content = torch.load(path, weights_only=True)
        del content["fields"]["features_of_row"]
        del content["fields"]["config"]["model"]["item_features"]
        content["fields"]["category_of_row"] = None
        content["fields"]["config"]["model"]["use_category"] = use_category
        torch.save(content, path)
        return trained

    def test_a_model_without_category_is_loaded(self, tmp_path):
        trained = self.save(tmp_path / "model.pt", use_category=False)
        loaded = load_model(tmp_path / "model.pt")
        assert loaded.config == trained.config
        batch = inputs([5, 0])
        assert torch.equal(loaded.model(*batch), trained.model(*batch))

    def test_a_model_with_category_is_refused(self, tmp_path):
        self.save(tmp_path / "model.pt", use_category=True)
        with pytest.raises(CheckpointError, match=r"model\.item_features = \['category'\]"):
            load_model(tmp_path / "model.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt: no such file"):
        load_model(tmp_path / "none.pt")


def test_half_a_file_is_refused(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not readable as a checkpoint"):
        load_model(path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(CheckpointError, match="not readable as a checkpoint"):
        load_model(tmp_path / "model.pt")
    assert not (tmp_path / "owned").exists()


def test_another_kind_of_file_is_refused(saved):
    _, path = saved
    with pytest.raises(CheckpointError, match="holds a model, expected a run"):
        load_run_state(path)


def test_another_format_version_is_refused(tmp_path):
    torch.save({"format_version": 7, "kind": "model", "fields": {}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="format version 7, this program reads version 2"):
        load_model(tmp_path / "model.pt")


def test_missing_fields_are_refused(tmp_path):
    content = {"format_version": FORMAT_VERSION, "kind": "model", "fields": {}}
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not a trained model"):
        load_model(tmp_path / "model.pt")
