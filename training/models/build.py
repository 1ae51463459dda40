"""From settings to a model; what is common to all models stands here, and only here."""

from contextlib import nullcontext
from typing import assert_never

import torch
from torch import Tensor, nn

from contract.bundle import ScoreKind
from contract.features import FeatureSpec
from training.config import ImnConfig, ModelConfig, PopularityConfig, YouTubeDnnConfig
from training.errors import ConfigError
from training.models.encoder import ItemEncoder
from training.models.imn import IterativeMemoryNetwork
from training.models.popularity import Popularity
from training.models.youtube_dnn import YouTubeDNN


def build_model(
    config: ModelConfig,
    spec: FeatureSpec,
    *,
    item_counts: Tensor,
    category_of_row: Tensor | None,
    seed: int | None = None,
) -> nn.Module:
    """Return an untrained model for a catalogue of len(item_counts) rows.

    `item_counts`: int64 [rows], behaviors of each row in the training part. `category_of_row`:
    int64 [rows], or None where the log has no categories. `seed` makes the weights reproducible
    and leaves torch's generator as it was.
    """
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        match config:
            case ImnConfig():
                return IterativeMemoryNetwork(
                    _items(config, len(item_counts), category_of_row),
                    spec,
                    embedding_dim=config.embedding_dim,
                    iterations=config.iterations,
                    enhancement_steps=config.enhancement_steps,
                    attention_units=config.attention_units,
                    head_units=config.head_units,
                )
            case YouTubeDnnConfig():
                return YouTubeDNN(
                    _items(config, len(item_counts), category_of_row),
                    spec,
                    embedding_dim=config.embedding_dim,
                    head_units=config.head_units,
                )
            case PopularityConfig():
                return Popularity(item_counts)
            case _:
                assert_never(config)


def score_kind(config: ModelConfig) -> ScoreKind:
    """Return what the model's scores mean once they leave it."""
    return "affinity" if isinstance(config, PopularityConfig) else "probability"


def _items(
    config: ImnConfig | YouTubeDnnConfig, n_rows: int, category_of_row: Tensor | None
) -> ItemEncoder:
    if config.use_category and category_of_row is None:
        raise ConfigError("model.use_category: the log has no category column")
    return ItemEncoder(
        n_rows, config.embedding_dim, category_of_row if config.use_category else None
    )


class Scorer(nn.Module):
    """A model with its last step: logits become click probabilities, affinities stay."""

    def __init__(self, model: nn.Module, kind: ScoreKind) -> None:
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return scores float32 [B, C]."""
        outputs: Tensor = self.model(history_items, history_buckets, candidate_items)
        return torch.sigmoid(outputs) if self.kind == "probability" else outputs
