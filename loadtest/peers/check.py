"""`python -m loadtest.peers.check BUNDLE CHECKPOINT`: does every peer give the bundle's scores?

Each peer is installed where it is missing, started on a small Redis, and asked by one client and
by 8 at once; its scores are held against those of the bundle's graph for each request alone, with
nothing trimmed and no server between.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from redis import Redis

from contract.bundle import read_catalogue, read_manifest
from contract.encoding import encode
from contract.features import DAY_S
from contract.records import encode_records
from loadtest.peers.install import (
    DEFAULT_FOLDER,
    HEADERS,
    PEERS,
    Peer,
    PeerUnavailableError,
    ensure_venv,
    start,
)
from loadtest.peers.scoring import KEY_PREFIX, onnx_model
from loadtest.redis_server import redis_server

_TOLERANCE = 1e-4
_CLIENTS = 8
_ROUNDS = 10
_REPEATS = 20
_UNKNOWN_ITEM = 2**62


@dataclass(frozen=True, kw_only=True)
class CheckedUser:
    """A request and what must come back."""

    user_id: str
    history: bytes
    candidates: list[int]
    scores: NDArray[np.float32]


def make_users(bundle: Path) -> list[CheckedUser]:
    """Return users whose histories are empty, short, full and overlong, with their scores."""
    manifest = read_manifest(bundle)
    catalogue = read_catalogue(bundle, manifest)
    model = onnx_model(bundle, threads=1)
    rng = np.random.default_rng(0)
    items = np.append(catalogue.item_ids, _UNKNOWN_ITEM)
    now = int(time.time())
    # The middle of a bucket, in hours and in days: no score changes while the check runs.
    elapsed = DAY_S * 3 // 2 * 2 ** np.arange(6)
    users = []
    for u in range(_CLIENTS):
        n = 2 * manifest.features.history_length * u // _CLIENTS
        history = encode_records(rng.choice(items, n), np.sort(now - rng.choice(elapsed, n)))
        candidates = rng.choice(items, 4 + u % 2)
        inputs, _ = encode(
            [history], candidates[None], np.array([now]), catalogue, manifest.features
        )
        (scores_C,) = model(inputs)
        users.append(
            CheckedUser(
                user_id=f"user-{u}",
                history=history,
                candidates=candidates.tolist(),
                scores=scores_C,
            )
        )
    return users


def largest_difference(peer: Peer, url: str, users: Sequence[CheckedUser]) -> float:
    """Return the largest difference of a score, asked one by one and all at once."""
    with (
        httpx.Client(base_url=url, headers=HEADERS, timeout=30.0) as client,
        ThreadPoolExecutor(_CLIENTS) as pool,
    ):

        def difference(user: CheckedUser) -> float:
            body = peer.body(user.user_id, user.candidates)
            answer = client.post(peer.score_path, content=body)
            for _ in range(_REPEATS):
                # BentoML refuses what it cannot do within its latency; a check is in no hurry.
                if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                    break
                time.sleep(0.1)
                answer = client.post(peer.score_path, content=body)
            scores = np.array(peer.scores(answer.raise_for_status().content))
            return float(np.abs(scores - user.scores).max())

        alone = [difference(user) for user in users]
        together = pool.map(difference, [*users] * _ROUNDS)
        return max(*alone, *together)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each peer; return 0 when every peer that runs here is right."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.peers.check", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path, help="what the bundle was exported from")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS])
    options = parser.parse_args(arguments)
    users = make_users(options.bundle)
    wrong = 0
    with redis_server() as redis_url, Redis.from_url(redis_url) as redis:
        for user in users:
            redis.set(f"{KEY_PREFIX}:{user.user_id}", user.history)
        for peer in PEERS:
            if options.peers and peer.name not in options.peers:
                continue
            model = options.bundle if peer.model_flag == "--bundle" else options.checkpoint
            try:
                python = ensure_venv(peer, options.folder)
                with start(peer, python, model, redis_url) as url:
                    difference = largest_difference(peer, url, users)
            except PeerUnavailableError as error:
                print(f"{peer.name}: unavailable: {error}", flush=True)
            except httpx.HTTPError as error:
                print(f"{peer.name}: failed: {error}", flush=True)
                wrong += 1
            else:
                is_right = difference <= _TOLERANCE
                wrong += not is_right
                verdict = "ok" if is_right else "wrong"
                print(
                    f"{peer.name}: {verdict}, scores differ by up to {difference:.1e}", flush=True
                )
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
