"""Item popularity."""

import torch

from training.models.popularity import Popularity


def test_the_score_is_the_log_of_the_count():
    model = Popularity(torch.tensor([0, 0, 9, 99]))
    history = torch.zeros(1, 1, dtype=torch.int64)
    scores = model(history, history.unsqueeze(-1), torch.tensor([[3, 2, 1]]))
    torch.testing.assert_close(scores, torch.log(torch.tensor([[100.0, 10.0, 1.0]])))
