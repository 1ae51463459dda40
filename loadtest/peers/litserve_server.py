"""LitServe with dynamic batching.

POST /predict  {"user_id": "4711", "candidates": [1193, 661]}  ->  {"scores": [0.81, 0.07]}
"""

from typing import Any

import litserve
import numpy as np
from numpy.typing import NDArray

from loadtest.peers.scoring import (
    MAX_BATCH_SIZE,
    PeerOptions,
    Request,
    bundle_scorer,
    read_options,
)

# The default: a batch is what is queued when the last one is done, and an idle worker asks its
# queue without pause. With a timeout each request would wait for the end of a window, that opens
# whether or not anybody is there.
BATCH_TIMEOUT_S = 0.0


class ScoreApi(litserve.LitAPI):  # type: ignore[misc]
    """What LitServe's worker process runs."""

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S)
        self._options = options

    def setup(self, device: str) -> None:  # noqa: ARG002  # the name is LitServe's
        """Load the model, in the worker."""
        self._score = bundle_scorer(self._options)

    def decode_request(self, request: dict[str, Any]) -> Request:
        """Take what is asked out of the JSON."""
        return request["user_id"], request["candidates"]

    def batch(self, inputs: list[Request]) -> list[Request]:
        """Leave the stacking to the scorer: requests differ in length."""
        return inputs

    def predict(self, requests: list[Request]) -> list[NDArray[np.float32]]:
        """Score a batch."""
        return self._score(requests)

    def unbatch(self, output: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Return one output for each request."""
        return output

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, list[float]]:
        """Return what becomes the JSON."""
        return {"scores": output.tolist()}


def main() -> None:
    """Serve until ended."""
    options = read_options()
    server = litserve.LitServer(
        ScoreApi(options),
        accelerator="cpu",
        workers_per_device=1,
        fast_queue=True,  # advised above 100 requests a second
    )
    # At this level uvicorn logs no accesses.
    server.run(host="127.0.0.1", port=options.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
