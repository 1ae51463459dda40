"""The multilayer perceptron that turns user and target vectors into one logit."""

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU between them and one output, the logit."""

    def __init__(self, input_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for hidden_dim in hidden_dims:
            layers += [nn.Linear(input_dim, hidden_dim), nn.ReLU()]
            input_dim = hidden_dim
        self.layers = nn.Sequential(*layers, nn.Linear(input_dim, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [...] of feature vectors [..., input_dim]."""
        logits: Tensor = self.layers(features).squeeze(-1)
        return logits
