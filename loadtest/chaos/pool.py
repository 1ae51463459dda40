"""A fixed pool of requests over fixed histories, and whether an answer to one of them is right.

What each bundle must answer is computed beforehand, by its graph alone (`python -m exporter
score`): no code of the service has a part in it.

Shapes: N requests, C candidates.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from contract.bundle import read_manifest
from contract.golden import GoldenRows
from contract.records import MAX_ITEM, RECORD_BYTES, encode_records
from loadtest.bundles import step
from loadtest.chaos.errors import ChaosError
from loadtest.traffic import read_catalogue

Verdict = Literal["right", "degraded", "wrong"]

_RANKING_TIME = 1_750_000_000
_YEAR_S = 365 * 86_400
# A history that is longer than what the model reads, as a store holds them.
_SURPLUS = 3
# Of the same graph on the same processor, in batches of other shapes; a manifest's own allows for
# other devices.
_TOLERANCE = 1e-4
# Fewer differences between the scores with and without a history than these prove nothing.
_TELLING_SHARE = 0.9
_TELLING_TOLERANCES = 5.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """N requests: `users`, and what stands of each in the history store, `rows.histories`;
    `rows.candidates` int64 [N, C] and `rows.ranking_times` int64 [N]. `rows.scores` mean nothing.
    """

    users: Sequence[str]
    rows: GoldenRows

    def bodies(self) -> list[bytes]:
        """Return the JSON of `POST /score`, one a request."""
        return [
            json.dumps({"user_id": user, "candidates": items, "ranking_time": time}).encode()
            for user, items, time in zip(
                self.users,
                self.rows.candidates.tolist(),
                self.rows.ranking_times.tolist(),
                strict=True,
            )
        ]

    def values(self, prefix: str) -> dict[bytes, bytes]:
        """Return what the history store has to hold, by key."""
        return {
            f"{prefix}:{user}".encode(): raw
            for user, raw in zip(self.users, self.rows.histories, strict=True)
            if raw
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What one bundle must answer to the pool.

    `scores` and `cold` float32 [N, C]: with the histories, and with none. `lengths` int64 [N]:
    behaviors that the model reads. `tolerance`: largest difference of a score, relative above 1.
    """

    version: str
    scores: NDArray[np.float32]
    cold: NDArray[np.float32]
    lengths: NDArray[np.int64]
    tolerance: float


def make_pool(bundle: Path, n: int, candidates: int) -> Pool:
    """Return a pool of `n` requests with known and unknown items, and histories of all lengths."""
    rng = np.random.default_rng(8)
    known = read_catalogue(bundle)
    length = read_manifest(bundle).features.history_length
    histories = []
    for number in range(n):
        # Full ones mostly, which cost the most; every tenth is empty, every fifth of any length.
        n_behaviors = length + _SURPLUS
        if number % 10 == 0:
            n_behaviors = 0
        elif number % 5 == 0:
            n_behaviors = int(rng.integers(1, length + 1))
        times = np.sort(_RANKING_TIME - rng.integers(1, _YEAR_S, n_behaviors))
        histories.append(encode_records(rng.choice(known, n_behaviors), times))
    items_NC = rng.choice(known, (n, candidates))
    items_NC[:, -1] = MAX_ITEM
    return Pool(
        users=[f"pool-{number}" for number in range(n)],
        rows=GoldenRows(
            histories=histories,
            ranking_times=np.full(n, _RANKING_TIME, dtype=np.int64),
            candidates=items_NC,
            scores=np.zeros((n, candidates), dtype=np.float32),
        ),
    )


def expect(bundle: Path, pool: Pool, folder: Path) -> Expected:
    """Compute what a bundle must answer, with files in `folder`.

    Raises BundleError, and ChaosError where histories hardly change the scores: a wrong history
    would not be noticed then.
    """
    manifest = read_manifest(bundle)
    n = len(pool.users)
    empty = [b""] * n
    asked = GoldenRows(
        histories=[*pool.rows.histories, *empty],
        ranking_times=np.tile(pool.rows.ranking_times, 2),
        candidates=np.tile(pool.rows.candidates, (2, 1)),
        scores=np.tile(pool.rows.scores, (2, 1)),
    )
    asked.save(folder / "asked.npz")
    step("exporter", "score", bundle, folder / "asked.npz", folder / "scored.npz")
    scores = GoldenRows.load(folder / "scored.npz").scores
    lengths = [len(raw) // RECORD_BYTES for raw in pool.rows.histories]
    expected = Expected(
        version=manifest.model_version,
        scores=scores[:n],
        cold=scores[n:],
        lengths=np.minimum(lengths, manifest.features.history_length),
        tolerance=_TOLERANCE if manifest.precision == "fp32" else manifest.golden_tolerance,
    )
    _prove_telling(bundle, expected)
    return expected


def _prove_telling(bundle: Path, expected: Expected) -> None:
    has_history = expected.lengths > 0
    differences = np.abs(expected.scores - expected.cold).max(axis=1)[has_history]
    share = float((differences > _TELLING_TOLERANCES * expected.tolerance).mean())
    if not share >= _TELLING_SHARE:
        raise ChaosError(
            f"bundle {bundle}: only {share:.0%} of the requests get other scores with their "
            "history than without: a wrong history would not be noticed"
        )


class Checker:
    """Says whether an answer is what one of the bundles must answer.

    `may_degrade`: whether an answer may say that it was made without the history. `versions`:
    answers that were not wrong, by version; `largest_difference`: of a score in these, relative
    above 1; `reasons`: why the first wrong ones are.
    """

    _KEPT = 5

    def __init__(self, expected: Sequence[Expected], *, may_degrade: bool) -> None:
        self._expected: Mapping[str, Expected] = {one.version: one for one in expected}
        self._may_degrade = may_degrade
        self.versions: Counter[str] = Counter()
        self.largest_difference = 0.0
        self.reasons: list[str] = []

    def check(self, number: int, answer: bytes) -> Verdict:
        """Return the verdict on the body of a 200 to request `number` of the pool."""
        try:
            body = json.loads(answer)
            version, degraded = body["version"], body["degraded"]
            scores = np.array(body["scores"], dtype=np.float64)
            length = body["history_length"]
        except (ValueError, KeyError, TypeError) as error:
            return self._wrong(number, f"not an answer: {error!r}")
        if (expected := self._expected.get(version)) is None:
            return self._wrong(number, f"version {version!r} is none that was published")
        if degraded and not self._may_degrade:
            return self._wrong(number, "degraded, where the policy is to refuse")
        right = (expected.cold if degraded else expected.scores)[number]
        right_length = 0 if degraded else int(expected.lengths[number])
        if length != right_length:
            return self._wrong(number, f"read {length} behaviors, expected {right_length}")
        if scores.shape != right.shape:
            return self._wrong(number, f"{scores.shape} scores, expected {right.shape}")
        differences = np.abs(scores - right) / np.maximum(1.0, np.abs(right))
        difference = float(differences.max())
        if not difference <= expected.tolerance:  # written so that NaN fails too
            return self._wrong(number, f"scores differ by {difference:.2e}")
        self.largest_difference = max(self.largest_difference, difference)
        self.versions[version] += 1
        return "degraded" if degraded else "right"

    def _wrong(self, number: int, reason: str) -> Verdict:
        if len(self.reasons) < self._KEPT:
            self.reasons.append(f"request {number}: {reason}")
        return "wrong"
