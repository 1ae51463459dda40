"""The scorer in process, without HTTP: milliseconds of each stage, requests/s, memory.

`engine`: over batch, candidates, length and model. `length`: over the history length, with the
growth of memory over many requests of the running service.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.benchmarks.stand import histories, make_requests, service
from loadtest.bundles import BUNDLE_NAMES, BundleName, make_bundle
from loadtest.open_loop import run_open_loop
from loadtest.results import table, write_section

_BATCHES, _CANDIDATES, _LENGTHS = (1, 8, 32), (1, 100, 500), (100, 1000)
_LONG = 4000
_LENGTHS_OF_FIGURES = (50, 100, 200, 500, 1000, 2000, 4000)
_SECONDS = 1.5  # for each shape
_MB = 1e6
_SOAKED_REQUESTS = 100_000
_SOAK_RATE = 1500.0

Row = dict[str, Any]


def run_engine(folder: Path, page: Path, *, provider: str) -> None:
    """Measure every shape of every model; write a section of the results page."""
    rows: list[Sequence[object]] = []
    best = 0.0
    for name in BUNDLE_NAMES:
        bundle = make_bundle(name, folder)
        with histories(bundle, 1, n=1) as redis_url:
            flags = ["--batches", *_BATCHES, "--candidates", *_CANDIDATES, "--lengths", *_LENGTHS]
            for row in _profile(bundle, redis_url, [*flags, "--provider", provider]):
                rows.append(_engine_row(name, row))
                if (name, row["candidates"], row["length"]) == ("imn-3p-plus", 100, 1000):
                    best = max(best, row["requests_per_s"])
    heads = ("model", "B", "C", "L", "fetch ms", "encode ms", "infer ms", "requests/s")
    prefix = "gpu_" if provider == "cuda" else ""
    write_section(
        page,
        title=f"Engine on {'a GPU' if provider == 'cuda' else 'the CPU'}",
        command=f"python -m loadtest engine --provider {provider}",
        text="Medians of a batch, all cores; requests/s with the next batch prepared while one "
        "runs.\n\n" + table(heads, rows),
        figures={f"{prefix}engine_requests_per_s": best},
    )


def run_length(folder: Path, page: Path, *, provider: str) -> None:
    """Measure latency and memory over the history length; write a section of the results page."""
    rows: list[Sequence[object]] = []
    figures: dict[str, float] = {}
    for name in BUNDLE_NAMES:
        bundle = make_bundle(name, folder, history_length=_LONG)
        measured: list[Row] = []
        with histories(bundle, 1, n=1) as redis_url:
            # One process for each length: peak memory is of a process.
            for length in _LENGTHS_OF_FIGURES:
                flags = ["--batches", 1, "--candidates", 100, "--lengths", length]
                measured += _profile(bundle, redis_url, [*flags, "--provider", provider])
        infer_ms = [row["infer_ms"] for row in measured]
        r2 = linear_r2(_LENGTHS_OF_FIGURES, infer_ms)
        if name == "imn-3p-plus" and provider == "cpu":
            figures["length_linear_r2_imn"] = r2
        rows += [
            (
                *(name, row["length"], f"{row['infer_ms']:.3f}"),
                *(f"{row['fetch_ms'] + row['encode_ms']:.3f}",),
                f"{row['added_peak_bytes'] / _MB:.1f}",
                f"{r2:.4f}" if row is measured[-1] else "",
            )
            for row in measured
        ]
    heads = ("model", "L", "infer ms", "fetch + encode ms", "added memory at peak, MB", "R^2")
    write_section(
        page,
        title=f"Length on {'a GPU' if provider == 'cuda' else 'the CPU'}",
        command=f"python -m loadtest length --provider {provider}",
        text="One request of 100 candidates, all cores; R^2 of a line through infer ms.\n\n"
        + table(heads, rows),
        figures=figures,
    )


def run_growth(folder: Path, page: Path) -> None:
    """Send 100,000 requests to a running service and see whether it grows."""
    bundle = make_bundle("popularity", folder)
    bodies = make_requests(bundle).bodies()
    with (
        histories(bundle, 1000) as redis_url,
        service(bundle, redis_url, cores=[0, 1], threads=1) as ours,
    ):
        seconds = _SOAKED_REQUESTS / _SOAK_RATE
        # What is allocated for the first requests is kept for all others.
        run_open_loop(ours.target, bodies, rate=_SOAK_RATE, duration_s=seconds / 5, seed=1)
        before = ours.rss_bytes()
        result = run_open_loop(ours.target, bodies, rate=_SOAK_RATE, duration_s=seconds, seed=2)
        time.sleep(1)
        after = ours.rss_bytes()
    growth = after / before - 1
    write_section(
        page,
        title="Growth",
        command="python -m loadtest growth",
        text=f"{len(result.latencies_s):,} requests of 100 candidates and 1,000 behaviors at "
        f"{_SOAK_RATE:.0f}/s: resident memory {before / _MB:.1f} MB before, {after / _MB:.1f} MB "
        f"after ({100 * growth:+.2f} %).",
        figures={"rss_growth_over_100000_requests": growth},
    )


def linear_r2(x: Sequence[float], y: Sequence[float]) -> float:
    """Return R^2 of the least-squares line through the points."""
    slope, offset = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - (slope * np.asarray(x) + offset)
    return float(1 - residuals.var() / np.var(y))


def _profile(bundle: Path, redis_url: str, flags: Sequence[object]) -> list[Row]:
    command = [
        *(sys.executable, "-m", "service", "profile", "--bundle", str(bundle)),
        *("--redis-url", redis_url, "--seconds", str(_SECONDS), *map(str, flags)),
    ]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def _engine_row(name: BundleName, row: Row) -> Sequence[object]:
    return (
        *(name, row["batch"], row["candidates"], row["length"]),
        *(f"{row[key]:.3f}" for key in ("fetch_ms", "encode_ms", "infer_ms")),
        f"{row['requests_per_s']:,.0f}",
    )
