"""A literal bundle is made of what the literal equations describe, or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contract.catalogue import Catalogue
from tests.benchmarks.literal_bundle import main
from training.checkpoint import TrainedModel, save_model
from training.config import parse_config
from training.models.build import build_model

N_ITEMS = 5


def checkpoint(folder: Path, model: dict[str, Any]) -> Path:
    raw = {"name": "tiny", "features": {"history_length": 8}, "model": model}
    config = parse_config(raw, "test")
    counts = torch.ones(N_ITEMS + 2, dtype=torch.int64)
    network = build_model(config.model, config.features, item_counts=counts, features_of_row=None)
    trained = TrainedModel(
        config=config,
        model=network,
        catalogue=Catalogue(np.arange(1, N_ITEMS + 1)),
        metrics={},
        data_fingerprint="f",
    )
    save_model(folder / "model.pt", trained, item_counts=counts, features_of_row=None)
    return folder / "model.pt"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(
            {"name": "imn", "embedding_dim": 4, "segment": 3, "weights": "softmax"},
            "without ablations; this model has another weights, segment",
            id="ablations",
        ),
        pytest.param(
            {"name": "youtube_dnn", "embedding_dim": 4}, "youtube_dnn is not IMN", id="not IMN"
        ),
    ],
)
def test_another_model_is_refused_before_anything_is_written(tmp_path, capsys, model, message):
    path, target = checkpoint(tmp_path, model), tmp_path / "literal"
    with pytest.raises(SystemExit) as ended:
        main([str(path), str(tmp_path / "bundle"), str(target)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error
    assert message in error
    assert not target.exists()
