"""Training and serving make the same model inputs of the same rows: tests/golden binds them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from redis import Redis

from contract.bundle import REQUIRED_FILES, FileEntry, Manifest
from contract.catalogue import Catalogue
from contract.encoding import ModelInputs
from contract.records import decode_records
from loadtest.redis_server import redis_server
from service.history import HistoryStore, history_key
from service.metrics import Metrics
from service.model import Explain
from service.redis_nodes import connect
from service.scorer import BatchScorer, DeviceThread, Prepared, Scored, ScoreRequest
from service.shapes import Shape, ShapeGrid
from tests.golden_rows import CATALOGUE, RANKING_TIME, ROWS, SPEC, GoldenRow
from training.data.loader import ClickBatch, ClickLoader
from training.data.log import PreparedLog
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource
from training.data.samples import impression_moments
from training.data.splits import Part, Split


class RecordingModel:
    """Keeps the inputs that the service feeds to it."""

    def __init__(self) -> None:
        self.catalogue: Catalogue = CATALOGUE
        self.shapes = ShapeGrid(batches=(), candidates=(), lengths=())
        self.runs: list[ModelInputs] = []
        self.manifest = Manifest(
            format_version=1,
            model_name="recording",
            model_version="1",
            score_kind="affinity",
            features=SPEC,
            n_items=len(CATALOGUE),
            golden_tolerance=1e-3,
            metrics={},
            training_config={},
            data_fingerprint="",
            produced_with={},
            files={name: FileEntry(sha256="0" * 64, size_bytes=0) for name in REQUIRED_FILES},
        )
        self.explain: Explain | None = None

    def inputs(self, shape: Shape) -> ModelInputs:
        batch, candidates, length = shape
        return ModelInputs(
            history_items=np.zeros((batch, length), dtype=np.int64),
            history_buckets=np.zeros((batch, length, len(SPEC.granularities)), dtype=np.int64),
            candidate_items=np.zeros((batch, candidates), dtype=np.int64),
        )

    def warm_up(self, max_work: int) -> list[tuple[int, float]]:
        del max_work
        return []

    def run(self, inputs: ModelInputs) -> np.ndarray:
        self.runs.append(inputs)
        return np.zeros(inputs.candidate_items.shape, dtype=np.float32)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as url:
        yield url


def training_batch(row: GoldenRow, folder: Path) -> ClickBatch:
    """Prepare a log of the row's behaviors with its candidates as impressions, and load it."""
    behaviors = decode_records(row.history)
    n_behaviors, n_candidates = len(behaviors), len(row.candidates)
    pl.DataFrame(
        {
            "user_id": ["u"] * (n_behaviors + n_candidates),
            "item_id": [*behaviors["item"].tolist(), *row.candidates.tolist()],
            "timestamp": [*behaviors["time"].tolist(), *[RANKING_TIME] * n_candidates],
            "label": pl.Series([None] * n_behaviors + [0] * n_candidates, dtype=pl.Int8),
        }
    ).write_parquet(folder / "log.parquet")
    prepare(LogSource(path=folder / "log.parquet"), folder / "log", PrepareOptions())
    log = PreparedLog(folder / "log")
    everything = Split(
        behaviors=np.zeros(n_behaviors, np.int8), impressions=np.zeros(n_candidates, np.int8)
    )
    moments = impression_moments(log, everything, Part.TRAIN, max_candidates=8)
    loader = ClickLoader(log, moments, CATALOGUE, SPEC, batch_size=1, seed=0)
    (batch,) = loader.epoch(0, shuffle=False)
    return batch


def assert_inputs(inputs: ModelInputs, row: GoldenRow) -> None:
    """Expect the row's inputs; a history may be as short as it is, with less padding."""
    length = inputs.history_items.shape[1]
    assert inputs.history_items.tolist() == [row.history_items[-length:]]
    assert inputs.history_buckets.tolist() == [row.history_buckets[-length:]]
    assert not any(row.history_items[:-length])
    assert inputs.candidate_items.tolist() == [row.candidate_items]


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.serving_only], ids=lambda row: row.name
)
def test_training_gathers_golden_rows(row, tmp_path):
    assert_inputs(training_batch(row, tmp_path).inputs, row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_the_service_encodes_golden_rows(row, redis_url):
    model = RecordingModel()
    store = HistoryStore(connect(redis_url, timeout_s=5.0), prefix="golden", keep=100)
    thread, metrics = DeviceThread(), Metrics().of_arm("main", "golden")
    scorer = BatchScorer(model, store, metrics, device=thread, on_redis_failure="refuse")
    try:
        with Redis.from_url(redis_url) as redis:
            redis.set(history_key("golden", "u"), row.history)
        (prepared,) = await scorer.prepare(
            [ScoreRequest(user_id="u", candidates=row.candidates, ranking_time=RANKING_TIME)]
        )
        assert isinstance(prepared, Prepared)
        (answer,) = await scorer.run([prepared])
    finally:
        thread.shutdown()
        await store.close()
    assert isinstance(answer, Scored)
    assert_inputs(model.runs[0], row)
