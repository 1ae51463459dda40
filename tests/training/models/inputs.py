"""Small models and random inputs for their tests."""

import torch
from torch import Tensor

from contract.features import FeatureSpec
from training.models.encoder import ItemEncoder
from training.models.imn import IterativeMemoryNetwork

SPEC = FeatureSpec(history_length=12)
N_ROWS = 20


def imn(iterations: int = 3, enhancement_steps: int = 3, seed: int = 0) -> IterativeMemoryNetwork:
    """Return an untrained IMN with weights large enough that every term of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = IterativeMemoryNetwork(
            ItemEncoder(N_ROWS, 6),
            SPEC,
            embedding_dim=6,
            iterations=iterations,
            enhancement_steps=enhancement_steps,
            attention_units=4,
            head_units=(8,),
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.items.items.weight[0].zero_()
    return model.eval()


def inputs(
    lengths: list[int], n_candidates: int = 5, length: int = 12, seed: int = 0
) -> list[Tensor]:
    """Return random model inputs of len(lengths) rows, right-aligned."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), length)
    valid = torch.arange(length) >= length - torch.tensor(lengths).unsqueeze(1)
    items = torch.randint(1, N_ROWS, shape, generator=generator) * valid
    buckets = torch.randint(0, 17, (*shape, 2), generator=generator) * valid.unsqueeze(-1)
    candidates = torch.randint(1, N_ROWS, (len(lengths), n_candidates), generator=generator)
    return [items, buckets, candidates]
