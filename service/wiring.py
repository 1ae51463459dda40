"""The composition root: what the application is made of, built in one place."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.batcher import Batcher
from service.history import HistoryStore, connect
from service.metrics import Metrics
from service.model import Model
from service.scorer import BatchScorer, Scored, ScoreRequest
from service.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Services:
    """The collaborators that the routes use."""

    settings: Settings
    model: Model
    history: HistoryStore
    batcher: Batcher[ScoreRequest, Scored]
    metrics: Metrics


@asynccontextmanager
async def running(
    settings: Settings, model: Model, *, history: HistoryStore | None = None
) -> AsyncIterator[Services]:
    """Yield everything wired and started; stop and close it afterwards."""
    metrics = Metrics()
    manifest = model.manifest
    metrics.model_info.labels(manifest.model_name, manifest.model_version).set(1)
    length = manifest.features.history_length
    store = history or HistoryStore(
        connect(settings.redis_url, timeout_s=settings.redis_timeout_s),
        prefix=settings.key_prefix,
        keep=length,
    )
    scorer = BatchScorer(model, store, metrics, on_redis_failure=settings.on_redis_failure)
    batcher = Batcher[ScoreRequest, Scored](
        scorer.score,
        width=_n_candidates,
        unit_work=length,
        max_batch_work=settings.max_batch_work,
        max_queue_work=settings.max_queue_work,
        metrics=metrics,
    )
    batcher.start()
    try:
        yield Services(
            settings=settings, model=model, history=store, batcher=batcher, metrics=metrics
        )
    finally:
        await batcher.stop()
        scorer.close()
        await store.close()


def _n_candidates(request: ScoreRequest) -> int:
    return len(request.candidates)
