"""What a measurement ran on."""

import datetime
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe_machine() -> str:
    """Return date, processor, cores and the versions that matter, as one line."""
    with Path("/proc/cpuinfo").open() as file:
        model = next((line.partition(":")[2].strip() for line in file if "model name" in line), "?")
    versions = [f"{name} {_version(name)}" for name in ("torch", "onnxruntime", "numpy")]
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"{today}, {model}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{', '.join(versions)}"
    )


def yardstick_s() -> float:
    """Return the seconds of two million additions in Python, the best of three.

    Machines that are shared change their speed by half from one hour to the next: figures of
    different runs can only be compared beside this.
    """
    return min(_additions_s() for _ in range(3))


def _additions_s() -> float:
    started = time.perf_counter()
    total = 0
    for number in range(2_000_000):
        total += number * number
    return time.perf_counter() - started


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
