"""Everything but the model: HTTP, Redis and encoding, on one core.

wrk and Redis run on another core. The service's graph is a single gather (item popularity), the
peers answer constants: what is left of a request is the server itself.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.benchmarks.stand import (
    CANDIDATES,
    Requests,
    histories,
    make_requests,
    pinned,
    service,
    two_cores,
)
from loadtest.bundles import make_bundle
from loadtest.open_loop import Target
from loadtest.peers.install import PEERS, PeerUnavailableError, ensure_venv, start
from loadtest.results import milliseconds, table, write_section

CONNECTIONS = (1, 8, 32)
_LENGTH = 1000
_WARM_S, _MEASURED_S = 3, 8
_UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_SCRIPT = """
local bodies = {}
for line in io.lines("%s") do bodies[#bodies + 1] = line end
local n = 0
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["X-Deadline-Ms"] = "1000"
%srequest = function()
  n = n %% #bodies + 1
  return wrk.format(nil, "%s", nil, bodies[n])
end
"""


@dataclass(frozen=True, kw_only=True)
class WrkResult:
    """What wrk says of one run."""

    requests_per_s: float
    p50_s: float
    p99_s: float
    failed: int


def run(folder: Path, page: Path, *, peers: Sequence[str]) -> None:
    """Measure the service and the peers; write a section of the results page."""
    if shutil.which("wrk") is None:
        raise RuntimeError("wrk is not installed: it is in Debian's package wrk")
    bundle = make_bundle("popularity", folder, history_length=_LENGTH)
    requests = make_requests(bundle)
    served, measuring = two_cores()
    rows: list[Sequence[object]] = []
    best: dict[str, float] = {}

    def measure(
        name: str, target: Target, bodies: Sequence[bytes], cpu_s: Callable[[], float]
    ) -> None:
        for connections in CONNECTIONS:
            wrk(target, bodies, connections, _WARM_S)
            cpu_before_s = cpu_s()
            result = wrk(target, bodies, connections, _MEASURED_S)
            cpu_ms = 1000 * (cpu_s() - cpu_before_s) / (result.requests_per_s * _MEASURED_S)
            answered_per_s = result.requests_per_s - result.failed / _MEASURED_S
            best[name] = max(best.get(name, 0.0), answered_per_s)
            row = (
                *(name, connections, f"{result.requests_per_s:,.0f}"),
                f"{cpu_ms:.3f}" if cpu_ms else "",
                *(milliseconds(result.p50_s), milliseconds(result.p99_s), result.failed),
            )
            print(*row, sep="\t", flush=True)
            rows.append(row)

    unavailable = []
    with pinned(measuring), histories(bundle, _LENGTH) as redis_url:
        with service(bundle, redis_url, cores=served, threads=1) as ours:
            measure("Mneme", ours.target, requests.bodies(), ours.cpu_s)
        for peer in PEERS:
            if peer.name not in peers or peer.model_flag != "--bundle":
                continue
            try:
                python = ensure_venv(peer)
                with start(peer, python, bundle, redis_url, dummy=True, cores=served) as url:
                    target = Target(
                        host="127.0.0.1", port=urlsplit(url).port or 0, path=peer.score_path
                    )
                    measure(peer.name, target, peer_bodies(peer.body, requests), lambda: 0.0)
            except PeerUnavailableError as error:
                unavailable.append(f"{peer.name} could not be measured: {error}")
    figures = {"overhead_requests_per_s_per_core": best["Mneme"]}
    rivals = [rate for name, rate in best.items() if name != "Mneme"]
    if rivals:
        figures["overhead_vs_best_peer"] = best["Mneme"] / max(rivals)
    heads = ("server", "connections", "requests/s", "CPU ms/request", "p50 ms", "p99 ms", "failed")
    write_section(
        page,
        title="Overhead",
        command="python -m loadtest overhead",
        text="\n\n".join(
            [
                _introduction(),
                table(heads, rows),
                *unavailable,
            ]
        ),
        figures=figures,
    )


def _introduction() -> str:
    return (
        f"{CANDIDATES} candidates, L = {_LENGTH}, server on one core, wrk and Redis on another, "
        "closed loop. The model is one gather (Mneme) or a constant (peers)."
    )


def peer_bodies(body: Callable[[str, Sequence[int]], bytes], requests: Requests) -> list[bytes]:
    """Return the requests as a peer takes them."""
    return [
        body(user, list(items))
        for user, items in zip(requests.users, requests.candidates, strict=True)
    ]


def wrk(target: Target, bodies: Sequence[bytes], connections: int, seconds: int) -> WrkResult:
    """Run wrk with one thread."""
    with tempfile.TemporaryDirectory(prefix="mneme-wrk-") as folder:
        lines, script = Path(folder) / "bodies", Path(folder) / "script.lua"
        lines.write_bytes(b"\n".join(bodies) + b"\n")
        headers = [f'wrk.headers["{name}"] = "{text}"\n' for name, text in target.headers.items()]
        script.write_text(_SCRIPT % (lines, "".join(headers), target.path))
        url = f"http://{target.host}:{target.port}"
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{seconds}s",
            "--latency",
            "--timeout",
            "10s",
        ]
        done = subprocess.run(
            [*command, "-s", script, url], capture_output=True, text=True, check=True
        )
    return parse_wrk(done.stdout)


def parse_wrk(output: str) -> WrkResult:
    """Read wrk's report."""
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    errors = re.search(r"Socket errors: (.*)", output)
    n_errors = sum(map(int, re.findall(r"\d+", errors[1]))) if errors else 0
    return WrkResult(
        requests_per_s=float(_found(r"Requests/sec:\s+([\d.]+)", output)[1]),
        p50_s=_seconds(_found(r"50%\s+([\d.]+)(us|ms|s)", output)),
        p99_s=_seconds(_found(r"99%\s+([\d.]+)(us|ms|s)", output)),
        failed=(int(failed[1]) if failed else 0) + n_errors,
    )


def _found(pattern: str, output: str) -> "re.Match[str]":
    found = re.search(pattern, output)
    if found is None:
        raise RuntimeError(f"wrk's report has no {pattern}:\n{output}")
    return found


def _seconds(found: "re.Match[str]") -> float:
    return float(found[1]) * _UNIT_S[found[2]]
