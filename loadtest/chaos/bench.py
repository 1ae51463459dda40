"""Where faults are shown: what is served, the load beside it, and the watch over both."""

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import polars as pl

from loadtest.benchmarks.stand import RunningService, service
from loadtest.chaos.child import give_way
from loadtest.chaos.errors import ChaosError
from loadtest.chaos.events import Audit, EventWriter
from loadtest.chaos.outcome import Fault, Outcome, conclude
from loadtest.chaos.pool import Checker, Expected, Pool, Verdict
from loadtest.chaos.stores import Store
from loadtest.open_loop import RunningLoad, ScheduleResult, Target, running_schedule
from loadtest.schedules import Stage, draw_arrivals, steady

PREFIX = "history"

_WRITERS, _POSTS_PER_S = 2, 5.0
_EVENT_PATIENCE_S = 15.0
_LEAST_TIMEOUT_S, _TIMEOUT_DEADLINES = 2.0, 5.0
_LONGEST_SETTLE_S = 2.0
# Of a load that is stopped when the fault is over.
_LONGEST_S = 900.0
_COMMAND_TIMEOUT_S = 300.0
# What it asks of, it asks without TLS; httpx would read all of the system's for each call.
_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_LOWEST_FLOOD, _HIGHEST_FLOOD, _FLOOD_S = 500.0, 32_000.0, 3.0
# A flood that is answered by so much has not found the limit.
_SATURATED_SHARE = 0.7


@dataclass(kw_only=True)
class Injection:
    """A fault while it is made: `load` is running; `notes` say what was seen, `findings` what must
    not be.
    """

    load: RunningLoad
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    ended_s: float | None = None

    def is_over(self) -> None:
        """Say that the fault is over now, where the injection goes on watching."""
        self.ended_s = time.monotonic() - self.load.started_s


