"""Seconds and peak memory to prepare a log, in a process of its own.

python -m tests.benchmarks.prepare LOG
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loadtest.machine import describe_machine


def main() -> None:
    """Print one row."""
    log = Path(sys.argv[1])
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        command = ["training", "prepare", str(log), f"{folder}/log", "--min-interactions", "5"]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", *command], check=True)
        seconds = time.perf_counter() - started
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{log.name}: {seconds:.2f} s, peak {peak_mb:,.0f} MB")


if __name__ == "__main__":
    main()
