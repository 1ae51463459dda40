"""Asks a public service whether the locked versions have known vulnerabilities.

    python -m tests.audit

Ends with 1 where one is known, and with 0 where none is, or where the service does not answer: a
machine without it must be able to build. Which of the two it was is said.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LOCK = Path(__file__).parents[1] / "constraints.txt"
_OSV = "https://api.osv.dev/v1/query"
_TIMEOUT_S = 10
# How pip-audit's last line begins when nobody answers, or somebody else does.
_AWAY = ("requests.exceptions.", "pip_audit._service.interface.", "ERROR:pip_audit._cli:OSV")


def audit(lock: Path = LOCK, *, url: str = _OSV) -> tuple[int, str]:
    """Return an exit code and what to say; RuntimeError where pip-audit itself fails."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--no-deps"]
        command += ["--disable-pip", "--progress-spinner", "off", "--timeout", str(_TIMEOUT_S)]
        command += ["--vulnerability-service", "osv", "--osv-url", url]
        command += ["--format", "json", "--output", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if report.exists():
            return _verdict(json.loads(report.read_text())["dependencies"])
    reason = (done.stderr.splitlines() or [""])[-1]
    if reason.startswith(_AWAY):
        return 0, f"dependency audit: SKIPPED, nothing was checked: {reason}"
    raise RuntimeError(f"pip-audit failed:\n{done.stderr}")


def _verdict(dependencies: list[dict[str, Any]]) -> tuple[int, str]:
    skipped = [one["name"] for one in dependencies if "skip_reason" in one]
    if skipped:
        raise RuntimeError(f"pip-audit left out {', '.join(skipped)}")
    found = [
        f"{one['name']} {one['version']}: {flaw['id']}, mended in "
        f"{', '.join(flaw['fix_versions']) or 'no version yet'}: {flaw['description']}"
        for one in dependencies
        for flaw in one["vulns"]
    ]
    if found:
        return 1, "\n".join(["dependency audit: known vulnerabilities", *found])
    return 0, f"dependency audit: none known in {len(dependencies)} locked packages"


if __name__ == "__main__":
    code, text = audit()
    print(text)
    sys.exit(code)
