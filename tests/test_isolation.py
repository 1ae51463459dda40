"""Parts do not load what they must not need."""

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
