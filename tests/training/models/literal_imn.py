"""IMN exactly as in its equations, one step at a time: the reference of the rearranged model.

It takes its weights from an `IterativeMemoryNetwork`, and computes with them what the paper
writes: features of width 4D over the sequence, W1 as one matrix, GRU cells gate by gate.

Shapes: B requests, C candidates, L history length, D embedding width.
"""

import torch
from torch import Tensor, nn

from training.models.imn import IterativeMemoryNetwork, MultiWayAttention


class LiteralIMN(nn.Module):
    """Equations 1-7, with the weights of `model`. Raises ValueError for a model with ablations."""

    def __init__(self, model: IterativeMemoryNetwork) -> None:
        super().__init__()
        if found := ablations(model):
            raise ValueError(
                "the literal IMN is that of the paper's equations, without ablations; "
                f"this model has another {', '.join(found)}"
            )
        self.model = model

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C]."""
        model = self.model
        e = model.history(model.items, history_items, history_buckets)  # [B, L, D]
        valid = (history_items != 0).unsqueeze(1)  # [B, 1, L]
        v = model.items(candidate_items)  # [B, C, D]
        m = v
        for attention in model.attentions:
            assert isinstance(attention, MultiWayAttention)
            w = torch.where(valid, literal_weights(attention, e, m, v), 0.0)  # eq. 2-4
            u = (w.unsqueeze(-1) * e.unsqueeze(1)).sum(dim=2)  # eq. 5: sum over behaviors
            m = literal_gru(model.memory, u, m)  # eq. 6
        u = m
        for transform in model.transforms:  # eq. 7
            assert model.enhancement is not None
            u = literal_gru(model.enhancement, torch.cat([transform(u), v], dim=-1), u)
        logits: Tensor = model.head(torch.cat([u, v], dim=-1))
        return logits


def ablations(model: IterativeMemoryNetwork) -> list[str]:
    """Return the names of the settings, as in `ImnConfig`, that make the model another one."""
    attentions = list(model.attentions)
    multiway = [one for one in attentions if isinstance(one, MultiWayAttention)]
    is_changed = {
        "attention": len(multiway) < len(attentions),
        "weights": any(getattr(one, "weights", "sigmoid") != "sigmoid" for one in attentions),
        "distance": not all(one.distance for one in multiway),
        "walk": model.walk != "iterative",
        "cross": model.start is not None,
        "segment": model.segment > 0,
    }
    return [name for name, changed in is_changed.items() if changed]


def literal_weights(attention: MultiWayAttention, e: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """Return w [B, C, L] = sigmoid(W2 sigmoid(W1 [e - m, e - v, e * m, e * v] + b1) + b2)."""
    e, m, v = e.unsqueeze(1), m.unsqueeze(2), v.unsqueeze(2)
    features = torch.cat([e - m, e - v, e * m, e * v], dim=-1)  # [B, C, L, 4D]
    weights: Tensor = torch.sigmoid(attention.output(torch.sigmoid(attention.hidden(features))))
    return weights.squeeze(-1)


def literal_gru(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    """Return the next state: r, z gates, candidate n, h' = (1 - z) n + z h."""
    x_r, x_z, x_n = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = (h @ cell.weight_hh.T + cell.bias_hh).chunk(3, dim=-1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h
