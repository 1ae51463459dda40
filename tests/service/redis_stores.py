"""Stores on real Redis servers of the tests' own, and what is expected of them in trouble."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from service.errors import HistoryUnavailableError
from service.history import Appended, HistoryStore
from service.metrics import Metrics
from service.redis_nodes import connect
from tests.service.histories import NOW, records

KEEP = 100
_PATIENCE_S = 30.0


class Store(HistoryStore):
    """A store that says what its nodes have counted."""

    metrics: Metrics

    def counted(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def open_store(url: str, *, timeout_s: float = 5.0, **options: Any) -> AsyncIterator[Store]:
    metrics = Metrics()
    nodes = connect(url, timeout_s=timeout_s, metrics=metrics, **options)
    store = Store(nodes, prefix="history", keep=KEEP)
    store.metrics = metrics
    try:
        yield store
    finally:
        await store.close()


def some_histories(n: int) -> dict[str, bytes]:
    """Return histories of users, each of them unlike all others."""
    return {f"user {u}": records((u + 1, NOW), (u + 1001, NOW + 1)) for u in range(n)}


async def fill(store: HistoryStore, histories: Mapping[str, bytes]) -> None:
    outcome = await store.append(histories)
    assert outcome == {user: Appended(count=len(raw) // 12) for user, raw in histories.items()}, (
        outcome
    )


async def until_it_answers(
    store: HistoryStore, histories: Mapping[str, bytes], *, timeout_s: float = math.inf
) -> None:
    """Return when all histories are read again; whatever is read before must be right, too."""
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            found = await store.fetch(list(histories), KEEP, timeout_s=timeout_s)
            if found == list(histories.values()):
                return
            for one, expected in zip(found, histories.values(), strict=True):
                assert isinstance(one, HistoryUnavailableError) or one == expected
            await asyncio.sleep(0.02)
