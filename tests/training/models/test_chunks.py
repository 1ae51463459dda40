"""Chunks of a row are counted from its end, after one of nothing."""

import pytest
import torch

from training.models.chunks import in_chunks, one_chunk_later


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_chunks_are_counted_from_the_end_after_an_empty_one(length):
    values = torch.arange(1, length + 1)
    chunks = in_chunks(values.unsqueeze(0), 4)
    assert chunks.shape == (1, -(-length // 4) + 1, 4)
    n_padding = chunks.numel() - length
    assert chunks.flatten().tolist() == [0] * n_padding + values.tolist()


def test_one_chunk_later_starts_with_nothing():
    assert one_chunk_later(torch.tensor([[[1], [2], [3]]])).tolist() == [[[0], [1], [2]]]
    assert one_chunk_later(torch.tensor([[True, True]])).tolist() == [[False, True]]
    assert one_chunk_later(torch.tensor([[7.0]])).tolist() == [[0.0]]
