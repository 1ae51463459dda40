"""The settings of one training run, read from a TOML file; unknown keys are errors."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contract.features import FeatureSpec
from training.data.negatives import NegativeSampling
from training.data.splits import SplitName
from training.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Units = Annotated[tuple[Positive, ...], Field(max_length=8)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImnConfig(_Settings):
    """IMN-kP: `iterations` is k; `enhancement_steps` above 0 makes it IMN-kP+."""

    name: Literal["imn"]
    embedding_dim: Positive = 32
    iterations: Positive = 3
    enhancement_steps: Annotated[int, Field(ge=0)] = 0
    attention_units: Positive = 8
    head_units: Units = (128, 64)
    use_category: bool = False


class YouTubeDnnConfig(_Settings):
    """YouTube DNN as a click model."""

    name: Literal["youtube_dnn"]
    embedding_dim: Positive = 32
    head_units: Units = (128, 64)
    use_category: bool = False


class PopularityConfig(_Settings):
    """Item popularity; nothing is learned."""

    name: Literal["popularity"]


ModelConfig = Annotated[
    ImnConfig | YouTubeDnnConfig | PopularityConfig, Field(discriminator="name")
]


class DataConfig(_Settings):
    """Which samples are made of a prepared log.

    `samples`: the log's labelled impressions, or each behavior with `n_negatives` sampled ones;
    "auto" takes impressions where the log has labels. `min_item_count`: items that were chosen and
    shown less often in the training part are unknown items. `max_candidates`: of one moment.
    `unknown_rate`: share of items shown as unknown in training.
    """

    split: SplitName = "time"
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    samples: Literal["auto", "impressions", "negatives"] = "auto"
    n_negatives: Positive = 1
    negative_sampling: NegativeSampling = "uniform"
    max_candidates: Positive = 32
    min_item_count: Positive = 1
    unknown_rate: Annotated[float, Field(ge=0, lt=1)] = 0.002


class TrainConfig(_Settings):
    """How a model is trained: BCE, Adam, early stopping on validation AUC.

    `batch_size`: moments in a step, over all processes. `patience`: epochs without a better
    validation AUC before training stops. `checkpoint_every_s`: seconds between checkpoints.
    """

    seed: Annotated[int, Field(ge=0)] = 1
    batch_size: Positive = 512
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_epochs: Positive = 10
    patience: Positive = 2
    checkpoint_every_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0


class RunConfig(_Settings):
    """One named run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._+-]*$")]
    features: FeatureSpec = FeatureSpec()
    data: DataConfig = DataConfig()
    model: ModelConfig
    train: TrainConfig = TrainConfig()


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a run file; `overrides` such as "train.seed=2" replace single values.

    Raises ConfigError that names the key and what is allowed.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from error
    for override in overrides:
        _override(raw, override)
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str) -> RunConfig:
    """Check a mapping read from TOML or JSON; `where` names it in the error."""
    try:
        # TOML and JSON have lists only; strict mode must take them for tuples.
        return RunConfig.model_validate_json(json.dumps(raw))
    except TypeError as error:  # dates and times, which JSON has not
        raise ConfigError(f"{where}: {error}") from error
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'run'}: {e['msg']}" for e in error.errors()
        )
        raise ConfigError(f"{where}: {reasons}") from error


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.split(".")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {section} is not a section")
    target[last] = value
