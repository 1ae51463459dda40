"""Microseconds a request to encode 64 requests of L = 1,000 and C = 100.

python -m tests.benchmarks.encoding
"""

import statistics
import time

import numpy as np

from contract.catalogue import Catalogue
from contract.encoding import encode, stack_candidates
from contract.features import FeatureSpec
from contract.records import encode_records
from loadtest.machine import describe_machine

_NOW = 1_700_000_000
_REQUESTS, _LENGTH, _CANDIDATES, _RUNS = 64, 1000, 100, 50


def main() -> None:
    """Print one row a catalogue size."""
    print(f"{describe_machine()}, B = {_REQUESTS}, L = {_LENGTH}, C = {_CANDIDATES}")
    print(f"{'items':>10}{'median us/request':>20}{'best':>8}")
    rng = np.random.default_rng(0)
    spec = FeatureSpec(history_length=_LENGTH)
    for n_items in (3_000, 100_000, 1_000_000):
        ids = np.unique(rng.integers(1, 2**62, n_items))
        catalogue = Catalogue(ids)
        histories = [
            encode_records(
                rng.choice(ids, _LENGTH), np.sort(_NOW - rng.integers(0, 10**7, _LENGTH))
            )
            for _ in range(_REQUESTS)
        ]
        candidates = stack_candidates([rng.choice(ids, _CANDIDATES) for _ in range(_REQUESTS)])
        times = np.full(_REQUESTS, _NOW)
        taken_us = []
        for _ in range(_RUNS):
            started = time.perf_counter()
            encode(histories, candidates, times, catalogue, spec)
            taken_us.append(1e6 * (time.perf_counter() - started) / _REQUESTS)
        print(f"{n_items:10,}{statistics.median(taken_us):20.1f}{min(taken_us):8.1f}")


if __name__ == "__main__":
    main()
