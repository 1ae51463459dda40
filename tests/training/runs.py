"""Short runs for tests."""

from collections.abc import Mapping

from training.config import RunConfig, parse_config

_TRAIN = {"batch_size": 16, "learning_rate": 0.01, "max_epochs": 3, "patience": 3, "seed": 5}


def run_config(
    *,
    model: dict[str, object] | None = None,
    data: Mapping[str, object] | None = None,
    **train: object,
) -> RunConfig:
    """Return a run of seconds; `train` replaces settings such as max_epochs=1."""
    imn = {"name": "imn", "embedding_dim": 4, "iterations": 2, "head_units": [8]}
    return parse_config(
        {
            "name": "test-run",
            "features": {"history_length": 16},
            "data": data or {},
            "model": model or imn,
            "train": {**_TRAIN, "checkpoint_every_s": 0.0, **train},
        },
        "test",
    )


def next_item_config(
    *,
    model: Mapping[str, object] | None = None,
    data: Mapping[str, object] | None = None,
    next_item: Mapping[str, object] | None = None,
    **train: object,
) -> RunConfig:
    """Return a run of seconds of a next-item model, a small SASRec unless said."""
    sasrec = {"name": "sasrec", "embedding_dim": 8, "layers": 1, "heads": 2, "ffn_units": 12}
    return parse_config(
        {
            "name": "test-run",
            "features": {
                "history_length": 8,
                "granularities": [
                    {"name": "days", "unit_s": 86_400, "n_buckets": 17},
                    {"name": "age", "unit_s": 1, "n_buckets": 1 << 32, "scale": "linear"},
                ],
            },
            "data": {"split": "leave-one-out", **(data or {})},
            "next_item": {"n_negatives": 8, "n_ranked": 20, **(next_item or {})},
            "model": model or sasrec,
            "train": {**_TRAIN, "checkpoint_every_s": 0.0, **train},
        },
        "test",
    )
