"""The settings of one training run, read from a TOML file; unknown keys are errors."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contract.bundle import CalibrationMethod
from contract.features import FeatureSpec
from training.data.log import FEATURE_NAME
from training.data.negatives import NegativeSampling
from training.data.splits import SplitName
from training.errors import ConfigError
from training.ranking import Protocol

Positive = Annotated[int, Field(ge=1)]
Units = Annotated[tuple[Positive, ...], Field(max_length=8)]
FeatureName = Annotated[str, Field(pattern=FEATURE_NAME)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _AttentionSettings(_Settings):
    embedding_dim: int
    heads: int

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.embedding_dim % self.heads:
            raise ValueError(
                f"heads: {self.heads} of them do not divide embedding_dim = {self.embedding_dim}"
            )
        return self


class _ClickSettings(_Settings):
    """`item_features`: of the log, such as ["category", "brand"], whose embeddings are added to the
    item's.
    """

    item_features: tuple[FeatureName, ...] = ()

    @model_validator(mode="after")
    def _features_are_added_once(self) -> Self:
        if len(set(self.item_features)) < len(self.item_features):
            raise ValueError(f"item_features: {list(self.item_features)} names one of them twice")
        return self


class ImnConfig(_ClickSettings):
    """IMN-kP: `iterations` is k; `enhancement_steps` above 0 makes it IMN-kP+.

    The paper's ablations, see `training.models.imn`. `attention`: what makes the weights; "none"
    reads the mean. `weights`: normalised over the behaviors or each by itself. `distance`: whether
    the attention sees differences. `walk`: whether it sees the memory of the pass before, or the
    target always. `cross`: whether the target takes part in the walk, or meets the user vector in
    the head. `segment`: behaviors of a segment of the hierarchical form; 0 is the whole history.
    """

    name: Literal["imn"]
    embedding_dim: Positive = 32
    iterations: Positive = 3
    enhancement_steps: Annotated[int, Field(ge=0)] = 0
    attention_units: Positive = 8
    head_units: Units = (128, 64)
    attention: Literal["multiway", "dot", "none"] = "multiway"
    weights: Literal["sigmoid", "softmax"] = "sigmoid"
    distance: bool = True
    walk: Literal["iterative", "target"] = "iterative"
    cross: Literal["early", "delayed"] = "early"
    segment: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _ablations_make_sense(self) -> Self:
        if self.attention != "multiway" and not self.distance:
            raise ValueError(f"distance: attention = {self.attention!r} sees no differences anyway")
        if self.attention == "none" and self.weights == "softmax":
            raise ValueError("weights: attention = 'none' makes none that could be normalised")
        if self.attention == "none" and self.walk == "target":
            raise ValueError("walk: attention = 'none' sees neither memory nor target")
        if self.cross == "delayed" and self.walk == "target":
            raise ValueError("walk: cross = 'delayed' keeps the target out of it")
        if self.cross == "delayed" and self.enhancement_steps:
            raise ValueError(
                "enhancement_steps: each of them meets the target, which cross = 'delayed' keeps "
                "for the head"
            )
        return self


class YouTubeDnnConfig(_ClickSettings):
    """YouTube DNN as a click model."""

    name: Literal["youtube_dnn"]
    embedding_dim: Positive = 32
    head_units: Units = (128, 64)


class DinConfig(_ClickSettings):
    """DIN. `normalise`: attention weights by a softmax, or, as the paper has it, as they come."""

    name: Literal["din"]
    embedding_dim: Positive = 32
    attention_units: Annotated[Units, Field(min_length=1)] = (80, 40)
    normalise: bool = True
    activation: Literal["relu", "prelu", "dice"] = "relu"
    head_units: Units = (128, 64)


class DienConfig(_ClickSettings):
    """DIEN. `hidden_units`: of both recurrences, 0 as wide as an embedding. `augru`: whether the
    update gate is the paper's, or that of the authors' code. `auxiliary_weight`: of the loss of the
    next behavior; 0 leaves it out.
    """

    name: Literal["dien"]
    embedding_dim: Positive = 32
    hidden_units: Annotated[int, Field(ge=0)] = 0
    attention_units: Annotated[Units, Field(min_length=1)] = (80, 40)
    augru: Literal["paper", "code"] = "paper"
    auxiliary_weight: Weight = 1.0
    activation: Literal["relu", "prelu", "dice"] = "relu"
    head_units: Units = (128, 64)


class MimnConfig(_ClickSettings):
    """MIMN. `utilisation_weight`: of the loss of slots that are used unevenly; 0 leaves it out.
    `induction`: whether slots have channels of their own.
    """

    name: Literal["mimn"]
    embedding_dim: Positive = 32
    slots: Positive = 4
    utilisation_weight: Weight = 0.0
    induction: bool = False
    head_units: Units = (128, 64)


class Ubr4CtrConfig(_ClickSettings):
    """UBR4CTR, with the selection by self-attention that logs without side information need."""

    name: Literal["ubr4ctr"]
    embedding_dim: Positive = 32
    selection_heads: Positive = 2
    selection_units: Positive = 20
    head_units: Units = (128, 64)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.embedding_dim % self.selection_heads:
            raise ValueError(
                f"selection_heads: {self.selection_heads} of them do not divide "
                f"embedding_dim = {self.embedding_dim}"
            )
        return self


class SasRecClickConfig(_ClickSettings, _AttentionSettings):
    """SASRec as a click model. `ffn_units`: 0 as wide as an embedding."""

    name: Literal["sasrec_click"]
    embedding_dim: Positive = 32
    layers: Positive = 1
    heads: Positive = 1
    ffn_units: Annotated[int, Field(ge=0)] = 0
    dropout: Rate = 0.0
    head_units: Units = (128, 64)


class PopularityConfig(_Settings):
    """Item popularity; nothing is learned."""

    name: Literal["popularity"]


class FpmcConfig(_Settings):
    """FPMC over a next-item log: every basket is one item.

    `user_factor`: "table" learns one factor a user, as the paper does; "history" is the mean of
    factors of the user's items instead, so that users whom training has not seen are served too.
    """

    name: Literal["fpmc"]
    embedding_dim: Positive = 64
    user_factor: Literal["table", "history"] = "history"


class Gru4RecConfig(_Settings):
    """GRU4Rec."""

    name: Literal["gru4rec"]
    embedding_dim: Positive = 64
    hidden_units: Positive = 128
    layers: Positive = 1
    dropout: Rate = 0.3


class SasRecConfig(_AttentionSettings):
    """SASRec, and its revision: see `training.models.sasrec`.

    `user_embedding`: one embedding a user, added to the user vector. `codes`: break item ids into
    so many codes of `codebook_size` each, the last of which tells apart items that share all
    others; 0 keeps one embedding an item. `quantisation`: see `training.models.item_codes`.
    """

    name: Literal["sasrec"]
    embedding_dim: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    ffn_units: Positive = 256
    dropout: Rate = 0.2
    norm: Literal["pre", "post", "query"] = "pre"
    positions: Literal["row", "relative"] = "row"
    mask_padding: bool = True
    user_embedding: bool = False
    user_dropout: Rate = 0.5
    codes: Annotated[int, Field(ge=0, le=32)] = 0
    codebook_size: Positive = 64
    quantisation: Literal["product", "residual"] = "product"

    @model_validator(mode="after")
    def _codes_make_vectors(self) -> "SasRecConfig":
        if self.codes == 1:
            raise ValueError("codes: the last one only tells items apart, so 1 leaves none to fit")
        if self.codes and self.quantisation == "product" and self.embedding_dim % self.codes:
            raise ValueError(
                f"codes: {self.codes} of them do not divide embedding_dim = {self.embedding_dim}, "
                "as quantisation = 'product' asks for"
            )
        return self


class Bert4RecConfig(_AttentionSettings):
    """BERT4Rec. `mask_rate`: share of behaviors hidden in training."""

    name: Literal["bert4rec"]
    embedding_dim: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    ffn_units: Positive = 256
    dropout: Rate = 0.2
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.2


class LinRecConfig(_AttentionSettings):
    """LinRec. `causal`: each position sees what came before it only; the published form sees all,
    and is trained on the last position alone.
    """

    name: Literal["linrec"]
    embedding_dim: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    ffn_units: Positive = 256
    dropout: Rate = 0.2
    causal: bool = False


class HstuConfig(_AttentionSettings):
    """HSTU. `time_bias`, `position_bias`: which parts the relative attention bias has."""

    name: Literal["hstu"]
    embedding_dim: Positive = 50
    layers: Positive = 2
    heads: Positive = 1
    dropout: Rate = 0.2
    temperature: Annotated[float, Field(gt=0)] = 0.05
    time_bias: bool = True
    position_bias: bool = True


class PkmActConfig(_AttentionSettings):
    """PKM-ACT, or its causal form: see `training.models.pkm_act`.

    `keys_per_side`: n, of K = n x n experts; `experts`: k, retrieved for a user in each layer.
    `stride`: positions that one step of the query network merges. `chunk`: positions of one chunk
    of the causal form. `query_network`, `product_keys`, `dispatcher`: False is the paper's
    ablation of that part.
    """

    name: Literal["pkm_act"]
    form: Literal["last", "causal"] = "last"
    embedding_dim: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    ffn_units: Positive = 256
    dropout: Rate = 0.2
    keys_per_side: Positive = 16
    experts: Positive = 8
    stride: Annotated[int, Field(ge=2)] = 4
    chunk: Positive = 16
    time_features: bool = True
    query_network: bool = True
    product_keys: bool = True
    dispatcher: bool = True

    @model_validator(mode="after")
    def _keys_hold_the_experts(self) -> Self:
        if self.product_keys and self.experts > self.keys_per_side:
            raise ValueError(
                f"experts: {self.experts} are more than keys_per_side = {self.keys_per_side}"
            )
        if self.product_keys and self.embedding_dim % 2:
            raise ValueError(
                f"embedding_dim: product keys need an even one, got {self.embedding_dim}"
            )
        return self


NextItemModelConfig = (
    FpmcConfig
    | Gru4RecConfig
    | SasRecConfig
    | Bert4RecConfig
    | LinRecConfig
    | HstuConfig
    | PkmActConfig
)
ClickModelConfig = (
    ImnConfig
    | YouTubeDnnConfig
    | DinConfig
    | DienConfig
    | MimnConfig
    | Ubr4CtrConfig
    | SasRecClickConfig
)
ModelConfig = Annotated[
    ClickModelConfig | PopularityConfig | NextItemModelConfig,
    Field(discriminator="name"),
]


class DataConfig(_Settings):
    """Which samples are made of a prepared log.

    `samples`: the log's labelled impressions, or each behavior with `n_negatives` sampled ones;
    "auto" takes impressions where the log has labels. `min_item_count`: items that were chosen and
    shown less often in the training part are unknown items. `max_candidates`: of one moment.
    `unknown_rate`: share of items shown as unknown in training. `holdout_steps`: behaviors that
    leave-one-out holds out for the test; the first is *the* test, the others are for `autoregress`.
    `click_rate`: of a click model with sampled negatives, the share of clicks in the traffic that
    its probabilities are meant for; the log does not tell. Unless said, they are meant for the
    samples: one click in `n_negatives` + 1.
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
    holdout_steps: Positive = 1
    click_rate: Annotated[float, Field(gt=0, lt=1)] | None = None


