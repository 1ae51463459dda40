"""What every peer does with a batch of requests: read histories, encode them, run the model.

It is shared, so that a race between servers measures how they queue, batch and speak HTTP, and
nothing else. It runs in each peer's own interpreter: numpy, redis, onnxruntime and `contract`
are all that it needs.

Shapes: B requests, C candidates, L history length.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from redis import Redis

from contract.bundle import MODEL, OUTPUT_NAME, read_catalogue, read_manifest
from contract.catalogue import Catalogue
from contract.encoding import ModelInputs, encode, stack_candidates
from contract.features import FeatureSpec
from contract.records import RECORD_BYTES, check_length

# Peers can only count requests. The service measures work, and on a CPU, where a larger batch of
# IMN saves nothing, makes far smaller ones.
MAX_BATCH_SIZE = 32

KEY_PREFIX = "history"
_DUMMY_SCORE = 0.5

Model = Callable[[ModelInputs], NDArray[np.float32]]
Request = tuple[str, Sequence[int]]  # user id, candidates


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """`model`: folder of a bundle, or file of a checkpoint. `threads`: of the model, on the CPU.
    `dummy`: answer constant scores, so that everything but the model can be measured.
    """

    model: Path
    redis_url: str
    port: int
    threads: int
    dummy: bool


def read_options(model_flag: str = "--bundle") -> PeerOptions:
    """Read the command line that all peers share."""
    parser = argparse.ArgumentParser()
    parser.add_argument(model_flag, dest="model", type=Path, required=True)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dummy", action="store_true")
    return PeerOptions(**vars(parser.parse_args()))


class BatchScorer:
    """Scores a batch. The Redis client connects when it is first needed, and from any thread."""

    def __init__(
        self, redis_url: str, catalogue: Catalogue, spec: FeatureSpec, model: Model
    ) -> None:
        self._redis = Redis.from_url(redis_url)
        self._catalogue = catalogue
        self._spec = spec
        self._model = model

    def __call__(self, requests: Sequence[Request]) -> list[NDArray[np.float32]]:
        """Return the scores float32 [C] of each request. Raises RecordError for no history."""
        histories = self._fetch([user_id for user_id, _ in requests])
        longest = max(len(raw) for raw in histories) // RECORD_BYTES
        inputs, _ = encode(
            histories,
            stack_candidates([np.asarray(items, dtype=np.int64) for _, items in requests]),
            np.full(len(requests), int(time.time()), dtype=np.int64),
            self._catalogue,
            self._spec,
            length=max(longest, 1),
        )
        scores_BC = self._model(inputs)
        return [row[: len(items)] for row, (_, items) in zip(scores_BC, requests, strict=True)]

    def _fetch(self, user_ids: Sequence[str]) -> list[bytes]:
        pipeline = self._redis.pipeline(transaction=False)
        for user_id in user_ids:
            key = f"{KEY_PREFIX}:{user_id}"
            pipeline.getrange(key, -RECORD_BYTES * self._spec.history_length, -1)
        histories: list[bytes] = pipeline.execute()
        for raw in histories:
            check_length(len(raw))
        return histories


def bundle_scorer(options: PeerOptions) -> BatchScorer:
    """Return a scorer for the bundle at `options.model`."""
    manifest = read_manifest(options.model)
    return BatchScorer(
        options.redis_url,
        read_catalogue(options.model, manifest),
        manifest.features,
        dummy_model if options.dummy else onnx_model(options.model, options.threads),
    )


def onnx_model(bundle: Path, threads: int) -> Model:
    """Return the bundle's graph on the CPU, with the session options of the service."""
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        bundle / MODEL, session_options, providers=["CPUExecutionProvider"]
    )

    def run(inputs: ModelInputs) -> NDArray[np.float32]:
        (scores_BC,) = session.run([OUTPUT_NAME], inputs.as_feed())
        return scores_BC  # type: ignore[no-any-return]  # onnxruntime is untyped

    return run


def dummy_model(inputs: ModelInputs) -> NDArray[np.float32]:
    """Return a constant for every candidate."""
    return np.full(inputs.candidate_items.shape, _DUMMY_SCORE, dtype=np.float32)
