"""A real bundle of an untrained, tiny model, and what can be done to it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from contract.bundle import MANIFEST, file_entry

HISTORY_LENGTH = 8
ITEM_IDS = np.arange(10, 60, dtype=np.int64)


def make_bundle(folder: Path, *, version: str = "tiny-1", seed: int = 1, gain: float = 1.0) -> Path:
    """Export YouTube DNN with random weights, as `python -m exporter` does.

    `gain` multiplies all weights: with more of it, scores differ more.
    """
    # Only here: torch is for the making of the bundle, not for what is tested.
    import torch

    from contract.catalogue import Catalogue
    from contract.features import FeatureSpec
    from exporter.bundles import export
    from training.checkpoint import TrainedModel, save_model
    from training.config import RunConfig, YouTubeDnnConfig
    from training.models.build import build_model

    config = RunConfig(
        name="tiny",
        features=FeatureSpec(history_length=HISTORY_LENGTH),
        model=YouTubeDnnConfig(name="youtube_dnn", embedding_dim=4, head_units=(4,)),
    )
    catalogue = Catalogue(ITEM_IDS)
    counts = torch.ones(catalogue.n_rows, dtype=torch.int64)
    trained = TrainedModel(
        config=config,
        model=build_model(
            config.model, config.features, item_counts=counts, features_of_row=None, seed=seed
        ),
        catalogue=catalogue,
        metrics={"auc": 0.5},
        data_fingerprint="f",
    )
    with torch.no_grad():
        for weights in trained.model.parameters():
            weights.mul_(gain)
    save_model(folder / "model.pt", trained, item_counts=counts, features_of_row=None)
    export(folder / "model.pt", folder / "bundle", model_version=version)
    return folder / "bundle"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_manifest(bundle: Path, **changes: Any) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def list_file(bundle: Path, name: str, *, like: str | None = None) -> None:
    """Let the manifest list the file with its present hash and size (or those of another)."""
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    entry = file_entry(bundle / (like or name)).model_dump()
    change_manifest(bundle, files={**files, name: entry})
