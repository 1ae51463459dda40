"""The same graph and the same histories behind this service and behind general servers.

Open loop, Poisson arrivals, on one core each for server and load. The figure is the highest rate
at which 99 of 100 requests are answered within the deadline; a refused request counts as one that
was never answered. Of the literal graph, which alone takes longer than the deadline, peers are
credited with all that they answer when they are saturated, however late.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.benchmarks.overhead import peer_bodies, wrk
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
_LOWEST = 32.0
_HIGHEST = 2000.0
_SATURATING_CONNECTIONS, _SATURATED_S = 4, 15
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
    """Let all race with each of the graphs; write a section of the results page for each."""
    bundle = make_bundle("imn-3p-plus", folder, history_length=_LENGTH)
    for graph in graphs:
        models = {"--bundle": bundle, "--checkpoint": bundle.parent / "model.pt"}
        if graph == "literal":
            models = {"--bundle": _literal_bundle(bundle)}
        races, notes = _races(bundle, models, graph, peers)
        text = [_introduction(graph), table(_HEADS, [_row(race) for race in races]), *notes]
        write_section(
            page,
            title=f"Peers, {graph} graph",
            command=f"python -m loadtest peers --graphs {graph}",
            text="\n\n".join(text),
            figures=figures(races),
        )


def _races(
    bundle: Path, models: Mapping[str, Path], graph: str, peers: Sequence[str]
) -> tuple[list[Race], list[str]]:
    requests = make_requests(bundle)
    served, measuring = two_cores()
    races: list[Race] = []
    notes: list[str] = []
    with pinned(measuring), histories(bundle, _LENGTH) as redis_url:
        with service(bundle, redis_url, cores=served, threads=1) as ours:
            races.append(_race("Mneme", "rearranged", ours.target, requests.bodies(), measuring))
            print(*_row(races[-1]), sep="\t", flush=True)
        for peer in PEERS:
            if peer.name not in peers or peer.model_flag not in models:
                continue
            try:
                python = ensure_venv(peer)
                model = models[peer.model_flag]
                with start(peer, python, model, redis_url, cores=served) as url:
                    target, bodies = _target(peer, url), peer_bodies(peer.body, requests)
                    if graph == "literal":
                        races.append(_saturated(peer.name, target, bodies))
                    else:
                        name = graph if peer.model_flag == "--bundle" else "torch, eager"
                        races.append(_race(peer.name, name, target, bodies, measuring))
                    print(*_row(races[-1]), sep="\t", flush=True)
            except PeerUnavailableError as error:
                notes.append(f"{peer.name} could not be measured: {error}")
    return races, notes


def _literal_bundle(bundle: Path) -> Path:
    literal = bundle.parent / "literal"
    if not literal.exists():
        step("tests.benchmarks.literal_bundle", bundle.parent / "model.pt", bundle, literal)
    return literal


def _saturated(server: str, target: Target, bodies: Sequence[bytes]) -> Race:
    result = wrk(target, bodies, _SATURATING_CONNECTIONS, _SATURATED_S)
    answered = result.requests_per_s - result.failed / _SATURATED_S
    return Race(server=server, graph="literal", rate=max(0.0, answered), half=None)


_HEADS = ("server", "graph", "requests/s with p99 <= 30 ms", "p50 ms", "p99 ms", "p99.9 ms")


def _introduction(graph: str) -> str:
    credit = (
        " Peers with the literal graph: all answers a second when saturated, however late."
        if graph == "literal"
        else ""
    )
    return (
        f"IMN 3P+, {CANDIDATES} candidates, L = {_LENGTH}, server on one core, Redis and load on "
        "another, open loop with Poisson arrivals. A refused request counts as never answered. "
        f"Percentiles are those at half the rate.{credit}"
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
        low=_LOWEST,
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
