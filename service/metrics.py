"""Every metric of the service; durations are seconds."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

# Where all workers keep their metrics; prometheus-client reads this name when it is imported.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

STAGES = ("fetch", "encode", "queue", "infer", "total")

# 0.5 ms .. 1 s, with an edge at 30 ms: the share within the budget is exact.
_LATENCY_EDGES_S = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    1.0,
)
# 1 ms .. 10 s, with an edge at 200 ms: the share within the usual deadline is exact.
_RECOMMEND_EDGES_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1.0, 2.0, 5.0, 10.0),
)
# 1 .. 1,024 requests.
_BATCH_EDGES = tuple(2**k for k in range(11))
# 0 .. 1,000 behaviors.
_LENGTH_EDGES = (0, 1, 10, 30, 100, 300, 999, 1000)


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mneme_requests_total",
            "Answers by route and status.",
            ("route", "status"),
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "mneme_stage_seconds",
            "Time of a batch (fetch, encode, infer) or of a request (queue, total).",
            ("stage",),
            buckets=_LATENCY_EDGES_S,
            registry=self.registry,
        )
        self.recommend_seconds = Histogram(
            "mneme_recommend_seconds",
            "Time of a recommendation, by stage; queue and infer are sums over all its blocks.",
            ("stage",),
            buckets=_RECOMMEND_EDGES_S,
            registry=self.registry,
        )
        self.batch_requests = Histogram(
            "mneme_batch_requests",
            "Requests scored in one batch.",
            buckets=_BATCH_EDGES,
            registry=self.registry,
        )
        self.history_behaviors = Histogram(
            "mneme_history_behaviors",
            "Behaviors that a request was scored with.",
            buckets=_LENGTH_EDGES,
            registry=self.registry,
        )
        self.queued_work = Gauge(
            "mneme_queued_work",
            "Waiting work: candidates x history length.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.queued_requests = Gauge(
            "mneme_queued_requests",
            "Waiting requests.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.dropped = Counter(
            "mneme_dropped_total",
            "Requests that were not scored, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.unknown_candidates = Counter(
            "mneme_unknown_candidates_total",
            "Candidates outside of the catalogue.",
            registry=self.registry,
        )
        self.corrupt_histories = Counter(
            "mneme_corrupt_histories_total",
            "Stored values that are no history.",
            registry=self.registry,
        )
        self.degraded = Counter(
            "mneme_degraded_total",
            "Requests scored without the history that Redis holds.",
            registry=self.registry,
        )
        self.events = Counter(
            "mneme_events_total",
            "Posted behaviors, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.model_info = Gauge(
            "mneme_model_info",
            "1 for the model that is served.",
            ("model", "version"),
            multiprocess_mode="livemax",
            registry=self.registry,
        )

        self._refresh: list[Callable[[], None]] = []
        self._answers: dict[tuple[str, int], Counter] = {}
        self._stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        for stage in STAGES:  # there before the first recommendation
            self.recommend_seconds.labels(stage)

    def count_answer(self, route: str, status: int) -> None:
        """Count an answer."""
        counter = self._answers.get((route, status))
        if counter is None:  # looking up labels costs more than counting
            counter = self._answers[route, status] = self.requests.labels(route, status)
        counter.inc()

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Record what one batch (fetch, encode, infer) or one request (queue, total) took."""
        self._stages[stage].observe(seconds)

    def before_scrape(self, refresh: Callable[[], None]) -> None:
        """Let `refresh` bring gauges up to date whenever metrics are asked for."""
        self._refresh.append(refresh)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format: of all workers, where there are several."""
        for refresh in self._refresh:
            refresh()
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is None:
            return generate_latest(self.registry)
        _forget_ended_workers(Path(folder))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _forget_ended_workers(folder: Path) -> None:
    """Drop the gauges of workers that are gone; what they counted stays."""
    for path in folder.glob("gauge_live*.db"):
        found = re.search(r"_(\d+)\.db$", path.name)
        if found and not Path("/proc", found[1]).exists():
            mark_process_dead(int(found[1]), folder)  # type: ignore[no-untyped-call]