class NextItemConfig(_Settings):
    """How a next-item model is trained and ranked, on leave-one-out parts of a log.

    `loss`: "softmax" over the whole catalogue, "sampled_softmax", "bce" or "bpr" against
    negatives, drawn as `negatives` says: `n_negatives` shared by the batch for a softmax, so many
    for each position otherwise. "in-batch" takes the other targets of the batch. `logq`: correct
    logits for how often an item is drawn. `exclude_own`: a user's own items are no negatives.
    `prefixes_per_user`: of a model that is trained on last positions only, how many prefixes of a
    user an epoch holds; 0 takes all. `rows`: of a history longer than the model reads, the newest
    part, or all of it in parts. `same_length`: a batch holds rows of one length only, without
    padding. `protocols`: rankings reported on the test part; the first is also the one that
    validation watches. `n_ranked`: negatives of a sampled protocol. `dual_weight`: of the loss of
    the next user of an item, learned beside the next item of a user; `consistency_weight`: of 1 -
    cosine between an item's vector and what its users make of it; `consistency_stop`: which of the
    two does not follow the other (see `training.models.dual`; SASRec only; 0 leaves a loss out).
    """

    loss: Literal["softmax", "sampled_softmax", "bce", "bpr"] = "softmax"
    negatives: Literal["uniform", "popularity", "in-batch"] = "uniform"
    n_negatives: Positive = 256
    logq: bool = False
    exclude_own: bool = True
    prefixes_per_user: Annotated[int, Field(ge=0)] = 1
    rows: Literal["newest", "all"] = "newest"
    same_length: bool = False
    protocols: Annotated[tuple[Protocol, ...], Field(min_length=1)] = (
        "full",
        "pop100",
        "pop100_history_excluded",
    )
    n_ranked: Positive = 100
    dual_weight: Weight = 0.0
    consistency_weight: Weight = 0.0
    consistency_stop: Literal["none", "own", "rebuilt"] = "none"

    @model_validator(mode="after")
    def _samples_are_of_a_softmax(self) -> Self:
        if self.loss != "sampled_softmax":
            if self.logq:
                raise ValueError(f"logq corrects a sampled_softmax only, not {self.loss}")
            if self.negatives == "in-batch":
                raise ValueError(
                    f"negatives: in-batch goes with a sampled_softmax only, not {self.loss}"
                )
        return self

    @property
    def watched_metric(self) -> str:
        """The name of what validation watches."""
        return f"{self.protocols[0]}_ndcg10"


