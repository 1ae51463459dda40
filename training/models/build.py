"""From settings to a model; what is common to all models stands here, and only here."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import assert_never

import torch
from torch import Tensor, nn

from contract.bundle import ScoreKind
from contract.features import FeatureSpec
from training.config import (
    Bert4RecConfig,
    ClickModelConfig,
    DienConfig,
    DinConfig,
    FpmcConfig,
    Gru4RecConfig,
    HstuConfig,
    ImnConfig,
    LinRecConfig,
    MimnConfig,
    ModelConfig,
    NextItemModelConfig,
    PkmActConfig,
    PopularityConfig,
    SasRecClickConfig,
    SasRecConfig,
    Ubr4CtrConfig,
    YouTubeDnnConfig,
)
from training.errors import ConfigError
from training.models.bert4rec import BERT4Rec
from training.models.dien import DIEN
from training.models.din import DIN
from training.models.encoder import EMBEDDING_STD, ItemEncoder
from training.models.fpmc import FPMC
from training.models.gru4rec import GRU4Rec
from training.models.hstu import HSTU
from training.models.imn import IterativeMemoryNetwork
from training.models.item_codes import ItemCodes
from training.models.linrec import LinRec
from training.models.mimn import MIMN
from training.models.next_item import NextItemModel
from training.models.pkm_act import PkmAct
from training.models.popularity import Popularity
from training.models.sasrec import SASRec
from training.models.sasrec_click import SASRecClick
from training.models.ubr4ctr import UBR4CTR
from training.models.youtube_dnn import YouTubeDNN


def build_model(
    config: ModelConfig,
    spec: FeatureSpec,
    *,
    item_counts: Tensor,
    features_of_row: Mapping[str, Tensor] | None,
    n_users: int = 0,
    code_of_row: Tensor | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Return an untrained model for a catalogue of len(item_counts) rows.

    `item_counts`: int64 [rows], behaviors of each row in the training part. `features_of_row`: the
    features of items that the log has, category and others, by name int64 [rows], see ItemEncoder;
    None is none. `n_users`: of the log, for models with user embeddings. `code_of_row`: int64
    [rows, codes], for a model whose settings ask for codes; None leaves it to a state dict, which
    holds it. `seed` makes the weights reproducible and leaves torch's generator as it was. Raises
    ConfigError where settings do not fit the log.
    """
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        if isinstance(config, PopularityConfig):
            return Popularity(item_counts)
        if isinstance(config, NextItemModelConfig):
            next_items = _next_items(config, len(item_counts), code_of_row)
            return _build_next_item(config, spec, next_items, n_users)
        items = _items(config, len(item_counts), features_of_row or {})
        return _build_click(config, spec, items)


def _build_click(config: ClickModelConfig, spec: FeatureSpec, items: ItemEncoder) -> nn.Module:
    match config:
        case ImnConfig():
            return IterativeMemoryNetwork(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                iterations=config.iterations,
                enhancement_steps=config.enhancement_steps,
                attention_units=config.attention_units,
                head_units=config.head_units,
                attention=config.attention,
                weights=config.weights,
                distance=config.distance,
                walk=config.walk,
                cross=config.cross,
                segment=config.segment,
            )
        case YouTubeDnnConfig():
            return YouTubeDNN(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                head_units=config.head_units,
            )
        case DinConfig():
            return DIN(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                attention_units=config.attention_units,
                normalise=config.normalise,
                activation=config.activation,
                head_units=config.head_units,
            )
        case DienConfig():
            return DIEN(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                hidden_units=config.hidden_units or config.embedding_dim,
                attention_units=config.attention_units,
                augru=config.augru,
                activation=config.activation,
                auxiliary=config.auxiliary_weight > 0,
                head_units=config.head_units,
            )
        case MimnConfig():
            return MIMN(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                n_slots=config.slots,
                utilisation_weight=config.utilisation_weight,
                induction=config.induction,
                head_units=config.head_units,
            )
        case Ubr4CtrConfig():
            return UBR4CTR(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                selection_heads=config.selection_heads,
                selection_units=config.selection_units,
                head_units=config.head_units,
            )
        case SasRecClickConfig():
            return SASRecClick(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                n_layers=config.layers,
                n_heads=config.heads,
                ffn_units=config.ffn_units or config.embedding_dim,
                dropout=config.dropout,
                head_units=config.head_units,
            )
        case _:
            assert_never(config)


