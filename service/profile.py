"""What the scorer takes without HTTP: seconds of each stage, and requests a second.

Shapes: B requests, C candidates, L history length.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

from contract.records import encode_records
from service.history import HistoryStore
from service.metrics import Metrics
from service.model import Model
from service.scorer import BatchScorer, DeviceThread, Prepared, Scored, ScoreRequest
from service.shapes import Shape

_WARM_BATCHES = 5
_CLEAR_REFS = Path("/proc/self/clear_refs")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShapeProfile:
    """Medians over batches of one shape: milliseconds of each stage of a batch, and requests/s with
    the next batch prepared while one runs. `added_peak_bytes`: by how much the shape raised the
    process' resident memory at its peak.
    """

    batch: int
    candidates: int
    length: int
    fetch_ms: float
    encode_ms: float
    infer_ms: float
    requests_per_s: float
    added_peak_bytes: int

    def as_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)


async def profile(
    model: Model,
    store: HistoryStore,
    shapes: Sequence[Shape],
    *,
    users: int,
    seconds: float,
    warm_up: bool = False,
) -> list[ShapeProfile]:
    """Measure each shape for so many seconds.

    Histories are appended to `store` for `users` users of each length, under names of their own,
    and read from there for every batch. `warm_up`: all shapes of the grid first, as a GPU needs it.
    """
    metrics = Metrics().of_arm("profile", model.manifest.model_version)
    device = DeviceThread()
    scorer = BatchScorer(model, store, metrics, device=device, on_redis_failure="refuse")
    try:
        if warm_up:
            await scorer.warm_up(max_work=max(shape.work for shape in shapes))
        for length in {shape.length for shape in shapes}:
            await _write_histories(store, model, length, users)
        return [await _profile_shape(scorer, shape, users, seconds) for shape in shapes]
    finally:
        device.shutdown()


def shapes_of(
    batches: Sequence[int], candidates: Sequence[int], lengths: Sequence[int]
) -> list[Shape]:
    """Return every combination."""
    return [Shape(*sizes) for sizes in product(batches, candidates, lengths)]


async def _profile_shape(
    scorer: BatchScorer, shape: Shape, users: int, seconds: float
) -> ShapeProfile:
    batches = _batches(scorer.model, shape, users)
    resident_bytes = _resident_bytes_from_here_on()
    for _ in range(_WARM_BATCHES):
        await _scored(scorer, await _prepared(scorer, next(batches)))
    scored: list[Scored] = []
    started = time.perf_counter()
    following = asyncio.ensure_future(_prepared(scorer, next(batches)))
    n_batches = 0
    while time.perf_counter() - started < seconds:
        ready, following = (
            await following,
            asyncio.ensure_future(_prepared(scorer, next(batches))),
        )
        scored.append((await _scored(scorer, ready))[0])
        n_batches += 1
    taken_s = time.perf_counter() - started
    await following
    return ShapeProfile(
        batch=shape.batch,
        candidates=shape.candidates,
        length=shape.length,
        fetch_ms=1000 * statistics.median(one.fetch_s for one in scored),
        encode_ms=1000 * statistics.median(one.encode_s for one in scored),
        infer_ms=1000 * statistics.median(one.infer_s for one in scored),
        requests_per_s=n_batches * shape.batch / taken_s,
        added_peak_bytes=max(0, _memory_bytes("VmHWM") - resident_bytes),
    )


async def _prepared(scorer: BatchScorer, batch: Sequence[ScoreRequest]) -> list[Prepared]:
    return [_or_raise(one) for one in await scorer.prepare(batch)]


async def _scored(scorer: BatchScorer, batch: Sequence[Prepared]) -> list[Scored]:
    return [_or_raise(one) for one in await scorer.run(batch)]


def _or_raise(outcome: T | Exception) -> T:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _batches(model: Model, shape: Shape, users: int) -> Iterator[list[ScoreRequest]]:
    rng = np.random.default_rng(0)
    known = model.catalogue.item_ids
    now = int(time.time())
    while True:
        yield [
            ScoreRequest(
                user_id=_user(shape.length, int(user)),
                candidates=rng.choice(known, shape.candidates),
                ranking_time=now,
            )
            for user in rng.integers(users, size=shape.batch)
        ]


async def _write_histories(store: HistoryStore, model: Model, length: int, users: int) -> None:
    rng = np.random.default_rng(length)
    now = int(time.time())
    for user in range(users):
        times = np.sort(now - rng.integers(0, 30_000_000, length))
        records = encode_records(rng.choice(model.catalogue.item_ids, length), times)
        await store.append({_user(length, user): records})


def _user(length: int, user: int) -> str:
    return f"profile-{length}-{user}"


def _resident_bytes_from_here_on() -> int:
    """Return the resident memory, and let its peak count anew."""
    _CLEAR_REFS.write_text("5")
    return _memory_bytes("VmRSS")


def _memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
