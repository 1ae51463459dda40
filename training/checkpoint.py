"""What is kept of a run: everything to go on after a kill, and at the end the model alone.

Files are replaced whole (`staged_file`), and read without unpickling code (`weights_only`).
"""

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contract.bundle import ScoreKind
from contract.catalogue import Catalogue
from training.calibration import Calibration
from training.config import RunConfig, parse_config
from training.errors import CheckpointError, ConfigError
from training.folders import staged_file
from training.models.build import Scorer, build_model, chosen_features, score_kind

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A stopped run: `epoch` and `next_batch` say where the data goes on.

    `loss_sum`, `n_samples`: of the running epoch. `best_metric`: the best validation's.
    `validations_since_best`: how often a validation was no better. `trained_s`: seconds of training
    so far. `log`: the lines of metrics.jsonl so far.
    """

    epoch: int
    next_batch: int
    loss_sum: float
    n_samples: int
    best_metric: float
    best_epoch: int
    validations_since_best: int
    trained_s: float
    finished: bool
    log: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A checkpoint of a run that goes on. `auxiliary`: of what is trained beside the model."""

    config: dict[str, Any]
    data_fingerprint: str
    progress: Progress
    model: dict[str, Tensor]
    auxiliary: dict[str, Tensor]
    best_model: dict[str, Tensor]
    optimizer: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model with everything that serving it needs.

    `calibration`: of a click model's logits; None leaves them as they are. `metrics`: of the test
    part, and of calibrated probabilities where there is a calibration.
    """

    config: RunConfig
    model: nn.Module
    catalogue: Catalogue
    metrics: dict[str, float]
    data_fingerprint: str
    calibration: Calibration | None = None

    @property
    def score_kind(self) -> ScoreKind:
        """Return whether the model's scores are probabilities."""
        return score_kind(self.config.model)

    def scorer(self) -> Scorer:
        """Return what gives the scores that are served, in evaluation mode."""
        return Scorer(self.model, self.score_kind, self.calibration).eval()


def save_run_state(path: Path, state: RunState) -> None:
    """Replace `path` by the state, atomically."""
    _save(path, "run", {**vars(state), "progress": asdict(state.progress)})


def load_run_state(path: Path) -> RunState:
    """Read what `save_run_state` wrote; raises CheckpointError."""
    fields = _load(path, "run")
    try:
        return RunState(**{**fields, "progress": Progress(**fields["progress"])})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a run state: {error}") from error


def save_model(
    path: Path,
    trained: TrainedModel,
    *,
    item_counts: Tensor,
    features_of_row: Mapping[str, Tensor] | None,
    n_users: int = 0,
) -> None:
    """Replace `path` by the trained model, atomically; the others are as in `build_model`."""
    _save(
        path,
        "model",
        {
            "config": trained.config.model_dump(mode="json"),
            "item_ids": torch.from_numpy(trained.catalogue.item_ids),
            "item_counts": item_counts,
            "features_of_row": chosen_features(trained.config.model, features_of_row or {}),
            "n_users": n_users,
            "weights": trained.model.state_dict(),
            "calibration": trained.calibration and trained.calibration.as_fields(),
            "metrics": trained.metrics,
            "data_fingerprint": trained.data_fingerprint,
        },
    )


def load_model(path: Path) -> TrainedModel:
    """Read what `save_model` wrote, in evaluation mode; raises CheckpointError."""
    fields = _load(path, "model")
    try:
        config = parse_config(fields["config"], str(path))
        model = build_model(
            config.model,
            config.features,
            item_counts=fields["item_counts"],
            # Models that were saved before there were features have none.
            features_of_row=fields.get("features_of_row"),
            n_users=fields["n_users"],
        )
        model.load_state_dict(fields["weights"])
        # Models that were saved before there were calibrations have none.
        calibration = fields.get("calibration")
        return TrainedModel(
            config=config,
            model=model.eval(),
            catalogue=Catalogue(fields["item_ids"].numpy().astype(np.int64)),
            metrics=fields["metrics"],
            data_fingerprint=fields["data_fingerprint"],
            calibration=None if calibration is None else Calibration(**calibration),
        )
    except (KeyError, TypeError, RuntimeError, ConfigError) as error:
        raise CheckpointError(f"{path}: not a trained model: {error}") from error


def _save(path: Path, kind: str, fields: dict[str, Any]) -> None:
    with staged_file(path) as staging:
        torch.save({"format_version": FORMAT_VERSION, "kind": kind, "fields": fields}, staging)


def _load(path: Path, kind: str) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint: {error}") from error
    if not isinstance(content, dict) or "fields" not in content:
        raise CheckpointError(f"{path}: not a checkpoint of this program")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {content.get('format_version')!r}, "
            f"this program reads version {FORMAT_VERSION}"
        )
    if content.get("kind") != kind:
        raise CheckpointError(f"{path}: holds a {content.get('kind')}, expected a {kind}")
    fields: dict[str, Any] = content["fields"]
    return fields
