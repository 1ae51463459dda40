"""NVIDIA Triton with its dynamic batcher and its Python backend, by PyTriton.

    POST /v2/models/scores/infer
    {"inputs": [{"name": "user_id", "datatype": "BYTES", "shape": [1, 1], "data": ["4711"]},
                {"name": "candidates", "datatype": "INT64", "shape": [1, 2], "data": [1193, 661]}]}
    ->  {"outputs": [{"name": "scores", "data": [0.81, 0.07], ...}], ...}

Triton puts only requests with equally many candidates into one batch.
"""

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from loadtest.peers.scoring import MAX_BATCH_SIZE, bundle_scorer, read_options

# Advised: raise it from 0 as far as the latency allowed, here 30 ms, permits.
MAX_QUEUE_DELAY_MICROSECONDS = 5000


def main() -> None:
    """Serve until ended."""
    options = read_options()
    score = bundle_scorer(options)

    @batch  # type: ignore[untyped-decorator]
    def infer(
        user_id: NDArray[np.bytes_], candidates: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        users = [row[0].decode() for row in user_id]
        return {"scores": np.stack(score(list(zip(users, candidates, strict=True))))}

    config = TritonConfig(
        http_address="127.0.0.1", http_port=options.port, allow_grpc=False, allow_metrics=False
    )
    # The default stays behind in the home folder of the user.
    workspace = Path(tempfile.mkdtemp()) / "triton"
    with Triton(config=config, workspace=workspace) as triton:
        triton.bind(
            model_name="scores",
            infer_func=infer,
            inputs=[
                Tensor(name="user_id", dtype=bytes, shape=(1,)),
                Tensor(name="candidates", dtype=np.int64, shape=(-1,)),
            ],
            outputs=[Tensor(name="scores", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH_SIZE,
                batcher=DynamicBatcher(max_queue_delay_microseconds=MAX_QUEUE_DELAY_MICROSECONDS),
            ),
        )
        triton.serve()


if __name__ == "__main__":
    main()
