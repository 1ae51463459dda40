"""Every model, from its settings to scores by HTTP: exported, proven, served, equal."""

from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.service.live_service import LiveService, live_service
from training.calibration import Calibration, unchanged
from training.checkpoint import TrainedModel, save_model
from training.config import parse_config
from training.models.build import build_model

SMALL = {"embedding_dim": 8}
# One layer: that two are exported as they are is in the tests of each model.
ATTENTIVE = {**SMALL, "layers": 1, "heads": 2, "ffn_units": 16}
PKM_ACT = {"name": "pkm_act", **ATTENTIVE, "keys_per_side": 4, "experts": 2}
NEXT_ITEM_MODELS: dict[str, dict[str, Any]] = {
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
    "hstu": {"name": "hstu", **SMALL, "layers": 1, "heads": 2},
    "pkm_act": {**PKM_ACT, "form": "last"},
    "pkm_act, causal": {**PKM_ACT, "form": "causal", "chunk": 4},
}
CLICK_MODELS: dict[str, dict[str, Any]] = {
    "imn": {"name": "imn", **SMALL, "iterations": 2, "enhancement_steps": 1},
    "imn, in segments": {"name": "imn", **SMALL, "iterations": 2, "segment": 8},
    "youtube_dnn": {"name": "youtube_dnn", **SMALL},
    "din": {"name": "din", **SMALL, "activation": "dice"},
    "dien": {"name": "dien", **SMALL},
    "mimn": {"name": "mimn", **SMALL},
    "ubr4ctr": {"name": "ubr4ctr", **SMALL},
    "sasrec_click": {"name": "sasrec_click", **SMALL},
}
# Of the others probabilities are left as they are.
CALIBRATIONS = {
    "imn": Calibration("platt", slope=0.5, knots=[0.0], values=[-1.0]),
    "din": Calibration("isotonic", slope=0.5, knots=[-0.5, 0.5], values=[-2.0, 1.0]),
    "dien": unchanged().shifted(-1.5),
}
CALIBRATED_METRICS = {
    "auc": 0.7,
    "log_loss": 0.3,
    "expected_calibration_error": 0.004,
    "expected_calibration_error_uncalibrated": 0.031,
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


def checkpoint(
    folder: Path, settings: dict[str, Any], split: str, calibration: Calibration | None
) -> Path:
    config = parse_config(
        {
            "name": "tiny",
            "features": {"history_length": HISTORY_LENGTH, "granularities": GRANULARITIES},
            "data": {"split": split},
            "model": settings,
        },
        "test",
    )
    counts = torch.arange(N_ITEMS + 2)
    model = build_model(
        config.model,
        config.features,
        item_counts=counts,
        features_of_row=None,
        n_users=5,
        seed=1,
    )
    trained = TrainedModel(
        config=config,
        model=model,
        catalogue=Catalogue(np.arange(1, N_ITEMS + 1) * 1000),
        metrics={"some_metric": 0.1} if calibration is None else CALIBRATED_METRICS,
        data_fingerprint="f",
        calibration=calibration,
    )
    save_model(folder / "model.pt", trained, item_counts=counts, features_of_row=None, n_users=5)
    return folder / "model.pt"


def exported(
    folder: Path, settings: dict[str, Any], split: str, calibration: Calibration | None = None
) -> GoldenRows:
    """Write the bundle of an untrained model, proven, and return its golden rows."""
    table: list[ParityRow] = []
    path = checkpoint(folder, settings, split, calibration)
    export(path, folder / "bundle", report=table.extend)
    assert max(row.max_difference for row in table) <= VALUE_TOLERANCE
    return GoldenRows.load(folder / "bundle" / GOLDEN)


@contextmanager
def served(bundle: Path, redis_url: str, golden: GoldenRows) -> Iterator[LiveService]:
    """Serve a bundle; users "0", "1", .. have the golden histories."""
    settings = Settings(
        bundle=bundle,
        redis_url=redis_url,
        redis_timeout_s=5.0,
        deadline_s=30.0,
        recommend_deadline_s=30.0,
    )
    model = OnnxModel(bundle, threads=1)
    with (
        Redis.from_url(redis_url) as redis,
        live_service(create_app(settings, lambda _: model), model) as service,
    ):
        for row, history in enumerate(golden.histories):
            redis.set(history_key(settings.key_prefix, str(row)), history)
        yield service


def assert_golden(service: LiveService, golden: GoldenRows) -> None:
    for row, candidates in enumerate(golden.candidates):
        time = int(golden.ranking_times[row])
        scores = service.scores(str(row), candidates.tolist(), ranking_time=time)
        np.testing.assert_allclose(scores, golden.scores[row], rtol=1e-4, atol=1e-5)


def assert_explained(service: LiveService, golden: GoldenRows) -> None:
    """Every golden history, the empty one too: the golden scores, and weights of each behavior."""
    for row, candidates in enumerate(golden.candidates):
        body = {
            "user_id": str(row),
            "candidates": candidates.tolist(),
            "ranking_time": int(golden.ranking_times[row]),
        }
        answer = service.client.post("/explain", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        scores = [one["score"] for one in found["candidates"]]
        np.testing.assert_allclose(scores, golden.scores[row], rtol=1e-4, atol=1e-5)
        n_behaviors = min(HISTORY_LENGTH, len(golden.histories[row]) // 12)
        assert len(found["behaviors"]) == found["history_length"] == n_behaviors
        for one in found["candidates"]:
            weights_PL = np.array(one["weights"])
            assert weights_PL.shape == (found["iterations"], n_behaviors)
            assert ((weights_PL > 0) & (weights_PL < 1)).all()


@pytest.mark.parametrize("name", NEXT_ITEM_MODELS)
def test_a_next_item_bundle_gives_its_golden_scores_and_the_best_item(name, tmp_path, redis_url):
    golden = exported(tmp_path, NEXT_ITEM_MODELS[name], "leave-one-out")
    assert read_manifest(tmp_path / "bundle").score_kind == "affinity"
    with served(tmp_path / "bundle", redis_url, golden) as service:
        assert_golden(service, golden)
        (best,) = service.recommended("0", k=1)
        everything = service.scores("0", (np.arange(1, N_ITEMS + 1) * 1000).tolist())
        assert best == 1000 * (1 + int(np.argmax(everything)))


@pytest.mark.parametrize("name", CLICK_MODELS)
def test_a_click_bundle_gives_its_golden_probabilities_and_tells_how(name, tmp_path, redis_url):
    calibration = CALIBRATIONS.get(name)
    golden = exported(tmp_path, CLICK_MODELS[name], "time", calibration)
    assert read_manifest(tmp_path / "bundle").score_kind == "probability"
    with served(tmp_path / "bundle", redis_url, golden) as service:
        assert_golden(service, golden)
        (shown,) = service.client.get("/models").json()["models"]
        if shown["explains"]:
            assert_explained(service, golden)
    assert shown["explains"] == (name == "imn")
    if calibration is None:
        assert shown["calibration"] == "none"
    else:
        assert shown["calibration"] == calibration.method
        assert shown["metrics"] == CALIBRATED_METRICS
