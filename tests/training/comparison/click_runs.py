"""Folders of finished click runs with made-up metrics: untrained, so that they cost nothing."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from contract.catalogue import FIRST_ROW, Catalogue
from training.checkpoint import TrainedModel, save_model
from training.config import parse_config
from training.data.log import PreparedLog
from training.models.build import build_model
from training.trainer import CONFIG, COST, METRICS, MODEL

COSTS = {"epochs": 4, "best_epoch": 1, "trained_s": 12.4, "parameters": 9, "device": "cpu"}
SMALL = {"embedding_dim": 4, "head_units": [4]}
IMN = {"name": "imn", "iterations": 3, **SMALL}
DIN = {"name": "din", **SMALL}


def write_run(
    folder: Path,
    log: PreparedLog,
    model: Mapping[str, object] = IMN,
    *,
    valid: float = 0.6,
    test: float = 0.7,
    length: int = 8,
    data: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    **train: object,
) -> Path:
    """Write a run whose best validation AUC is `valid` and whose test AUC is `test`; `metrics`:
    further ones of the test part. Return its folder.
    """
    config = parse_config(
        {
            "name": "tiny",
            "features": {"history_length": length},
            "data": data or {},
            "model": model,
            "train": train,
        },
        "test",
    )
    counts = torch.ones(FIRST_ROW + len(log.items), dtype=torch.int64)
    rows = {name: torch.zeros(len(counts), dtype=torch.int64) for name in log.item_features}
    trained = TrainedModel(
        config=config,
        model=build_model(config.model, config.features, item_counts=counts, features_of_row=rows),
        catalogue=Catalogue(log.items),
        metrics={"auc": test},
        data_fingerprint=log.header.fingerprint,
    )
    folder.mkdir(parents=True)
    save_model(folder / MODEL, trained, item_counts=counts, features_of_row=rows)
    (folder / CONFIG).write_text(json.dumps(config.model_dump(mode="json")))
    (folder / COST).write_text(json.dumps({**COSTS, "threads": 1}))
    aucs = (valid - 0.1, valid, valid - 0.02, valid - 0.01)
    lines: list[Mapping[str, object]] = [{"part": "valid", "auc": auc} for auc in aucs]
    lines.append({"part": "test", "n_samples": 288.0, "auc": test, **(metrics or {})})
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