def _build_next_item(
    config: NextItemModelConfig, spec: FeatureSpec, items: ItemEncoder, n_users: int
) -> NextItemModel:
    match config:
        case FpmcConfig():
            return FPMC(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                user_factor=config.user_factor,
                n_users=n_users,
            )
        case Gru4RecConfig():
            return GRU4Rec(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                hidden_units=config.hidden_units,
                n_layers=config.layers,
                dropout=config.dropout,
            )
        case Bert4RecConfig():
            return BERT4Rec(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                n_layers=config.layers,
                n_heads=config.heads,
                ffn_units=config.ffn_units,
                dropout=config.dropout,
                mask_rate=config.mask_rate,
            )
        case LinRecConfig():
            return LinRec(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                n_layers=config.layers,
                n_heads=config.heads,
                ffn_units=config.ffn_units,
                dropout=config.dropout,
                causal=config.causal,
            )
        case HstuConfig():
            return HSTU(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                n_layers=config.layers,
                n_heads=config.heads,
                dropout=config.dropout,
                temperature=config.temperature,
                time_bias=config.time_bias,
                position_bias=config.position_bias,
            )
        case PkmActConfig():
            return PkmAct(
                items,
                spec,
                form=config.form,
                embedding_dim=config.embedding_dim,
                n_layers=config.layers,
                n_heads=config.heads,
                ffn_units=config.ffn_units,
                dropout=config.dropout,
                keys_per_side=config.keys_per_side,
                n_experts=config.experts,
                stride=config.stride,
                chunk=config.chunk,
                time_features=config.time_features,
                query_network=config.query_network,
                product_keys=config.product_keys,
                dispatcher=config.dispatcher,
            )
        case SasRecConfig():
            return SASRec(
                items,
                spec,
                embedding_dim=config.embedding_dim,
                n_layers=config.layers,
                n_heads=config.heads,
                ffn_units=config.ffn_units,
                dropout=config.dropout,
                norm=config.norm,
                positions=config.positions,
                mask_padding=config.mask_padding,
                n_users=n_users if config.user_embedding else 0,
                user_dropout=config.user_dropout,
            )
        case _:
            assert_never(config)


def score_kind(config: ModelConfig) -> ScoreKind:
    """Return what the model's scores mean once they leave it."""
    is_affinity = isinstance(config, PopularityConfig | NextItemModelConfig)
    return "affinity" if is_affinity else "probability"


def chosen_features(
    config: ModelConfig, features_of_row: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return those features of items that the model reads, in the order of its settings.

    Raises ConfigError when the log has not one of them.
    """
    names = config.item_features if isinstance(config, ClickModelConfig) else ()
    for name in names:
        if name not in features_of_row:
            raise ConfigError(
                f"model.item_features: the log has no {name!r}; it has "
                f"{', '.join(sorted(features_of_row)) or 'no features of items'}"
            )
    return {name: features_of_row[name] for name in names}


def _items(
    config: ClickModelConfig, n_rows: int, features_of_row: Mapping[str, Tensor]
) -> ItemEncoder:
    features = chosen_features(config, features_of_row)
    return ItemEncoder(n_rows, config.embedding_dim, list(features.values()))


def _next_items(
    config: NextItemModelConfig, n_rows: int, code_of_row: Tensor | None
) -> ItemEncoder:
    if not (isinstance(config, SasRecConfig) and config.codes):
        return ItemEncoder(n_rows, config.embedding_dim, std=EMBEDDING_STD)
    if code_of_row is None:
        code_of_row = torch.zeros(n_rows, config.codes, dtype=torch.int64)
    return ItemCodes(
        code_of_row,
        config.embedding_dim,
        codebook_size=config.codebook_size,
        quantisation=config.quantisation,
    )


class Scorer(nn.Module):
    """A model with its last step: logits become click probabilities, affinities stay.

    `calibration`: of the logits, float32 [B, C] to [B, C]; see `training.calibration`.
    """

    def __init__(
        self, model: nn.Module, kind: ScoreKind, calibration: nn.Module | None = None
    ) -> None:
        super().__init__()
        assert kind == "probability" or calibration is None
        self.model = model
        self.kind = kind
        self.calibration = calibration

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return scores float32 [B, C]."""
        return self.scores(self.model(history_items, history_buckets, candidate_items))

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the scores [B, C] of what the model gives."""
        if self.calibration is not None:
            outputs = self.calibration(outputs)
        return torch.sigmoid(outputs) if self.kind == "probability" else outputs


class Explainer(nn.Module):
    """A scorer of IMN that gives the attention beside the scores.

    Raises ConfigError for any other model, and for one in segments: see `explains`.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        if not explains(scorer.model):
            raise ConfigError(f"{type(scorer.model).__name__}: there is no attention to explain by")
        assert isinstance(scorer.model, IterativeMemoryNetwork)
        self.n_passes = len(scorer.model.attentions)
        self.scorer = scorer

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return scores float32 [B, C], and the weights [B, C, P, L] of the model's `explain`."""
        model = self.scorer.model
        assert isinstance(model, IterativeMemoryNetwork)
        logits_BC, weights_BCPL = model.explain(history_items, history_buckets, candidate_items)
        return self.scorer.scores(logits_BC), weights_BCPL


def explains(model: nn.Module) -> bool:
    """Return whether a model can tell what each behavior weighs: IMN, unless it is in segments."""
    return isinstance(model, IterativeMemoryNetwork) and not model.segment
