"""`python -m tests.fuzz` lets a coverage-guided fuzzer (atheris) at what the service decodes.

Prints one JSON object; ends with 1 where there are crashes, whose inputs are kept in `--folder`.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

from tests.fuzz.fuzzing import TARGETS, fuzz

_ROUND = 50_000


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--executions", type=int, default=1_000_000, help="of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="for corpora and crashes; a new one unless said"
    )
    chosen = parser.parse_args()
    folder: Path = chosen.folder or Path(mkdtemp(prefix="mneme-fuzz-"))
    found = {}
    for target in chosen.targets:
        began = time.monotonic()
        executions, rounds = 0, 0
        crashes: list[Path] = []
        while executions < chosen.executions and not crashes:
            # A new process with what the earlier ones have learned: memory stays small.
            run = fuzz(
                target,
                folder / target,
                executions=min(_ROUND, chosen.executions - executions),
                seed=chosen.seed + rounds,
            )
            executions, rounds, crashes = executions + run.executions, rounds + 1, run.crashes
            print(f"{target}: {executions:,} executions", file=sys.stderr)
            if crashes:
                print(run.output, file=sys.stderr)
        found[target] = {
            "executions": executions,
            "crashes": [str(path) for path in crashes],
            "seconds": round(time.monotonic() - began, 1),
        }
    print(json.dumps(found, indent=2))
    return 1 if any(one["crashes"] for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
