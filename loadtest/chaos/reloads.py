"""`python -m loadtest reload`: what reloads do to the latency of those who are served meanwhile.

Loads without a reload, with one every 5 s, and beside an idle process take turns, because the
machine's speed changes from minute to minute. The idle process says how much of the difference is
the processor's (caches, a core that is shared), which any work beside the service would cost.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import polars as pl

from loadtest.benchmarks.stand import RunningService
from loadtest.chaos.bench import Bench, Watched, served_version, status, wait_until
from loadtest.chaos.child import child
from loadtest.chaos.errors import ChaosError
from loadtest.chaos.outcome import problem_of
from loadtest.chaos.preparation import add_flags, make_bench
from loadtest.chaos.stores import single_store
from loadtest.open_loop import RunningLoad
from loadtest.results import milliseconds, table, write_section

TITLE = "Reloads, side by side"

_EVERY_S, _DRAIN_S = 5.0, 2.0
_RELOADED_WITHIN_S = 60.0
# Nobody is refused: a p99 of those who were answered within 30 ms would end there.
_DEADLINE_MS = 1000.0
_WITHOUT, _RELOADS, _NEIGHBOUR = "without", "a reload every 5 s", "an idle process beside it"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A load under one condition.

    `latencies_s` of the requests that were answered with 200, in the order that they were due;
    `failures`: what the others' answers named as the problem. `reloads`: applied meanwhile.
    """

    condition: str
    latencies_s: Sequence[float]
    failures: Sequence[str]
    wrong: int
    lost: int
    reloads: int

    @property
    def failed(self) -> int:
        """Requests without an answer of 200."""
        return len(self.failures)

    def percentile_s(self, q: float) -> float:
        """Return a percentile, 0 to 100, of the latencies."""
        return float(np.percentile(self.latencies_s, q))


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `reload` to the commands of a program."""
    one = commands.add_parser("reload", help="latency with reloads and without, side by side")
    one.add_argument("--rounds", type=int, default=8, help="default %(default)s")
    one.add_argument(
        "--seconds", type=float, default=30.0, help="of each load (default %(default)s)"
    )
    add_flags(one, share=0.4)
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure; return 0 when no request failed, no score was wrong and no event lost."""
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    with make_bench(options, seconds=options.seconds, slow_clients=0) as bench:
        parts = measure(bench, options.rounds)
        rate, capacity = bench.rate, bench.capacity
    found = figures(parts)
    summary = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    if failures := Counter(failure for part in parts for failure in part.failures):
        summary += f"; failed: {', '.join(f'{name} {n}' for name, n in failures.items())}"
    about = (
        f"{rate:.0f} requests/s, {rate / capacity:.2f} of the capacity, one worker; a deadline of "
        f"{_DEADLINE_MS / 1000:g} s, so that no request is refused. {options.rounds} rounds of "
        f"three loads of {options.seconds:g} s. A reload: another bundle is published, opened, "
        "checked, warmed and served. The idle process takes as long, as often, in the scheduling "
        "class of a new generation. Ratios are medians of the rounds', each against the load "
        "without a reload of the same round; pooled: of all rounds' requests together."
    )
    write_section(
        options.page,
        title=TITLE,
        command=f"python -m loadtest reload --rounds {options.rounds} "
        f"--seconds {options.seconds:g}",
        text=f"{about}\n\n{summary}\n\n{_table(parts)}",
        figures=found,
    )
    sys.stdout.write(f"{summary}\n")
    return 1 if any(part.failed or part.wrong or part.lost for part in parts) else 0


def measure(bench: Bench, rounds: int) -> list[Part]:
    """Return what the loads showed, three a round."""
    bench = replace(bench, deadline_ms=_DEADLINE_MS)
    pointer = bench.folder / "reloads.pointer"
    bench.publish(pointer, bench.bundles[0])
    parts: list[Part] = []
    with single_store() as store:
        bench.fill(store)
        flags = ("--deadline-s", f"{_DEADLINE_MS / 1000:g}", "--drain-s", f"{_DRAIN_S:g}")
        with bench.serving(store.url, *flags, bundle=pointer) as ours:
            took_s = _reload_once(bench, ours, pointer)
            conditions: Mapping[str, Callable[[RunningLoad], None]] = {
                _WITHOUT: lambda _: time.sleep(bench.seconds),
                _RELOADS: lambda _: _reload_again_and_again(bench, ours, pointer),
                _NEIGHBOUR: lambda _: _run_neighbour(bench, took_s),
            }
            for number in range(rounds):
                for condition, during in conditions.items():
                    before = status(ours)["generation"]
                    watched = bench.watch(
                        [ours],
                        store,
                        during,
                        name=f"reload-{number}-{len(parts)}",
                        settle_s=min(1.0, bench.seconds / 4),
                    )
                    reloads = status(ours)["generation"] - before
                    parts.append(_part(condition, watched, reloads))
                    sys.stdout.write(f"{_table(parts[-1:])}\n")
                    sys.stdout.flush()
    return parts


