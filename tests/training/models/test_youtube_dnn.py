"""YouTube DNN: a mean over behaviors, not over padding."""

import torch

from tests.training.models.inputs import N_ROWS, SPEC, inputs
from training.models.encoder import ItemEncoder
from training.models.youtube_dnn import YouTubeDNN


def model() -> YouTubeDNN:
    torch.manual_seed(0)
    return YouTubeDNN(ItemEncoder(N_ROWS, 6), SPEC, embedding_dim=6, head_units=(8,)).eval()


def test_the_users_vector_is_the_mean_of_the_behaviors():
    network = model()
    items, buckets, candidates = inputs([3], n_candidates=2)
    encoded = network.history(network.items, items, buckets)[0, -3:].mean(dim=0)
    expected = [
        network.head(torch.cat([encoded, network.items(candidate)])) for candidate in candidates[0]
    ]
    torch.testing.assert_close(network(items, buckets, candidates)[0], torch.stack(expected))


def test_padding_contributes_nothing():
    network = model()
    items, buckets, candidates = inputs([4, 2], length=4)
    padded = [
        torch.nn.functional.pad(items, (8, 0)),
        torch.nn.functional.pad(buckets, (0, 0, 8, 0)),
    ]
    torch.testing.assert_close(
        network(*padded, candidates), network(items, buckets, candidates), rtol=1e-6, atol=1e-7
    )


def test_an_empty_history_is_a_finite_score():
    assert model()(*inputs([0])).isfinite().all()
