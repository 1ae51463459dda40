"""The composition root: what the application is made of, built in one place."""

import gc
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from service.arms import Arms
from service.experiment import Experiment
from service.history import HistoryStore, connect
from service.metrics import Metrics
from service.model import Model
from service.settings import Settings
from service.supervised import Supervised

# The rest of a deadline goes to sockets, before the request is seen and after it is answered.
USABLE_SHARE = 0.85
# Where a route leaves, in the ASGI scope, the arm that it chose.
ARM = "mneme.arm"
# The same: the body of the request, its seconds by stage, and its `Scored`.
ASKED = "mneme.asked"
STAGES = "mneme.stages"
SCORED = "mneme.scored"

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
    store = history or HistoryStore(
        connect(settings.redis_url, timeout_s=settings.redis_timeout_s),
        prefix=settings.key_prefix,
        keep=1,  # the arms say how many
    )
    arms = Arms(settings, experiment, open_model, store, metrics)
    try:
        await arms.start()
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
        )
    finally:
        await arms.close()
        await store.close()
