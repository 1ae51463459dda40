"""The same graph and the same histories behind this service and behind general servers.

Open loop, Poisson arrivals, on one core each for server and load. The figure is the highest rate
at which 99 of 100 requests are answered within the deadline; a refused request counts as one that
was never answered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.benchmarks.overhead import peer_bodies
from loadtest.benchmarks.stand import (
    CANDIDATES,
    histories,
    make_requests,
    pinned,
    service,
    two_cores,
)
from loadtest.bundles import make_bundle, step
from loadtest.open_loop import LoadResult, Target, run_open_loop
from loadtest.peers.install import HEADERS, PEERS, Peer, PeerUnavailableError, ensure_venv, start
from loadtest.rate_search import RateSearch, highest_rate
from loadtest.results import milliseconds, table, write_section

DEADLINE_S = 0.03
_LENGTH = 1000
# Where each search begins; it goes down from there where it must.
_LOWEST = {"rearranged": 32.0, "literal": 4.0}
_HIGHEST = 2000.0
# So many requests tell a p99 from chance; slower servers get less, so that a search ends.
_REQUESTS, _LEAST_S, _MOST_S = 1500, 6.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Race:
    """`rate`: the highest that holds the deadline, requests/s; `half`: at half of it."""

    server: str
    graph: str
    rate: float
    half: LoadResult | None


def run(folder: Path, page: Path, *, peers: Sequence[str], graphs: Sequence[str]) -> None:
    """Let all race with the graphs named; write a section of the results page."""
    bundle = make_bundle("imn-3p-plus", folder, history_length=_LENGTH)
    literal = folder / f"imn-3p-plus-{_LENGTH}" / "literal"
    if "literal" in graphs and not literal.exists():
        step("tests.benchmarks.literal_bundle", bundle.parent / "model.pt", bundle, literal)
    requests = make_requests(bundle)
    served, measuring = two_cores()
    races: list[Race] = []
    notes: list[str] = []

    def record(race: Race) -> None:
        races.append(race)
        print(*_row(race), sep="\t", flush=True)

    with pinned(measuring), histories(bundle, _LENGTH) as redis_url:
        with service(bundle, redis_url, cores=served, threads=1) as ours:
            record(_race("Mneme", "rearranged", ours.target, requests.bodies(), measuring))
        for graph in graphs:
            for peer in PEERS:
                if peer.name not in peers:
                    continue
                try:
                    python = ensure_venv(peer)
                    model = bundle if graph == "rearranged" else literal
                    if peer.model_flag == "--checkpoint":
                        model = bundle.parent / "model.pt"
                    with start(peer, python, model, redis_url, cores=served) as url:
                        record(
                            _race(
                                peer.name,
                                graph if peer.model_flag == "--bundle" else "torch, eager",
                                _target(peer, url),
                                peer_bodies(peer.body, requests),
                                measuring,
                            )
                        )
                except PeerUnavailableError as error:
                    notes.append(f"{peer.name} could not be measured: {error}")
            # What runs a checkpoint knows one graph only.
            peers = [name for name in peers if name != "torch"]
    write_section(
        page,
        title="Peers",
        command="python -m loadtest peers",
        text="\n\n".join([_introduction(), table(_HEADS, [_row(race) for race in races]), *notes]),
        figures=figures(races),
    )


_HEADS = ("server", "graph", "requests/s with p99 <= 30 ms", "p50 ms", "p99 ms", "p99.9 ms")


def _introduction() -> str:
    return (
        f"IMN 3P+, {CANDIDATES} candidates, L = {_LENGTH}, server on one core, Redis and load on "
        "another, open loop with Poisson arrivals. A refused request counts as never answered. "
        "Percentiles are those at half the rate."
    )


def _race(
    server: str, graph: str, target: Target, bodies: Sequence[bytes], cores: Sequence[int]
) -> Race:
    def measure(rate: float) -> LoadResult:
        return run_open_loop(
            target,
            bodies,
            rate=rate,
            duration_s=min(_MOST_S, max(_LEAST_S, _REQUESTS / rate)),
            seed=int(rate * 1000),
            cores=cores,
        )

    found: RateSearch = highest_rate(
        measure,
        holds=holds,
        low=_LOWEST.get(graph, _LOWEST["rearranged"]),
        high=_HIGHEST,
        precision=0.1,
    )
    half = measure(found.rate / 2) if found.rate else None
    return Race(server=server, graph=graph, rate=found.rate, half=half)


def holds(result: LoadResult) -> bool:
    """Return whether 99 of 100 requests were answered within the deadline."""
    return result.percentile_s(99) <= DEADLINE_S


def _target(peer: Peer, url: str) -> Target:
    port = urlsplit(url).port
    assert port is not None
    return Target(host="127.0.0.1", port=port, path=peer.score_path, headers=HEADERS)


def _row(race: Race) -> Sequence[object]:
    percentiles: Callable[[float], str] = lambda q: (  # noqa: E731
        milliseconds(race.half.percentile_s(q)) if race.half else "-"
    )
    return (
        *(race.server, race.graph, f"{race.rate:.1f}"),
        *(percentiles(50), percentiles(99), percentiles(99.9)),
    )


def figures(races: Sequence[Race]) -> dict[str, float]:
    """Return the first one's rate, and its ratio to the best other's on each graph."""
    ours, *others = races
    found = {"peers_rate_mneme": ours.rate}
    for graph, name in (("literal", "literal_graph"), ("rearranged", "same_graph")):
        best = max((other.rate for other in others if other.graph == graph), default=0.0)
        if best:
            found[f"peers_rate_vs_best_peer_{name}"] = ours.rate / best
    return found
