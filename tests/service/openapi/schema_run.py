"""One run of schemathesis against a live service."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.service.live_service import LiveService

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class SchemaRun:
    """`requests`: how many were made; `failures`: a line for each; `output`: all that was said."""

    requests: int
    failures: list[str]
    output: str


def run_schemathesis(service: LiveService, folder: Path, *, examples: int, seed: int) -> SchemaRun:
    """Ask `examples` random requests of each route, beside those that every schema suggests.

    `folder`: for what schemathesis writes. The same seed asks the same.
    """
    report = folder / "report.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli"),
        *("--config-file", str(Path(__file__).with_name("schemathesis.toml")), "run"),
        *(f"{service.client.base_url}/openapi.json", "--seed", str(seed), "-n", str(examples)),
        *("--phases", "examples,coverage,fuzzing", "--continue-on-failure"),
        *("--report", "json", "--report-json-path", str(report)),
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert report.exists(), output
    found = json.loads(report.read_text())
    failures = [json.dumps(one) for one in (*found["failures"], *found["errors"])]
    assert bool(failures) == bool(done.returncode), output
    return SchemaRun(requests=found["test_cases"]["generated"], failures=failures, output=output)
