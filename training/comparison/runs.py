"""Run folders, read back when their training is over."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from training.checkpoint import load_model
from training.config import ClickModelConfig, NextItemModelConfig, RunConfig, parse_config
from training.errors import CheckpointError
from training.tasks import ClickTask
from training.trainer import CONFIG, COST, METRICS, MODEL

T = TypeVar("T")
Kind = Literal["next-item", "click"]
Ending = Literal["patience", "max_epochs", "max_train_s"]
# What does not make another experiment of a run.
_INDIFFERENT = ("name", "train.seed", "train.checkpoint_every_s")


class Cost(BaseModel):
    """What cost.json says: `best_epoch` from 0, `trained_s` in seconds without validation."""

    epochs: int
    best_epoch: int
    trained_s: float
    parameters: int
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """One finished run.

    `settings`: all that make another experiment of a run, such as "train.batch_size", as JSON has
    them. `metric`: what validation watched; `validation`: its best value. `test`: metrics of the
    test part. `ending`: the setting that ended the training.
    """

    folder: Path
    config: RunConfig
    settings: dict[str, Any]
    data_fingerprint: str
    metric: str
    validation: float
    test: dict[str, float]
    cost: Cost
    ending: Ending


def read_run(folder: Path, kind: Kind) -> FinishedRun:
    """Read the folder of a run of one kind of models; CheckpointError names it and says what is
    wrong with it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = _parsed(folder / CONFIG, lambda text: parse_config(json.loads(text), CONFIG))
    if not isinstance(
        config.model, NextItemModelConfig if kind == "next-item" else ClickModelConfig
    ):
        raise CheckpointError(
            f"{folder}: holds a run of {config.model.name}, expected one of a {kind} model"
        )
    lines = _parsed(folder / METRICS, _lines)
    metric = config.next_item.watched_metric if kind == "next-item" else ClickTask.metric
    test = next((line for line in lines if line["part"] == "test"), None)
    if test is None:
        raise CheckpointError(f"{folder}: the run is not finished, {METRICS} has no test part")
    validations = [line[metric] for line in lines if line["part"] == "valid" and metric in line]
    if not validations or metric not in test:
        raise CheckpointError(f"{folder}: {METRICS} lacks {metric} of validation or test")
    trained = load_model(folder / MODEL)
    if trained.config != config:
        raise CheckpointError(f"{folder}: {CONFIG} and {MODEL} are of different runs")
    cost = _parsed(folder / COST, Cost.model_validate_json)
    return FinishedRun(
        folder=folder,
        config=config,
        settings=_settings(config, kind),
        data_fingerprint=trained.data_fingerprint,
        metric=metric,
        validation=max(validations),
        test={name: value for name, value in test.items() if name != "part"},
        cost=cost,
        ending=_ending(config, validations, cost.epochs),
    )


def _settings(config: RunConfig, kind: Kind) -> dict[str, Any]:
    unread = {"next_item"} if kind == "click" else set()
    flat = _flat(config.model_dump(mode="json", exclude=unread))
    return {key: value for key, value in flat if key not in _INDIFFERENT}


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _ending(config: RunConfig, validations: list[float], epochs: int) -> Ending:
    since_best = len(validations) - 1 - validations.index(max(validations))
    if since_best >= config.train.patience:
        return "patience"
    return "max_epochs" if epochs >= config.train.max_epochs else "max_train_s"


def _lines(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    if not all(isinstance(line, dict) and "part" in line for line in lines):
        raise ValueError("a line that names no part")
    return lines


def _parsed(path: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from error
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path.parent}: {path.name}: {reasons}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent}: {path.name} is not readable: {error}") from error
