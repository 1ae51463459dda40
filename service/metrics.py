"""Every metric of the service; durations are seconds. docs/metrics.md says what to ask of each."""

import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from service.tallies import CounterTally, HistogramTally

# Where all workers keep their metrics; prometheus-client reads this name when it is imported.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

STAGES = ("fetch", "encode", "queue", "infer", "respond", "total")
# In place of `total`: nobody waits for a shadow, and what its arm answers is counted apart.
_SHADOW = "shadow"
DROP_REASONS = ("overloaded", "hopeless", "deadline", "client left")
_SHADOW_OUTCOMES = ("scored", "failed", "refused")
# A series that begins at more than zero hides how it came to be so from every rate.
_SCORE_STATUSES = (200, 429, 500, 503)

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
# 1 .. 100 million: requests x candidates x behaviors.
_WORK_EDGES = (1, *(n * 10**k for k in range(2, 8) for n in (1, 3)), 10**8)
# 0 .. 1,000 behaviors.
_LENGTH_EDGES = (0, 1, 10, 30, 100, 300, 999, 1000)


# Every metric of scoring says whose it is; there are no more arms than an experiment may have.
_ARM = ("arm", "version")


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        # They are as many series again, and nothing asks for them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mneme_requests_total",
            "Answers by route and status; arm and version are empty where no arm was chosen.",
            ("route", "status", *_ARM),
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "mneme_stage_seconds",
            "Time of a batch (fetch, encode, infer) or a request (queue, respond, total, shadow).",
            ("stage", *_ARM),
            buckets=_LATENCY_EDGES_S,
            registry=self.registry,
        )
        self.recommend_seconds = Histogram(
            "mneme_recommend_seconds",
            "Time of a recommendation, by stage; queue and infer are sums over all its blocks.",
            ("stage", *_ARM),
            buckets=_RECOMMEND_EDGES_S,
            registry=self.registry,
        )
        self.batch_requests = Histogram(
            "mneme_batch_requests",
            "Requests scored in one batch.",
            _ARM,
            buckets=_BATCH_EDGES,
            registry=self.registry,
        )
        self.batch_work = Histogram(
            "mneme_batch_work",
            "Cells of one batch as it was run: requests x candidates x behaviors.",
            _ARM,
            buckets=_WORK_EDGES,
            registry=self.registry,
        )
        self.padding = Counter(
            "mneme_padded_cells_total",
            "Those of the cells that were padding.",
            _ARM,
            registry=self.registry,
        )
        self.history_behaviors = Histogram(
            "mneme_history_behaviors",
            "Behaviors that a request was scored with.",
            _ARM,
            buckets=_LENGTH_EDGES,
            registry=self.registry,
        )
        self.batch_work_limit = Gauge(
            "mneme_batch_work_limit",
            "Largest batch at present: the setting, or less while the device lacks memory for it.",
            _ARM,
            multiprocess_mode="livemin",
            registry=self.registry,
        )
        self.device_memory_failures = Counter(
            "mneme_device_memory_failures_total",
            "Runs for which the device had no memory.",
            _ARM,
            registry=self.registry,
        )
        self.queued_work = Gauge(
            "mneme_queued_work",
            "Waiting work: candidates x history length.",
            _ARM,
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.queued_requests = Gauge(
            "mneme_queued_requests",
            "Waiting requests.",
            _ARM,
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.connections = Gauge(
            "mneme_connections",
            "Open connections.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.queue_work_limit = Gauge(
            "mneme_queue_work_limit",
            "Work that may wait in an arm before its requests are refused.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.dropped = Counter(
            "mneme_dropped_total",
            "Requests that were not scored, by reason.",
            ("reason", *_ARM),
            registry=self.registry,
        )
        self.candidates = Counter(
            "mneme_candidates_total",
            "Candidates that were scored.",
            _ARM,
            registry=self.registry,
        )
        self.unknown_candidates = Counter(
            "mneme_unknown_candidates_total",
            "Candidates outside of the catalogue.",
            _ARM,
            registry=self.registry,
        )
        self.corrupt_histories = Counter(
            "mneme_corrupt_histories_total",
            "Stored values that are no history, where a request met one.",
            _ARM,
            registry=self.registry,
        )
        self.degraded = Counter(
            "mneme_degraded_total",
            "Requests scored without the history that Redis holds.",
            _ARM,
            registry=self.registry,
        )
        self.model_info = Gauge(
            "mneme_model_info",
            "1 for a model that is served.",
            ("model", *_ARM),
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.arm_share = Gauge(
            "mneme_arm_share",
            "Share of the users whom an arm answers, or of a shadow's those it listens to.",
            ("arm", "shadow"),
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.shadowed = Counter(
            "mneme_shadowed_total",
            "Requests that a shadow arm scored too, or could not, by outcome.",
            ("outcome", *_ARM),
            registry=self.registry,
        )
        self.key_requests = Counter(
            "mneme_key_requests_total",
            "Requests that a key was asked for, by the key's name and outcome.",
            ("key", "outcome"),
            registry=self.registry,
        )
        self.api_key_expires = Gauge(
            "mneme_api_key_expires_seconds",
            "When a key expires, in unix seconds; 0 for one that is gone or never expires.",
            ("key",),
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.api_keys_reloads = Counter(
            "mneme_api_keys_reloads_total",
            "Changes of the file of keys, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.events = Counter(
            "mneme_events_total",
            "Posted behaviors, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.corrupt_appends = Counter(
            "mneme_corrupt_appends_total",
            "Stored values that are no history, where an event was to be appended.",
            registry=self.registry,
        )
        self.redis_failures = Counter(
            "mneme_redis_failures_total",
            "Calls that Redis did not answer or refused, by operation.",
            ("operation",),
            registry=self.registry,
        )
        self.gpu_memory = Gauge(
            "mneme_gpu_memory_bytes",
            "Memory of the GPU that serves: used (by all its processes) and total.",
            ("kind",),
            multiprocess_mode="livemostrecent",
            registry=self.registry,
        )
        self.redis_retries = Counter(
            "mneme_redis_retries_total",
            "Calls that were repeated on a lost connection, or because a slot was on the move.",
            ("operation",),
            registry=self.registry,
        )
        # The worst of all workers.
        self.redis_breaker_state = Gauge(
            "mneme_redis_breaker_state",
            "Circuit breakers of a node of Redis, the worst: 0 closed, 1 half-open, 2 open.",
            ("node", "operation"),
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        # Whoever is asked has just looked; what another worker saw earlier is no news.
        self.redis_up = Gauge(
            "mneme_redis_up",
            "1 where Redis answered when these metrics were asked for.",
            multiprocess_mode="livemostrecent",
            registry=self.registry,
        )
        self.reload_refused = Gauge(
            "mneme_reload_refused",
            "1 where the files, as they stand, are not served.",
            multiprocess_mode="livemostrecent",
            registry=self.registry,
        )
        self.api_keys_refused = Gauge(
            "mneme_api_keys_refused",
            "1 where the file of keys, as it stands, is not applied.",
            multiprocess_mode="livemostrecent",
            registry=self.registry,
        )
        self.build_info = Gauge(
            "mneme_build_info",
            "1 for the program that serves.",
            ("version", "python"),
            multiprocess_mode="livemax",
            registry=self.registry,
        )
        self.build_info.labels(own_version(), platform.python_version()).set(1)
        # There before the first of them.
        for outcome in ("applied", "refused"):
            self.api_keys_reloads.labels(outcome)
        self.key_requests.labels("", "unauthenticated")
        for outcome in ("appended", "duplicate", "refused"):
            self.events.labels(outcome)
        for operation in ("fetch", "append"):
            self.redis_failures.labels(operation)
            self.redis_retries.labels(operation)
        self._refresh: list[Callable[[], None]] = []
        self._answers: dict[tuple[str, int, str, str], CounterTally] = {}
        self._tallies: list[CounterTally | HistogramTally] = []

    def of_arm(self, arm: str, version: str) -> "ArmMetrics":
        """Return what one arm counts."""
        for status in _SCORE_STATUSES:
            self._answer(("/score", status, arm, version))
        return ArmMetrics(self, arm, version)

    def count_answer(self, route: str, status: int, *, arm: str = "", version: str = "") -> None:
        """Count an answer."""
        key = (route, status, arm, version)
        # Looking up labels costs more than counting.
        (self._answers.get(key) or self._answer(key)).inc()

    def _answer(self, key: tuple[str, int, str, str]) -> CounterTally:
        counter = self._answers[key] = self.tally_counter(self.requests.labels(*key))
        return counter

    def tally_counter(self, counter: Counter) -> CounterTally:
        """Return what `flush` writes to a counter."""
        tally = CounterTally(counter)
        self._tallies.append(tally)
        return tally

    def tally_histogram(self, histogram: Histogram) -> HistogramTally:
        """Return what `flush` writes to a histogram."""
        tally = HistogramTally(histogram)
        self._tallies.append(tally)
        return tally

    def flush(self) -> None:
        """Write what requests have added: to be called now and then, for other workers to see."""
        for tally in self._tallies:
            tally.flush()

    def before_scrape(self, refresh: Callable[[], None]) -> Callable[[], None]:
        """Let `refresh` bring gauges up to date whenever metrics are asked for.

        Returns what ends that.
        """
        self._refresh.append(refresh)
        return lambda: self._refresh.remove(refresh)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format: of all processes, where they share a folder."""
        for refresh in self._refresh:
            refresh()
        self.flush()
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is None:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        with _locked(Path(folder), fcntl.LOCK_SH):
            return generate_latest(registry)


class SupervisorMetrics:
    """The metrics of the process that starts the others."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.reloads = Counter(
            "mneme_reloads_total",
            "New generations of workers, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.worker_restarts = Counter(
            "mneme_worker_restarts_total",
            "Workers that were replaced, by reason.",
            ("reason",),
            registry=self.registry,
        )
        for outcome in ("applied", "refused"):
            self.reloads.labels(outcome)
        for reason in ("ended", "wedged"):
            self.worker_restarts.labels(reason)


class ArmMetrics:
    """The metrics of one arm; labels are looked up once, not for each request."""

    def __init__(self, metrics: Metrics, arm: str, version: str) -> None:
        counter, histogram = metrics.tally_counter, metrics.tally_histogram
        labels = (arm, version)
        self.arm, self.version = arm, version
        self.before_scrape = metrics.before_scrape
        self.batch_requests = histogram(metrics.batch_requests.labels(*labels))
        self.batch_work = histogram(metrics.batch_work.labels(*labels))
        self.padding = counter(metrics.padding.labels(*labels))
        self.history_behaviors = histogram(metrics.history_behaviors.labels(*labels))
        self.batch_work_limit = metrics.batch_work_limit.labels(*labels)
        self.device_memory_failures = metrics.device_memory_failures.labels(*labels)
        self.queued_work = metrics.queued_work.labels(*labels)
        self.queued_requests = metrics.queued_requests.labels(*labels)
        self.candidates = counter(metrics.candidates.labels(*labels))
        self.unknown_candidates = counter(metrics.unknown_candidates.labels(*labels))
        self.corrupt_histories = counter(metrics.corrupt_histories.labels(*labels))
        self.degraded = counter(metrics.degraded.labels(*labels))
        self.fetch_failures = metrics.redis_failures.labels("fetch")
        self._dropped = {
            reason: counter(metrics.dropped.labels(reason, *labels)) for reason in DROP_REASONS
        }
        self._shadowed = {
            outcome: counter(metrics.shadowed.labels(outcome, *labels))
            for outcome in _SHADOW_OUTCOMES
        }
        self._stages = {
            stage: histogram(metrics.stage_seconds.labels(stage, *labels))
            for stage in (*STAGES, _SHADOW)
        }
        self._recommend_stages = {
            stage: histogram(metrics.recommend_seconds.labels(stage, *labels)) for stage in STAGES
        }

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Record what one batch (fetch, encode, infer) or one request (the others) took."""
        self._stages[stage].observe(seconds)

    def observe_recommend_stage(self, stage: str, seconds: float) -> None:
        """Record what a stage of one recommendation took."""
        self._recommend_stages[stage].observe(seconds)

    def count_dropped(self, reason: str) -> None:
        """Count a request that was not scored."""
        self._dropped[reason].inc()

    def count_shadowed(self, outcome: str) -> None:
        """Count a request that this arm, a shadow, has scored or not."""
        self._shadowed[outcome].inc()


def own_version() -> str:
    """Return the version of this program."""
    try:
        return version("mneme")
    except PackageNotFoundError:  # a folder of sources runs as well
        return "unknown"


def fold_ended_process(folder: Path, pid: int) -> None:
    """Drop the gauges of a process that has ended, and add what it counted to one common file.

    Without that the folder would grow with every generation of workers.
    """
    with _locked(folder, fcntl.LOCK_EX):
        mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
        for kind in ("counter", "histogram"):
            path = folder / f"{kind}_{pid}.db"
            if path.exists():
                try:
                    _add_up(path, folder / f"{kind}_ended.db")
                finally:
                    # One that was damaged would fail every reader of the folder.
                    path.unlink()


def _add_up(source: Path, target: Path) -> None:
    total = MmapedDict(str(target))  # type: ignore[no-untyped-call]
    try:
        found = MmapedDict.read_all_values_from_file(str(source))  # type: ignore[no-untyped-call]
        for key, value, timestamp, _ in found:
            before, _ = total.read_value(key)  # type: ignore[no-untyped-call]
            total.write_value(key, before + value, timestamp)  # type: ignore[no-untyped-call]
    finally:
        total.close()  # type: ignore[no-untyped-call]


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Let nobody read while somebody moves counts from one file to another."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
