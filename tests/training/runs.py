"""Short runs for tests."""

from training.config import RunConfig, parse_config

_TRAIN = {"batch_size": 16, "learning_rate": 0.01, "max_epochs": 3, "patience": 3, "seed": 5}


def run_config(*, model: dict[str, object] | None = None, **train: object) -> RunConfig:
    """Return a run of seconds; `train` replaces settings such as max_epochs=1."""
    imn = {"name": "imn", "embedding_dim": 4, "iterations": 2, "head_units": [8]}
    return parse_config(
        {
            "name": "test-run",
            "features": {"history_length": 16},
            "model": model or imn,
            "train": {**_TRAIN, "checkpoint_every_s": 0.0, **train},
        },
        "test",
    )
