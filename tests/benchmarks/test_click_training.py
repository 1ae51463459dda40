"""Both sides of the measurement of training are given the same samples, and learn from them."""

import pytest
import torch

from tests.benchmarks.click_training import (
    PEERS,
    Batch,
    figures,
    open_peer,
    our_step,
    our_subject,
    peer_rows,
    random_batch,
)

N_ITEMS, LENGTH = 50, 6


def test_the_peer_gets_one_row_for_each_sample_of_ours_with_the_target_last():
    batch = Batch(
        items=torch.tensor([[0, 2, 3], [4, 5, 6]]),
        buckets=torch.zeros(2, 3, 2, dtype=torch.int64),
        candidates=torch.tensor([[7, 8], [9, 2]]),
        labels=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    )
    labels, fields, mask_NL = peer_rows(batch)
    assert labels["label"].tolist() == [1, 0, 0, 1]
    assert fields["item"].view(4, 4).tolist() == [
        [0, 2, 3, 7],
        [0, 2, 3, 8],
        [4, 5, 6, 9],
        [4, 5, 6, 2],
    ]
    assert mask_NL.tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("n_candidates", [1, 2])
def test_a_batch_has_as_many_samples_and_clicks_whatever_stands_in_a_row(n_candidates):
    spec = our_subject("DIN", n_items=N_ITEMS, length=LENGTH).config.features
    batch = random_batch(spec, n_items=N_ITEMS, n_samples=8, n_candidates=n_candidates)
    assert batch.items.shape == (8 // n_candidates, LENGTH)
    assert batch.labels.numel() == batch.candidates.numel() == 8
    assert batch.labels.sum() == 4
    assert min(batch.items.min(), batch.candidates.min()) >= 2


@pytest.mark.parametrize("name", ["DIN", "IMN-3P"])
def test_a_step_of_ours_learns(name):
    subject = our_subject(name, n_items=N_ITEMS, length=LENGTH)
    spec = subject.config.features
    step = our_step(subject, random_batch(spec, n_items=N_ITEMS, n_samples=8, n_candidates=2))
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_figures_are_ratios_to_the_peer_at_both_numbers_of_candidates():
    rate = {"Mneme DIN": 30.0, "Mneme IMN-3P": 60.0} | {
        f"FuxiCTR {name}": 10.0 * (number + 1) for number, name in enumerate(PEERS)
    }
    found = figures({2: rate, 1: {name: one / 2 for name, one in rate.items()}})
    assert found["training_vs_peer_din"] == found["training_vs_peer_din_c1"] == 3
    assert found["training_vs_peer_imn_over_din"] == 6
    assert found["training_vs_peer_imn_over_twin"] == 3
    assert found["training_mneme_imn_3p_samples_per_s_c1"] == 30


def test_a_folder_without_the_peers_models_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"does not hold DIN, TWIN, SIM: is this FuxiCTR's"):
        open_peer(tmp_path)
