"""Ray Serve with dynamic request batching.

POST /  {"user_id": "4711", "candidates": [1193, 661]}  ->  {"scores": [0.81, 0.07]}
"""

import asyncio
import os

# Ray reads these when it is imported. Both are what its guide to high throughput switches on.
os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray import serve
from starlette.requests import Request as HttpRequest

from loadtest.peers.scoring import (
    MAX_BATCH_SIZE,
    PeerOptions,
    Request,
    bundle_scorer,
    read_options,
)

# Advised: much less than what the model leaves of the latency allowed, here 30 ms. At 0 nothing
# would ever be batched: Ray closes a batch without asking whether the replica is busy.
BATCH_WAIT_TIMEOUT_S = 0.002


class Scores:
    """What Ray's replica process runs."""

    def __init__(self, options: PeerOptions) -> None:
        self._score = bundle_scorer(options)

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_TIMEOUT_S)  # type: ignore[untyped-decorator]
    async def _score_batch(self, requests: list[Request]) -> list[list[float]]:
        # In a thread, so that the event loop goes on to take requests for the next batch.
        scores = await asyncio.to_thread(self._score, requests)
        return [row.tolist() for row in scores]

    async def __call__(self, request: HttpRequest) -> dict[str, list[float]]:
        """Answer one request."""
        body = await request.json()
        return {"scores": await self._score_batch((body["user_id"], body["candidates"]))}


def main() -> None:
    """Serve until ended."""
    options = read_options()
    # One logical CPU: one replica.
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    deployment = serve.deployment(
        # Requests must reach the batch queue to be batched: Ray holds back more than 5 unless told.
        max_ongoing_requests=1000,
        logging_config={"enable_access_log": False},
    )
    serve.run(deployment(Scores).bind(options), blocking=True)


if __name__ == "__main__":
    main()