def figures(parts: Sequence[Part]) -> dict[str, float]:
    """Return the figures of the page's JSON."""
    found: dict[str, float] = {}
    for name, condition in (("reload", _RELOADS), ("idle_neighbour", _NEIGHBOUR)):
        ratios = [
            beside.percentile_s(99) / without.percentile_s(99)
            for without, beside in zip(_of(parts, _WITHOUT), _of(parts, condition), strict=True)
        ]
        pooled = _pooled_p99_s(parts, condition) / _pooled_p99_s(parts, _WITHOUT)
        found[f"{name}_p99_ratio"] = statistics.median(ratios)
        found[f"{name}_p99_ratio_pooled"] = pooled
    found["reloads"] = sum(part.reloads for part in parts)
    found["reload_failed_requests"] = sum(part.failed for part in parts)
    found["reload_wrong_scores"] = sum(part.wrong for part in parts)
    return found


def _reload_once(bench: Bench, ours: RunningService, pointer: Path) -> float:
    """Reload, and back again; return how long the latter took, in seconds."""
    for chosen in (1, 0):
        _reload(bench, ours, pointer, chosen)
    return float(status(ours)["last_reload"]["took_s"])


def _reload_again_and_again(bench: Bench, ours: RunningService, pointer: Path) -> None:
    end_s = time.monotonic() + bench.seconds
    chosen = 0
    # The next load begins with what this one did, and with nothing under way.
    while (due_s := time.monotonic()) < end_s or chosen:
        chosen = 1 - chosen
        _reload(bench, ours, pointer, chosen)
        time.sleep(max(0.0, min(due_s + _EVERY_S, end_s) - time.monotonic()))


def _reload(bench: Bench, ours: RunningService, pointer: Path, chosen: int) -> None:
    bench.publish(pointer, bench.bundles[chosen])
    wanted = bench.expected[chosen].version
    if wait_until(lambda: served_version(ours) == wanted, within_s=_RELOADED_WITHIN_S) is None:
        raise ChaosError(f"{wanted} was not served within {_RELOADED_WITHIN_S:g} s")


def _run_neighbour(bench: Bench, spin_s: float) -> None:
    with child("loadtest.chaos.neighbour", [spin_s, _EVERY_S]):
        time.sleep(bench.seconds)


def _part(condition: str, watched: Watched, reloads: int) -> Part:
    requests = watched.requests()
    answered = requests.filter(pl.col("status") == httpx.codes.OK)
    return Part(
        condition=condition,
        latencies_s=answered["latency_s"].to_list(),
        failures=[
            problem_of(answer)
            for code, answer in zip(watched.result.codes, watched.result.answers, strict=True)
            if code != httpx.codes.OK
        ],
        wrong=watched.verdicts.count("wrong"),
        lost=watched.audit.lost,
        reloads=reloads,
    )


def _of(parts: Sequence[Part], condition: str) -> list[Part]:
    return [part for part in parts if part.condition == condition]


def _pooled_p99_s(parts: Sequence[Part], condition: str) -> float:
    return float(np.percentile(np.concatenate([p.latencies_s for p in _of(parts, condition)]), 99))


def _table(parts: Sequence[Part]) -> str:
    heads = ("load", "requests", "failed", "wrong", "lost", "reloads", "p50 ms", "p99 ms")
    return table(
        heads,
        [
            (
                *(part.condition, f"{len(part.latencies_s) + part.failed:,}", part.failed),
                *(part.wrong, part.lost, part.reloads),
                *(milliseconds(part.percentile_s(q)) for q in (50, 99)),
            )
            for part in parts
        ],
    )
