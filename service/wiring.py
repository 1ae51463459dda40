"""The composition root: what the application is made of, built in one place."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from service.access import Access
from service.api_keys import read_keys
from service.arms import Arms
from service.experiment import Experiment
from service.history import HistoryStore
from service.key_watch import KeyWatch
from service.metrics import Metrics
from service.model import Model
from service.redis_nodes import connect
from service.settings import Settings
from service.supervised import Supervised
from service.watchdog import Watchdog

# The rest of a deadline goes to sockets, before the request is seen and after it is answered.
USABLE_SHARE = 0.85
# Where a route leaves, in the ASGI scope, the arm that it chose.
ARM = "mneme.arm"
# The same: the body of the request, its seconds by stage, and its `Scored`.
ASKED = "mneme.asked"
STAGES = "mneme.stages"
SCORED = "mneme.scored"

# So old is, at most, what one worker tells of another.
_METRICS_S = 0.5
_COLLECTION_THRESHOLDS = (50_000, 20, 50)


@dataclass(frozen=True, kw_only=True)
class Services:
    """The collaborators that the routes use. `titles`: of items, for people."""

    settings: Settings
    history: HistoryStore
    arms: Arms
    supervised: Supervised
    metrics: Metrics
    titles: Mapping[int, str]
    watchdog: Watchdog
    access: Access


@asynccontextmanager
async def running(
    settings: Settings,
    experiment: Experiment,
    open_model: Callable[[Path], Model],
    *,
    supervised: Supervised,
    titles: Mapping[int, str],
    history: HistoryStore | None = None,
) -> AsyncIterator[Services]:
    """Yield everything wired and started; stop and close it afterwards."""
    metrics = Metrics()
    if settings.provider == "cuda":
        metrics.before_scrape(_gpu_memory(metrics))
    keys = None if settings.api_keys is None else read_keys(settings.api_keys)
    access = Access(settings, metrics, keys)
    store = history or HistoryStore(
        connect(
            settings.redis_url,
            timeout_s=settings.redis_timeout_s,
            password_file=settings.redis_password_file,
            metrics=metrics,
        ),
        prefix=settings.key_prefix,
        keep=1,  # the arms say how many
        idempotency_life_s=settings.idempotency_life_s,
    )
    arms = Arms(settings, experiment, open_model, store, metrics)
    watchdog = Watchdog(arms.thread, wedged_s=settings.wedged_s)
    watchdog.start()
    writing = asyncio.create_task(_write_now_and_then(metrics))
    following = None
    if settings.api_keys is not None:
        key_watch = KeyWatch(settings.api_keys, apply=access.apply, metrics=metrics)
        following = asyncio.create_task(key_watch.run())
    try:
        await arms.start()
        # The first request finds a connection, and need not wait for one to be made.
        await store.is_ready()
        # What is there by now stays: no collection need look at it again. Requests leave no cycles
        # behind, so that looking for some can wait.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECTION_THRESHOLDS)
        yield Services(
            settings=settings,
            history=store,
            arms=arms,
            supervised=supervised,
            metrics=metrics,
            titles=titles,
            watchdog=watchdog,
            access=access,
        )
    finally:
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
        await arms.close()
        await store.close()
        watchdog.stop()
        writing.cancel()
        metrics.flush()


def _gpu_memory(metrics: Metrics) -> Callable[[], None]:
    # Only here: the library comes with the extra `gpu`.
    from service.gpu_memory import GpuMemoryReader

    reader = GpuMemoryReader()

    def refresh() -> None:
        if found := reader.read():
            metrics.gpu_memory.labels("used").set(found.used)
            metrics.gpu_memory.labels("total").set(found.total)

    return refresh


async def _write_now_and_then(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(_METRICS_S)
        metrics.flush()
