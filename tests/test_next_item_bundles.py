"""Every next-item model, from its settings to scores by HTTP: exported, proven, served, equal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from redis import Redis

from contract.bundle import GOLDEN, read_manifest
from contract.catalogue import Catalogue
from contract.golden import GoldenRows
from exporter.bundles import export
from exporter.parity import VALUE_TOLERANCE, ParityRow
from loadtest.redis_server import redis_server
from service.app import create_app
from service.history import history_key
from service.model import OnnxModel
from service.settings import Settings
from tests.service.live_service import live_service
from training.checkpoint import TrainedModel, save_model
from training.config import parse_config
from training.models.build import build_model

SMALL = {"embedding_dim": 8}
ATTENTIVE = {**SMALL, "layers": 2, "heads": 2, "ffn_units": 16}
PKM_ACT = {"name": "pkm_act", **ATTENTIVE, "keys_per_side": 4, "experts": 2}
MODELS: dict[str, dict[str, Any]] = {
    "fpmc": {"name": "fpmc", **SMALL},
    "fpmc with user factors": {"name": "fpmc", **SMALL, "user_factor": "table"},
    "gru4rec": {"name": "gru4rec", **SMALL, "hidden_units": 12},
    "sasrec": {"name": "sasrec", **ATTENTIVE},
    "sasrec, relative": {
        "name": "sasrec",
        **ATTENTIVE,
        "positions": "relative",
        "user_embedding": True,
    },
    "bert4rec": {"name": "bert4rec", **ATTENTIVE},
    "linrec": {"name": "linrec", **ATTENTIVE},
    "linrec, causal": {"name": "linrec", **ATTENTIVE, "causal": True},
    "hstu": {"name": "hstu", **SMALL, "heads": 2},
    "pkm_act": {**PKM_ACT, "form": "last"},
    "pkm_act, causal": {**PKM_ACT, "form": "causal", "chunk": 4},
}
GRANULARITIES = [
    {"name": "hours", "unit_s": 3600, "n_buckets": 22},
    {"name": "age_seconds", "unit_s": 1, "n_buckets": 1 << 32, "scale": "linear"},
]
HISTORY_LENGTH = 20
N_ITEMS = 40


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


def checkpoint(folder: Path, settings: dict[str, Any]) -> Path:
    config = parse_config(
        {
            "name": "tiny",
            "features": {"history_length": HISTORY_LENGTH, "granularities": GRANULARITIES},
            "data": {"split": "leave-one-out"},
            "model": settings,
        },
        "test",
    )
    counts = torch.arange(N_ITEMS + 2)
    model = build_model(
        config.model,
        config.features,
        item_counts=counts,
        category_of_row=None,
        n_users=5,
        seed=1,
    )
    trained = TrainedModel(
        config=config,
        model=model,
        catalogue=Catalogue(np.arange(1, N_ITEMS + 1) * 1000),
        metrics={"full_ndcg10": 0.1},
        data_fingerprint="f",
    )
    save_model(folder / "model.pt", trained, item_counts=counts, category_of_row=None, n_users=5)
    return folder / "model.pt"


@pytest.mark.parametrize("name", MODELS)
def test_a_bundle_is_proven_and_its_golden_rows_come_back_by_http(name, tmp_path, redis_url):
    table: list[ParityRow] = []
    export(checkpoint(tmp_path, MODELS[name]), tmp_path / "bundle", report=table.extend)
    assert max(row.max_difference for row in table) <= VALUE_TOLERANCE
    assert read_manifest(tmp_path / "bundle").score_kind == "affinity"

    golden = GoldenRows.load(tmp_path / "bundle" / GOLDEN)
    settings = Settings(
        bundle=tmp_path / "bundle",
        redis_url=redis_url,
        redis_timeout_s=5.0,
        deadline_s=30.0,
        recommend_deadline_s=30.0,
    )
    model = OnnxModel(tmp_path / "bundle", threads=1)
    with (
        Redis.from_url(redis_url) as redis,
        live_service(create_app(settings, model), model) as service,
    ):
        for row, history in enumerate(golden.histories):
            redis.set(history_key(settings.key_prefix, str(row)), history)
            candidates = golden.candidates[row].tolist()
            scores = service.scores(
                str(row), candidates, ranking_time=int(golden.ranking_times[row])
            )
            np.testing.assert_allclose(scores, golden.scores[row], rtol=1e-4, atol=1e-5)
        (best,) = service.recommended("0", k=1)
        everything = service.scores("0", (np.arange(1, N_ITEMS + 1) * 1000).tolist())
        assert best == 1000 * (1 + int(np.argmax(everything)))
