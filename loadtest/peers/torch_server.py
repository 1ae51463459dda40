"""FastAPI around a torch module, as one writes it first: no batching, no exported graph.

POST /score  {"user_id": "4711", "candidates": [1193, 661]}  ->  {"scores": [0.81, 0.07]}
"""

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel

from contract.encoding import ModelInputs
from loadtest.peers.scoring import BatchScorer, Model, PeerOptions, dummy_model, read_options
from training.checkpoint import TrainedModel, load_model


class ScoreRequest(BaseModel):
    """Candidates to be scored for a user."""

    user_id: str
    candidates: list[int]


class ScoreAnswer(BaseModel):
    """Scores in the order asked."""

    scores: list[float]


def create_app(options: PeerOptions) -> FastAPI:
    """Return the application with its model loaded."""
    trained = load_model(options.model)
    model = dummy_model if options.dummy else _torch_model(trained)
    score_batch = BatchScorer(options.redis_url, trained.catalogue, trained.config.features, model)
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> None:
        """Answer as soon as the model is loaded."""

    # A plain function, as FastAPI advises for work that blocks: it runs in a thread of a pool.
    @app.post("/score")
    def score(request: ScoreRequest) -> ScoreAnswer:
        """Score one request alone."""
        (scores_C,) = score_batch([(request.user_id, request.candidates)])
        return ScoreAnswer(scores=scores_C.tolist())

    return app


def _torch_model(trained: TrainedModel) -> Model:
    scorer = trained.scorer()

    def run(inputs: ModelInputs) -> NDArray[np.float32]:
        tensors = [torch.from_numpy(array) for array in inputs.as_feed().values()]
        with torch.inference_mode():
            scores_BC: NDArray[np.float32] = scorer(*tensors).numpy()
        return scores_BC

    return run


def main() -> None:
    """Serve until ended."""
    options = read_options("--checkpoint")
    torch.set_num_threads(options.threads)
    uvicorn.run(create_app(options), host="127.0.0.1", port=options.port, access_log=False)


if __name__ == "__main__":
    main()
