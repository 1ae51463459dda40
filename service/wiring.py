"""The composition root: what the application is made of, built in one place."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.batcher import Batcher
from service.cost import BatchCost
from service.history import HistoryStore, connect
from service.metrics import Metrics
from service.model import Model
from service.recommender import Recommender
from service.scorer import BatchScorer, Prepared, Scored, ScoreRequest
from service.settings import Settings

# The rest of a deadline goes to sockets, before the request is seen and after it is answered.
USABLE_SHARE = 0.85

_COLLECTION_THRESHOLDS = (50_000, 20, 50)
# A batch is short when it takes no more of the usual deadline than this.
_SHORT_SHARE = 0.1
# So much of it is kept free at most, because predictions err.
_MARGIN_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Services:
    """The collaborators that the routes use."""

    settings: Settings
    model: Model
    history: HistoryStore
    batcher: Batcher[ScoreRequest, Prepared, Scored]
    recommender: Recommender
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
    cost = BatchCost()
    cost.learn_from_warm_up(await scorer.warm_up(settings.max_batch_work))
    batcher = Batcher[ScoreRequest, Prepared, Scored](
        prepare=scorer.prepare,
        run=scorer.run,
        size=scorer.size,
        prepared_size=scorer.prepared_size,
        shapes=model.shapes,
        cost=cost,
        short_s=_SHORT_SHARE * settings.deadline_s,
        margin_s=_MARGIN_SHARE * settings.deadline_s,
        max_batch_work=settings.max_batch_work,
        max_queue_work=settings.max_queue_work,
        metrics=metrics,
    )
    recommender = Recommender(
        scorer, lend=batcher.lend, block_items=settings.recommend_block_items, metrics=metrics
    )
    await recommender.warm_up()
    # What is there by now stays: no collection need look at it again. Requests leave no cycles
    # behind, so that looking for some can wait.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTION_THRESHOLDS)
    batcher.start()
    try:
        yield Services(
            settings=settings,
            model=model,
            history=store,
            batcher=batcher,
            recommender=recommender,
            metrics=metrics,
        )
    finally:
        await batcher.stop()
        scorer.close()
        await store.close()
