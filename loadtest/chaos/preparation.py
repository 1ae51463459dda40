"""From the flags of a command to a bench: bundles, the pool, what must be answered, the rate."""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from contract.bundle import read_manifest
from loadtest.bundles import make_bundle
from loadtest.chaos.bench import Bench
from loadtest.chaos.errors import ChaosError
from loadtest.chaos.pool import expect, make_pool
from loadtest.chaos.stores import single_store

_CHECKPOINT = "model.pt"


def add_flags(parser: argparse.ArgumentParser, *, share: float) -> None:
    """Add the flags that `make_bench` reads, and where results are written.

    `share`: of the capacity, unless a rate is named.
    """
    parser.add_argument(
        "--page",
        type=Path,
        default=Path("docs/results/reliability.md"),
        help="where the section is written, with its figures beside it as .json",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        action="append",
        default=[],
        help="twice: the bundle that is served, and another version of it; hardly trained ones of "
        "IMN 3P+ are made unless given",
    )
    parser.add_argument(
        "--bundles", type=Path, default=Path("bundles/benchmarks"), help="where they are made"
    )
    parser.add_argument("--rate", type=float, help=f"requests/s (default: {share:g} x capacity)")
    parser.add_argument("--deadline-ms", type=float, default=30.0, help="default %(default)s")
    parser.add_argument("--pool", type=int, default=200, help="requests (default %(default)s)")
    parser.add_argument("--candidates", type=int, default=100, help="default %(default)s")
    parser.set_defaults(share=share)


@contextmanager
def make_bench(
    options: argparse.Namespace, *, seconds: float, slow_clients: int
) -> Iterator[Bench]:
    """Compute what must be answered, measure the capacity, and yield the bench.

    Raises ValueError for impossible flags, ChaosError or BundleError where it cannot be.
    """
    numbers = {"--seconds": seconds, "--deadline-ms": options.deadline_ms}
    if options.rate is not None:
        numbers["--rate"] = options.rate
    for flag, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{flag} must be positive and finite, got {value:g}")
    for flag, count in {"--pool": options.pool, "--candidates": options.candidates}.items():
        if count < 1:
            raise ValueError(f"{flag} must be at least 1, got {count}")
    served, other = _bundles(options)
    version = read_manifest(served).model_version
    if read_manifest(other).model_version == version:
        raise ChaosError(f"{served} and {other} are both version {version}")
    with tempfile.TemporaryDirectory(prefix="mneme-chaos-") as name:
        folder = Path(name)
        pool = make_pool(served, options.pool, options.candidates)
        expected = (expect(served, pool, folder), expect(other, pool, folder))
        checkpoint = served.parent / _CHECKPOINT
        bench = Bench(
            bundles=(served, other),
            expected=expected,
            checkpoint=checkpoint if checkpoint.exists() else None,
            pool=pool,
            folder=folder,
            capacity=math.nan,
            rate=options.rate or math.nan,
            seconds=seconds,
            deadline_ms=options.deadline_ms,
            slow_clients=slow_clients,
        )
        capacity = _capacity(bench)
        bench = replace(bench, capacity=capacity, rate=options.rate or options.share * capacity)
        sys.stdout.write(f"capacity {capacity:.0f} requests/s, load {bench.rate:.0f}\n")
        sys.stdout.flush()
        yield bench


def _bundles(options: argparse.Namespace) -> tuple[Path, Path]:
    if not options.bundle:
        return (
            make_bundle("imn-3p-plus", options.bundles),
            make_bundle("imn-3p-plus", options.bundles, seed=2),
        )
    if len(options.bundle) != 2:
        raise ValueError(
            "--bundle is given twice or not at all: one to be served, and another version of it"
        )
    served, other = options.bundle
    return served, other


def _capacity(bench: Bench) -> float:
    with single_store() as store:
        bench.fill(store)
        with bench.serving(store.url) as ours:
            return bench.measured_capacity(ours)
