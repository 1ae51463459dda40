"""BentoML with adaptive batching.

    POST /score  {"requests": [{"user_id": "4711", "candidates": [1193, 661]}]}  ->  [[0.81, 0.07]]

A batchable endpoint takes a list. The documentation sets a second service before it, that makes
lists of one; here the client sends the list of one itself, which spares BentoML that hop.
"""

import os
import sys

import bentoml
from pydantic import BaseModel, TypeAdapter

from loadtest.peers.scoring import MAX_BATCH_SIZE, PeerOptions, bundle_scorer, read_options

# The dispatcher estimates when a batch will be done, and refuses what would miss this.
MAX_LATENCY_MS = 30


class ScoreRequest(BaseModel):
    """Candidates to be scored for a user."""

    user_id: str
    candidates: list[int]


# One worker, and one thread that runs batches: as much model as the other servers have.
@bentoml.service(workers=1, threads=1, logging={"access": {"enabled": False}})
class Scores:
    """The service that BentoML's worker process makes."""

    def __init__(self) -> None:
        arguments = vars(bentoml.use_arguments())
        self._score = bundle_scorer(TypeAdapter(PeerOptions).validate_python(arguments))

    @bentoml.api(  # type: ignore[untyped-decorator]
        batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=MAX_LATENCY_MS
    )
    def score(self, requests: list[ScoreRequest]) -> list[list[float]]:
        """Return the scores of each request, in its order."""
        scores = self._score([(request.user_id, request.candidates) for request in requests])
        return [row.tolist() for row in scores]


def main() -> None:
    """Become `bentoml serve`, which starts the worker process."""
    options = read_options()
    arguments = [f"--arg={name}={value}" for name, value in vars(options).items()]
    address = ["--host", "127.0.0.1", "--port", str(options.port)]
    target = "loadtest.peers.bentoml_server:Scores"
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.execv(  # noqa: S606  # no shell is wanted
        sys.executable, [sys.executable, "-m", "bentoml", "serve", target, *address, *arguments]
    )


if __name__ == "__main__":
    main()
