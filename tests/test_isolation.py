"""Parts do not load what they must not need."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        (
            "service.__main__",
            [
                *("torch", "training", "exporter", "loadtest", "polars"),
                *("service.tracing", "opentelemetry.sdk.trace"),
            ],
        ),
        ("training.__main__", ["fastapi", "redis", "service", "onnxruntime"]),
        ("exporter.__main__", ["fastapi", "redis", "service"]),
        ("loadtest.__main__", ["torch", "onnxruntime", "service", "training"]),
    ],
)
def test_a_part_loads_only_its_own(module, unwanted):
    program = f"import sys, {module}; print(*sorted(set({unwanted!r}) & set(sys.modules)))"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert loaded == []


@pytest.mark.parametrize("module", ["service.device", "exporter.parity"])
def test_onnxruntime_has_no_thread_that_tells_others_of_what_it_runs(module):
    program = f"import {module}, os; print(len(os.listdir('/proc/self/task')))"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    del environment["ORT_DISABLE_TELEMETRY"]
    n_threads = subprocess.check_output([sys.executable, "-c", program], env=environment)
    assert int(n_threads) == 1