class TrainConfig(_Settings):
    """How a model is trained: Adam, early stopping on what validation measures (click models:
    AUC with BCE as loss, next-item models: see NextItemConfig).

    `batch_size`: moments, or rows, in a step, over all processes. `patience`: validations without
    a better one before training stops. `validate_every`: epochs from one validation to the next.
    `max_train_s`: seconds of training, measured on this machine, after which the running epoch is
    the last; 0 sets no limit. `precision`: of matrix products in training. `checkpoint_every_s`:
    seconds between checkpoints. `calibration`: of a click model's probabilities, fitted on the
    validation part after the best epoch: see `training.calibration`.
    """

    seed: Annotated[int, Field(ge=0)] = 1
    batch_size: Positive = 512
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_epochs: Positive = 10
    patience: Positive = 2
    validate_every: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    max_train_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    checkpoint_every_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 60.0
    calibration: CalibrationMethod = "none"


class RunConfig(_Settings):
    """One named run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._+-]*$")]
    features: FeatureSpec = FeatureSpec()
    data: DataConfig = DataConfig()
    next_item: NextItemConfig = NextItemConfig()
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
        return RunConfig.model_validate_json(json.dumps(_without_use_category(raw, where)))
    except TypeError as error:  # dates and times, which JSON has not
        raise ConfigError(f"{where}: {error}") from error
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'run'}: {e['msg']}" for e in error.errors()
        )
        raise ConfigError(f"{where}: {reasons}") from error


def _without_use_category(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the settings as they are now said of a model that was saved before `item_features`."""
    model = raw.get("model")
    if not isinstance(model, dict) or "use_category" not in model:
        return raw
    if model["use_category"] is not False:
        raise ConfigError(
            f"{where}: model.use_category: has become model.item_features = ['category']"
        )
    return {**raw, "model": {key: model[key] for key in model if key != "use_category"}}


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
