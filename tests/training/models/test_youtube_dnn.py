"""YouTube DNN: a mean over behaviors, not over padding."""

import torch

from tests.training.models.click_checks import (
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_order_of_candidates_is_free,
    assert_padding_changes_nothing,
)
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


def test_the_rules_of_click_models_hold():
    network = model()
    assert_padding_changes_nothing(network, tolerance=1e-7)
    assert_company_changes_nothing(network, tolerance=1e-7)
    assert_order_of_candidates_is_free(network, tolerance=1e-7)
    assert_empty_history_is_finite(network)


def test_every_parameter_learns():
    assert_every_parameter_learns(model())


def test_the_graph_is_the_model(tmp_path):
    assert_exports(model(), tmp_path)