@dataclass(frozen=True, kw_only=True, eq=False)
class Watched:
    """A load, request by request: `verdicts`, None where the status is not 200; `versions`:
    right answers by the version that gave them; `largest_difference` of a score in these; `reasons`
    of the first wrong ones.
    """

    result: ScheduleResult
    verdicts: Sequence[Verdict | None]
    versions: dict[str, int]
    largest_difference: float
    reasons: Sequence[str]
    audit: Audit

    def requests(self) -> pl.DataFrame:
        """Return one row a request; due_s counts from the start of the load."""
        result = self.result
        return pl.DataFrame(
            {
                "due_s": result.arrivals_s,
                "latency_s": result.latencies_s,
                "status": result.codes,
                "send_delay_s": result.send_delays_s,
                "sent": result.sent,
                "verdict": pl.Series(self.verdicts, dtype=pl.String),
            }
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What all faults share.

    `bundles`: the one that is served, and another one. `expected`: what each must answer to `pool`.
    `checkpoint`: of the first bundle, None where there is none. `folder`: scratch space.
    `capacity`: requests/s that are answered within the deadline when more come; `rate` of the
    load. `seconds`: how long a lasting fault lasts. `slow_clients`: of the fault of that name.
    `hurried`: whether the commands that run beside the service take what they can get of the
    processor, and not only what nobody else wants.
    """

    bundles: tuple[Path, Path]
    expected: tuple[Expected, Expected]
    checkpoint: Path | None
    pool: Pool
    folder: Path
    capacity: float
    rate: float
    seconds: float
    deadline_ms: float
    slow_clients: int
    hurried: bool = False

    @contextmanager
    def serving(
        self, redis_url: str, *flags: str, bundle: Path | None = None, **variables: str
    ) -> Iterator[RunningService]:
        """Run a service of the first bundle, or of what `bundle` names."""
        with service(
            self.bundles[0] if bundle is None else bundle,
            redis_url,
            cores=sorted(os.sched_getaffinity(0)),
            threads=1,
            flags=("--key-prefix", PREFIX, *flags),
            environment=variables,
            log=self.folder / "service.log",
        ) as ours:
            yield ours

    def fill(self, store: Store) -> None:
        """Put the histories of the pool into the history store."""
        store.fill(self.pool.values(PREFIX))

    def show(
        self,
        name: str,
        fault: str,
        services: Sequence[RunningService],
        store: Store,
        inject: Callable[[Injection], None],
        *,
        lasts_s: float,
        may_degrade: bool = False,
        stages: Sequence[Stage] | None = None,
    ) -> tuple[Outcome, Watched]:
        """Make a fault under load; return the row of the table, and the requests.

        The load goes to the first of `services`, the events to those that answer. `inject` makes
        the fault, and takes it back, where it can be; the phase "during" lasts `lasts_s` at least.
        `stages`: the whole load, where it changes with the fault.
        """
        around_s = self.seconds / 2
        seen: list[Fault] = []

        def during(load: RunningLoad) -> None:
            _sleep_until(load.started_s + around_s)
            injection = Injection(load=load)
            began_s = time.monotonic() - load.started_s
            inject(injection)
            ended_s = time.monotonic() - load.started_s
            _sleep_until(load.started_s + began_s + lasts_s)
            over_s = time.monotonic() - load.started_s
            _sleep_until(load.started_s + over_s + around_s)
            seen.append(
                Fault(
                    began_s=began_s,
                    ended_s=ended_s if injection.ended_s is None else injection.ended_s,
                    over_s=over_s,
                    notes=injection.notes,
                    findings=injection.findings,
                )
            )

        watched = self.watch(
            services,
            store,
            during,
            name=name,
            may_degrade=may_degrade,
            stages=stages,
            settle_s=min(_LONGEST_SETTLE_S, self.seconds / 4),
        )
        outcome = conclude(
            name, fault, watched.result, watched.verdicts, seen[0], watched.audit,
            reasons=watched.reasons, rate=self.rate,
        )  # fmt: skip
        outcome.notes.append(f"right scores are off by {watched.largest_difference:.1e} at most")
        if len(watched.versions) > 1:
            counts = (f"{n:,} by {version}" for version, n in watched.versions.items())
            outcome.notes.append(f"right answers: {', '.join(counts)}")
        return outcome, watched

    def watch(
        self,
        services: Sequence[RunningService],
        store: Store,
        during: Callable[[RunningLoad], None],
        *,
        name: str,
        may_degrade: bool = False,
        stages: Sequence[Stage] | None = None,
        settle_s: float = 0.0,
    ) -> Watched:
        """Run load and events until `during` returns, then check every answer and every event.

        `name`: of the events' users. `settle_s`: of the load that goes before and is not counted.
        """
        first = services[0].target
        checker = Checker(self.expected, may_degrade=may_degrade)
        writer = EventWriter(
            [ours.url for ours in services], f"writer-{name}", threads=_WRITERS, rate=_POSTS_PER_S
        )
        whole = stages or steady(self.rate, _LONGEST_S)
        with writer.running(patience_s=_EVENT_PATIENCE_S):
            if settle_s:
                with self._load(first, steady(self.rate, settle_s)) as load:
                    load.result()
            with self._load(first, whole) as load:
                during(load)
                load.stop()
                result = load.result()
        verdicts = [
            checker.check(number % len(self.pool.users), answer) if code == httpx.codes.OK else None
            for number, (code, answer) in enumerate(
                zip(result.codes.tolist(), result.answers, strict=True)
            )
        ]
        audit = writer.audit(lambda users: store.read([f"{PREFIX}:{u}".encode() for u in users]))
        return Watched(
            result=result,
            verdicts=verdicts,
            versions=checker.versions,
            largest_difference=checker.largest_difference,
            reasons=checker.reasons,
            audit=audit,
        )

    @contextmanager
    def _load(self, target: Target, stages: Sequence[Stage]) -> Iterator[RunningLoad]:
        whole = Target(
            host=target.host,
            port=target.port,
            path=target.path,
            headers={"X-Deadline-Ms": f"{self.deadline_ms:g}", "Content-Type": "application/json"},
        )
        with running_schedule(
            (target.host, target.port),
            [whole.request(body) for body in self.pool.bodies()],
            draw_arrivals(stages, "poisson", seed=8),
            duration_s=sum(stage.duration_s for stage in stages),
            timeout_s=max(_LEAST_TIMEOUT_S, _TIMEOUT_DEADLINES * self.deadline_ms / 1000),
            keep_answers=True,
        ) as load:
            yield load

    def measured_capacity(self, ours: RunningService) -> float:
        """Return the requests/s that are answered within the deadline when far more come."""
        flood = _LOWEST_FLOOD
        while True:
            with self._load(ours.target, steady(flood, _FLOOD_S)) as load:
                goodput = load.result().goodput(self.deadline_ms / 1000)
            if goodput < _SATURATED_SHARE * flood or flood >= _HIGHEST_FLOOD:
                break
            flood *= 2
        if not goodput:
            raise ChaosError(
                f"no request of {flood:g} a second was answered within {self.deadline_ms:g} ms"
            )
        return goodput

    def run(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run `python -m ...` as an operator does, who does so on another machine."""
        return subprocess.run(
            [sys.executable, "-m", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            preexec_fn=None if self.hurried else give_way,
        )

    def publish(self, pointer: Path, bundle: Path) -> None:
        """Let the pointer file name a bundle; raises ChaosError where the service has no such
        command, or refuses.
        """
        done = self.run("service", "publish", pointer, bundle)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]
            raise ChaosError(f"`service publish` ended with {done.returncode}: {said}")


def status(ours: RunningService) -> dict[str, Any]:
    """Return what GET /admin/status says; raises ChaosError where there is no such route."""
    answer = httpx.get(f"{ours.url}/admin/status", timeout=5.0, verify=_NO_CERTIFICATES)
    if not answer.is_success:
        raise ChaosError(f"GET /admin/status: {answer.status_code}")
    found: dict[str, Any] = answer.json()
    return found


def served_version(ours: RunningService) -> str:
    """Return the version that the only arm serves."""
    models = httpx.get(f"{ours.url}/models", timeout=5.0, verify=_NO_CERTIFICATES).json()
    version: str = models["models"][0]["version"]
    return version


def wait_until(holds: Callable[[], bool], *, within_s: float) -> float | None:
    """Return the seconds until it held, None where it did not in time."""
    started_s = time.monotonic()
    while not holds():
        if time.monotonic() > started_s + within_s:
            return None
        time.sleep(0.1)
    return time.monotonic() - started_s


def _sleep_until(at_s: float) -> None:
    time.sleep(max(0.0, at_s - time.monotonic()))
