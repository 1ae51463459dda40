"""Trained models, without the training, and their bundles."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from contract.bundle import Manifest, Precision
from contract.catalogue import FIRST_ROW, Catalogue
from exporter.bundles import export
from exporter.parity import ParityRow
from tests.training.conftest import world_log as world_log
from tests.training.runs import run_config
from training.checkpoint import TrainedModel, save_model
from training.config import parse_config
from training.data.log import PreparedLog
from training.distributed import Worker
from training.models.build import build_model
from training.trainer import MODEL, train

MODELS: dict[str, dict[str, object]] = {
    "imn": {"name": "imn", "embedding_dim": 8, "iterations": 2, "head_units": [8]},
    "imn with enhancement and features": {
        "name": "imn", "embedding_dim": 8, "iterations": 3, "enhancement_steps": 2,
        "head_units": [8], "item_features": ["category", "brand"],
    },
    "imn in segments": {
        "name": "imn", "embedding_dim": 8, "iterations": 2, "head_units": [8], "segment": 8,
    },
    "youtube_dnn": {"name": "youtube_dnn", "embedding_dim": 8, "head_units": [8]},
    "popularity": {"name": "popularity"},
}  # fmt: skip


def features_of(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return features of items for the rows of a catalogue; the last item has no brand."""
    items = (rows - FIRST_ROW).clamp(min=0)
    return {"brand": (len(rows) - 1 - rows) % 7 * (items > 0), "category": items % 5}


def save_checkpoint(path: Path, model: str, *, history_length: int = 30, n_items: int = 40) -> Path:
    """Save one of MODELS, untrained, and return its path."""
    config = parse_config(
        {"name": "tiny", "features": {"history_length": history_length}, "model": MODELS[model]},
        model,
    )
    counts = torch.arange(n_items + 2)
    features = features_of(counts)
    network = build_model(
        config.model, config.features, item_counts=counts, features_of_row=features, seed=1
    )
    trained = TrainedModel(
        config=config,
        model=network,
        catalogue=Catalogue(np.arange(1, n_items + 1) * 1000),
        metrics={"auc": 0.7, "gauc": float("nan")},
        data_fingerprint="fingerprint",
    )
    save_model(path, trained, item_counts=counts, features_of_row=features)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves an untrained model as a checkpoint."""

    def save(model: str = "imn", **sizes: int) -> Path:
        return save_checkpoint(tmp_path / "model.pt", model, **sizes)

    return save


@dataclass(frozen=True)
class Exported:
    """A bundle that tests share, so none may alter it; `table` and `manifest` as of `export`."""

    checkpoint: Path
    bundle: Path
    manifest: Manifest
    table: list[ParityRow]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Return a function that gives the bundle of an untrained model, exported at its first use."""
    folder = tmp_path_factory.mktemp("exported")
    known: dict[tuple[str, Precision], Exported] = {}

    def once(model: str = "imn", precision: Precision = "fp32") -> Exported:
        if (model, precision) not in known:
            path = folder / f"{model}.pt"
            if not path.exists():
                save_checkpoint(path, model)
            bundle = folder / f"{model}, {precision}"
            table: list[ParityRow] = []
            manifest = export(path, bundle, precision=precision, report=table.extend)
            known[model, precision] = Exported(path, bundle, manifest, table)
        return known[model, precision]

    return once


@pytest.fixture(scope="session")
def trained_checkpoint(world_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YouTube DNN that was trained on `world_log`, for one epoch."""
    folder = tmp_path_factory.mktemp("run")
    alone = Worker(device=torch.device("cpu"))
    config = run_config(model=MODELS["youtube_dnn"], max_epochs=1)
    train(config, PreparedLog(world_log), folder, alone, show_progress=False)
    return folder / MODEL
