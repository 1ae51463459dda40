"""Every metric of the service; durations are seconds."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
            "Time of a scored request, by stage.",
            ("stage",),
            buckets=_LATENCY_EDGES_S,
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
            registry=self.registry,
        )

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Record where one request's time went."""
        for stage, duration_s in seconds.items():
            self.stage_seconds.labels(stage).observe(duration_s)
