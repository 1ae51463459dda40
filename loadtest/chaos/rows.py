"""The faults, one function each: what is served, what is done to it, and what must not follow."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Literal

import httpx
import numpy as np

from contract.bundle import GOLDEN, MANIFEST, MODEL, file_entry, read_manifest
from contract.golden import GoldenRows
from loadtest.benchmarks.stand import RunningService
from loadtest.chaos.bench import (
    Bench,
    Injection,
    Watched,
    served_version,
    status,
    wait_until,
)
from loadtest.chaos.child import child
from loadtest.chaos.errors import ChaosError
from loadtest.chaos.outcome import Outcome
from loadtest.chaos.stores import SingleStore, cluster_store, single_store
from loadtest.schedules import Stage

Policy = Literal["refuse", "cold"]
Show = Callable[[Bench, str, str], tuple[Outcome, Watched]]
"""Makes a fault, given its name and its words; returns the row of the table, and the requests."""

_REPLACED_WITHIN_S = 60.0
_MOST_DRAIN_S, _LONGEST_PAUSE_S, _RELOAD_EVERY_S = 5.0, 5.0, 5.0
_DELAY_S = 0.1
_OVERLOAD = 3.0
_CLOCK_STEP_S = 3600
_PAGE_BYTES = 4096
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Row:
    """A fault by its name and in words."""

    name: str
    fault: str
    show: Show


def _kill_worker(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    with _store(bench) as store, bench.serving(store.url, "--workers", "2") as ours:

        def inject(injection: Injection) -> None:
            victim = _serving(ours)[0]
            os.kill(victim, signal.SIGKILL)
            injection.is_over()
            replaced_s = wait_until(
                lambda: len(set(_serving(ours)) - {victim}) == 2, within_s=_REPLACED_WITHIN_S
            )
            _expect_in_time(injection, "the worker was replaced", replaced_s)

        _serving(ours)
        return bench.show(name, fault, [ours], store, inject, lasts_s=bench.seconds / 4)


def _sigterm(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    drain_s = min(_MOST_DRAIN_S, bench.seconds / 4)
    flags = ("--drain-s", f"{drain_s:g}")
    with (
        _store(bench) as store,
        bench.serving(store.url, *flags) as ours,
        bench.serving(store.url, *flags) as other,
    ):

        def inject(injection: Injection) -> None:
            ours.process.terminate()
            unready_s = wait_until(lambda: not _is_ready(ours), within_s=drain_s)
            _expect_in_time(injection, "/readyz failed", unready_s)
            injection.load.move((other.target.host, other.target.port))
            try:
                code = ours.process.wait(drain_s + _REPLACED_WITHIN_S)
            except subprocess.TimeoutExpired:
                injection.findings.append("the service did not end")
                return
            injection.notes.append(f"the service ended with {code}")
            if code:
                injection.findings.append(f"the service ended with {code}, expected 0")

        outcome, watched = bench.show(
            name, fault, [ours, other], store, inject, lasts_s=bench.seconds / 4
        )
    return _none_may_fail(outcome), watched


def _reload(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    pointer = bench.folder / f"{name}.pointer"
    bench.publish(pointer, bench.bundles[0])
    every_s = min(_RELOAD_EVERY_S, bench.seconds / 4)
    # Time for clients to leave those who are replaced, and less than until the next reload.
    drain = ("--drain-s", f"{every_s / 2:g}")
    with _store(bench) as store, bench.serving(store.url, *drain, bundle=pointer) as ours:

        def inject(injection: Injection) -> None:
            before = status(ours)["generation"]
            end_s = time.monotonic() + bench.seconds
            published = 0
            while (due_s := time.monotonic()) < end_s:
                published += 1
                bench.publish(pointer, bench.bundles[published % 2])
                time.sleep(max(0.0, due_s + every_s - time.monotonic()))
            wanted = bench.expected[published % 2].version
            served_s = wait_until(
                lambda: served_version(ours) == wanted, within_s=_REPLACED_WITHIN_S
            )
            _expect_in_time(injection, "the bundle published last was served", served_s)
            applied = status(ours)["generation"] - before
            injection.notes.append(f"{published} bundles published, {applied} generations served")

        outcome, watched = bench.show(name, fault, [ours], store, inject, lasts_s=bench.seconds)
    return _none_may_fail(outcome), watched


def _bad_bundle(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    good, pointer = bench.bundles[0], bench.folder / f"{name}.pointer"
    bench.publish(pointer, good)
    bad = {
        damage.__name__.strip("_").replace("_", " "): _damaged(good, bench.folder, damage)
        for damage in (_altered_graph, _other_golden_scores, _cut_manifest, _missing_graph)
    }
    with _store(bench) as store, bench.serving(store.url, bundle=pointer) as ours:

        def inject(injection: Injection) -> None:
            for what, bundle in bad.items():
                # Not by `publish`, which looks first: here the service has to.
                _point(pointer, bundle)
                refused_s = wait_until(
                    lambda: bundle.name in (status(ours)["refused"] or ""),  # noqa: B023 # at once
                    within_s=_REPLACED_WITHIN_S,
                )
                reason = status(ours)["refused"]
                if refused_s is None:
                    injection.findings.append(f"{what}: not refused within {_REPLACED_WITHIN_S} s")
                else:
                    injection.notes.append(f"{what}: {_shown(reason, bench)}")
            _point(pointer, good)
            accepted_s = wait_until(
                lambda: status(ours)["refused"] is None, within_s=_REPLACED_WITHIN_S
            )
            _expect_in_time(injection, "all was well again", accepted_s)
            if (found := served_version(ours)) != bench.expected[0].version:
                injection.findings.append(f"version {found} is served")

        outcome, watched = bench.show(name, fault, [ours], store, inject, lasts_s=bench.seconds / 4)
    return _none_may_fail(outcome), watched


def _redis_killed(policy: Policy, bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    def inject(store: SingleStore, _injection: Injection) -> None:
        store.process.kill()
        time.sleep(_pause_s(bench))
        store.process.start()

    return _hurt_redis(policy, inject, bench, name, fault)


def _redis_paused(policy: Policy, bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    def inject(store: SingleStore, _injection: Injection) -> None:
        store.process.send_signal(signal.SIGSTOP)
        time.sleep(_pause_s(bench))
        store.process.send_signal(signal.SIGCONT)

    return _hurt_redis(policy, inject, bench, name, fault)


def _hurt_redis(
    policy: Policy,
    hurt: Callable[[SingleStore, Injection], None],
    bench: Bench,
    name: str,
    fault: str,
) -> tuple[Outcome, Watched]:
    with (
        _store(bench) as store,
        bench.serving(store.url, "--on-redis-failure", policy) as ours,
    ):
        return bench.show(
            name,
            fault,
            [ours],
            store,
            lambda injection: hurt(store, injection),
            lasts_s=bench.seconds / 4,
            may_degrade=policy == "cold",
        )


def _redis_slow(policy: Policy, bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    with (
        _store(bench) as store,
        child("loadtest.chaos.slow_proxy", [store.process.port]) as proxy,
        bench.serving(
            f"redis://127.0.0.1:{proxy.first_line}/0", "--on-redis-failure", policy
        ) as ours,
    ):

        def inject(_injection: Injection) -> None:
            proxy.tell(f"{_DELAY_S}")
            time.sleep(bench.seconds / 4)
            proxy.tell("0")

        return bench.show(
            name, fault, [ours], store, inject, lasts_s=0.0, may_degrade=policy == "cold"
        )


def _redis_full(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    def inject(store: SingleStore, injection: Injection) -> None:
        store.allow_memory(1)
        if store.can_write():
            injection.findings.append("Redis took a write: its memory was not full")
        time.sleep(bench.seconds / 4)
        store.allow_memory(0)

    return _hurt_redis("refuse", inject, bench, name, fault)


def _failover(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    with cluster_store() as store:
        bench.fill(store)
        with bench.serving(store.url) as ours:

            def inject(injection: Injection) -> None:
                store.kill_primary()
                injection.is_over()
                took_s = wait_until(store.has_failed_over, within_s=_REPLACED_WITHIN_S)
                _expect_in_time(injection, "a replica took its place", took_s)

            return bench.show(name, fault, [ours], store, inject, lasts_s=bench.seconds / 4)


def _overload(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    around_s = bench.seconds / 2
    stages = [
        Stage(first_rate=rate, last_rate=rate, duration_s=duration_s)
        for rate, duration_s in (
            (bench.rate, around_s),
            (_OVERLOAD * bench.capacity, bench.seconds),
            (bench.rate, around_s),
        )
    ]
    with _store(bench) as store, bench.serving(store.url) as ours:

        def inject(injection: Injection) -> None:
            time.sleep(bench.seconds)
            injection.notes.append(f"offered meanwhile: {stages[1].first_rate:.0f} requests/s")

        return bench.show(name, fault, [ours], store, inject, lasts_s=0.0, stages=stages)


def _slow_clients(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    with _store(bench) as store, bench.serving(store.url) as ours:

        def inject(injection: Injection) -> None:
            arguments = [ours.target.port, bench.slow_clients]
            with child("loadtest.chaos.slow_clients", arguments) as clients:
                time.sleep(bench.seconds)
                cut_off = int(clients.end())
                injection.notes.append(f"{clients.first_line}, {cut_off:,} times one was cut off")

        return bench.show(name, fault, [ours], store, inject, lasts_s=bench.seconds)


def _clock(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        raise ChaosError("libfaketime is not here: install Debian's package libfaketime")
    step = bench.folder / f"{name}.offset"
    step.write_text("+0\n")
    with (
        _store(bench) as store,
        bench.serving(
            store.url,
            LD_PRELOAD=str(libraries[0]),
            FAKETIME_TIMESTAMP_FILE=str(step),
            FAKETIME_CACHE_DURATION="1",
            # A step of the clock of the day leaves the monotonic one alone.
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            # It mends older C libraries; with this one, waits for a lock took half a second.
            FAKETIME_FORCE_MONOTONIC_FIX="0",
        ) as ours,
    ):

        def inject(injection: Injection) -> None:
            _replace(step, f"-{_CLOCK_STEP_S}\n")
            stepped_s = wait_until(lambda: _ahead_s(ours) < -_CLOCK_STEP_S / 2, within_s=10.0)
            _expect_in_time(injection, "the service's clock stood an hour earlier", stepped_s)

        return bench.show(name, fault, [ours], store, inject, lasts_s=bench.seconds / 4)


def _disk_full(bench: Bench, name: str, fault: str) -> tuple[Outcome, Watched]:
    if bench.checkpoint is None:
        raise ChaosError(f"there is no model.pt beside {bench.bundles[0]} to be exported")
    size_bytes = sum(path.stat().st_size for path in bench.bundles[0].iterdir()) // 2
    with _small_disk(bench.folder / f"{name}.disk", size_bytes) as disk:
        pointer, target = disk / "pointer", disk / "bundle"
        bench.publish(pointer, bench.bundles[0])
        published = pointer.read_bytes()
        with _store(bench) as store, bench.serving(store.url, bundle=pointer) as ours:

            def inject(injection: Injection) -> None:
                checkpoint = bench.checkpoint
                assert checkpoint is not None
                exported = bench.run("exporter", checkpoint, target)
                said = _shown(exported.stderr.strip()[-_SHOWN_CHARACTERS:], bench)
                injection.notes.append(f"the exporter: {said}")
                if exported.returncode == 0 or os.strerror(errno.ENOSPC) not in said:
                    injection.findings.append("the exporter did not fail for want of space")
                if left := sorted(path.name for path in disk.iterdir() if path != pointer):
                    injection.findings.append(f"the exporter left {', '.join(left)} behind")
                _fill_up(disk / "rest")
                done = bench.run("service", "publish", pointer, bench.bundles[1])
                said = _shown(done.stderr.strip()[-_SHOWN_CHARACTERS:], bench)
                injection.notes.append(f"publish: {said}")
                if done.returncode == 0 or pointer.read_bytes() != published:
                    injection.findings.append("the pointer was changed on a full disk")
                (disk / "rest").unlink()
                if (found := served_version(ours)) != bench.expected[0].version:
                    injection.findings.append(f"version {found} is served")

            outcome, watched = bench.show(
                name, fault, [ours], store, inject, lasts_s=bench.seconds / 4
            )
    return _none_may_fail(outcome), watched


_POLICIES: tuple[tuple[str, Policy], ...] = (("", "refuse"), ("-cold", "cold"))
ROWS: tuple[Row, ...] = (
    Row(name="kill-worker", fault="kill -9 of one of two workers", show=_kill_worker),
    Row(
        name="sigterm",
        fault="SIGTERM; the client follows /readyz to another service",
        show=_sigterm,
    ),
    Row(name="reload", fault="another bundle published every 5 s", show=_reload),
    Row(name="bad-bundle", fault="four bad bundles published", show=_bad_bundle),
    *(
        Row(name=f"{name}{suffix}", fault=f"{fault} ({policy})", show=partial(show, policy))
        for name, fault, show in (
            ("redis-killed", "Redis killed and restarted", _redis_killed),
            ("redis-paused", "Redis paused by SIGSTOP", _redis_paused),
            ("redis-slow", "Redis slowed by 100 ms", _redis_slow),
        )
        for suffix, policy in _POLICIES
    ),
    Row(name="redis-full", fault="Redis's memory full", show=_redis_full),
    Row(name="failover", fault="a primary of a Redis Cluster killed", show=_failover),
    Row(name="overload", fault="three times the capacity", show=_overload),
    Row(name="slow-clients", fault="slow-drip clients beside the load", show=_slow_clients),
    Row(name="clock", fault="the service's clock stepped back an hour", show=_clock),
    Row(name="disk-full", fault="disk full while a bundle is written", show=_disk_full),
)


def _none_may_fail(outcome: Outcome) -> Outcome:
    if not outcome.failed:
        return outcome
    finding = (
        f"{outcome.failed} requests failed: {outcome.timed_out} late, {outcome.broken} broken, "
        f"{outcome.unsent} unsent, the others refused for no stated reason or answered otherwise"
    )
    return replace(outcome, findings=[*outcome.findings, finding])


@contextmanager
def _store(bench: Bench) -> Iterator[SingleStore]:
    with single_store() as store:
        bench.fill(store)
        yield store


def _pause_s(bench: Bench) -> float:
    return min(_LONGEST_PAUSE_S, bench.seconds / 4)


def _expect_in_time(injection: Injection, what: str, took_s: float | None) -> None:
    if took_s is None:
        injection.findings.append(f"{what}: not in time")
    else:
        injection.notes.append(f"{what} after {took_s:.1f} s")


def _serving(ours: RunningService) -> list[int]:
    """Return the processes that serve; raises ChaosError where the service does not tell."""
    return [worker["pid"] for worker in status(ours)["workers"] if worker["state"] == "serving"]


def _is_ready(ours: RunningService) -> bool:
    try:
        return httpx.get(f"{ours.url}/readyz").is_success
    except httpx.TransportError:
        return False


def _ahead_s(ours: RunningService) -> float:
    """Return how far the service's clock is ahead of this process's, in seconds."""
    date = httpx.get(f"{ours.url}/healthz").headers["date"]
    return parsedate_to_datetime(date).timestamp() - time.time()


# Bad bundles.


def _damaged(good: Path, folder: Path, damage: Callable[[Path], None]) -> Path:
    copy = folder / f"bad{damage.__name__.replace('_', '-')}"
    shutil.copytree(good, copy)
    damage(copy)
    return copy


def _altered_graph(bundle: Path) -> None:
    content = bytearray((bundle / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / MODEL).write_bytes(content)


def _other_golden_scores(bundle: Path) -> None:
    """A whole bundle, but for a model that does not do what it did where it was exported."""
    golden = GoldenRows.load(bundle / GOLDEN)
    replace(golden, scores=golden.scores + np.float32(0.01)).save(bundle / GOLDEN)
    manifest = read_manifest(bundle)
    files = {**manifest.files, GOLDEN: file_entry(bundle / GOLDEN)}
    changed = manifest.model_copy(update={"files": files, "model_version": "bad"})
    (bundle / MANIFEST).write_text(json.dumps(changed.model_dump(mode="json")))


def _cut_manifest(bundle: Path) -> None:
    content = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).write_bytes(content[: len(content) // 2])


def _missing_graph(bundle: Path) -> None:
    (bundle / MODEL).unlink()


def _point(pointer: Path, bundle: Path) -> None:
    _replace(pointer, f"{bundle.resolve()}\n")


def _replace(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(text)
    staging.replace(path)


def _shown(reason: str, bench: Bench) -> str:
    """Return a reason without the scratch folder's name, which changes from run to run."""
    return reason.replace(f"{bench.folder.resolve()}/", "")


# A disk that can be full.


@contextmanager
def _small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    folder.mkdir()
    size = f"size={max(size_bytes, 8 * _PAGE_BYTES)}"
    mount = ["mount", "-t", "tmpfs", "-o", size, "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise ChaosError(f"a small disk needs the right to mount one: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(_PAGE_BYTES))
        except OSError:  # no space left on device
            pass
