"""Who won a race, and by how much."""

import numpy as np
import pytest

from loadtest.benchmarks.race import Race, figures, holds
from loadtest.open_loop import LoadResult


def result(*latencies_s: float) -> LoadResult:
    n = len(latencies_s)
    return LoadResult(
        rate=10.0,
        duration_s=1.0,
        latencies_s=np.array(latencies_s),
        statuses={200: n},
        arrivals_s=np.arange(n, dtype=float),
        send_delays_s=np.zeros(n),
    )


def test_one_in_a_hundred_may_be_late():
    assert holds(result(*[0.01] * 99, 5.0))
    assert not holds(result(*[0.01] * 98, 5.0, 5.0))


def test_a_refused_request_is_a_late_one():
    assert not holds(result(*[0.01] * 98, float("inf"), float("inf")))


def test_the_ratio_is_to_the_best_of_the_same_graph():
    races = [
        Race(server=server, graph=graph, rate=rate, half=None)
        for server, graph, rate in (
            ("Mneme", "rearranged", 200.0),
            ("slow", "rearranged", 50.0),
            ("best", "rearranged", 100.0),
            ("best", "literal", 8.0),
            ("dead", "literal", 0.0),
            ("torch", "torch, eager", 150.0),
        )
    ]
    assert figures(races) == {
        "peers_rate_mneme": 200.0,
        "peers_rate_vs_best_peer_same_graph": pytest.approx(2.0),
        "peers_rate_vs_best_peer_literal_graph": pytest.approx(25.0),
    }


def test_without_a_peer_there_is_no_ratio():
    assert figures([Race(server="Mneme", graph="rearranged", rate=5.0, half=None)]) == {
        "peers_rate_mneme": 5.0
    }
