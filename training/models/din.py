"""DIN, the Deep Interest Network (Zhou et al., 2018; sizes as in its authors' code for DIEN).

Shapes: B requests, C candidates, X = B * C, L history length, D embedding width, E = D + 1,
H hidden units of the attention's first layer, F features of the head, U units of one of its layers,
G time granularities.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.models.attention import MASKED
from training.models.encoder import HistoryEncoder, ItemEncoder

Activation = Literal["dice", "prelu", "relu"]
# Slope below 0 before training, as in the authors' code.
PRELU_SLOPE = 0.1


class TargetAttention(nn.Module):
    """Weights of all behaviors for a target (section 4.3, figure 2; the authors' `din_attention`).

    w_j = MLP([e_j, v, e_j - v, e_j * v]), sigmoid between the layers, one linear output.

    `normalise`: a softmax over the behaviors, as in the authors' code. Without it the weights are
    the MLP's outputs, as in the paper: their sum tells how strong the interest is.

    The first layer is rearranged, exactly: with W1 = [W_e, W_v, W_m, W_p],

    W1 [...] + b1 = (W_e + W_m + W_p diag(v)) e_j + ((W_v - W_m) v + b1)

    so that each target costs one H x E matrix, and one matrix product meets the whole history: no
    tensor of width 4D over the sequence is ever made. Every behavior carries a 1 as its last entry,
    which the offset's column meets. The H x E matrix is an affine map of v, and so one matrix
    product too.
    """

    def __init__(self, width: int, units: Sequence[int], *, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = normalise
        self.hidden = nn.Linear(4 * width, units[0])
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(units):
            layers += [nn.Linear(n_in, n_out), nn.Sigmoid()]
        # A softmax sees no constant: a bias before it would never learn.
        self.layers = nn.Sequential(*layers, nn.Linear(units[-1], 1, bias=not normalise))

    def forward(self, behaviors_BLD: Tensor, target_BCD: Tensor, is_behavior_BL: Tensor) -> Tensor:
        """Return the weights [B, C, L]: exactly 0 for padding, and all of an empty history."""
        n_candidates, n_hidden = target_BCD.shape[1], self.hidden.out_features
        behaviors_BLE = torch.cat([behaviors_BLD, is_behavior_BL.unsqueeze(2)], dim=2)
        kernels_BCX = functional.linear(target_BCD, *self._kernel_map())
        kernels_BXE = torch.unflatten(kernels_BCX, 2, (n_hidden, -1)).flatten(1, 2)
        # In place: the product is needed no more, and a second tensor of its size costs much.
        hidden_BLX = (behaviors_BLE @ kernels_BXE.transpose(1, 2)).sigmoid_()
        hidden_BLCH = torch.unflatten(hidden_BLX, 2, (n_candidates, n_hidden))
        scores_BCL: Tensor = self.layers(hidden_BLCH).squeeze(3).transpose(1, 2)
        is_behavior_B1L = is_behavior_BL.unsqueeze(1)
        if not self.normalise:
            return scores_BCL * is_behavior_B1L
        weights_BCL = torch.where(is_behavior_B1L, scores_BCL, MASKED).softmax(dim=2)
        return weights_BCL * is_behavior_B1L

    def _kernel_map(self) -> tuple[Tensor, Tensor]:
        """Return weight [H * E, D] and bias [H * E] of the map from v to the first layer, H x E."""
        of_e_HD, of_v_HD, minus_HD, times_HD = self.hidden.weight.chunk(4, dim=1)
        identity_DD = torch.eye(of_e_HD.shape[1], device=of_e_HD.device).type_as(of_e_HD)
        diagonals_HDD = times_HD.unsqueeze(1) * identity_DD
        weight_HED = torch.cat([diagonals_HDD, (of_v_HD - minus_HD).unsqueeze(1)], dim=1)
        bias_HE = torch.cat([of_e_HD + minus_HD, self.hidden.bias.unsqueeze(1)], dim=1)
        return weight_HED.flatten(0, 1), bias_HE.flatten()


class Dice(nn.Module):
    """y = p x + (1 - p) alpha x, p = sigmoid((x - mean) / sqrt(var + eps)) (equation 4).

    Mean and variance are those of the batch in training, and running averages of them otherwise,
    so that a score depends on nothing beside its own request. Rows that only fill up a batch are
    left out of both.
    """

    EPSILON = 1e-9
    MOMENTUM = 0.01

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, units: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(units))
        self.register_buffer("running_mean", torch.zeros(units))
        self.register_buffer("running_variance", torch.ones(units))

    def forward(self, x_XU: Tensor, is_counted_X: Tensor) -> Tensor:
        """Return [X, U]; `is_counted_X` says which rows the statistics of a batch are of."""
        mean_U, variance_U = self.running_mean, self.running_variance
        if self.training:
            mean_U, variance_U = self._batch_statistics(x_XU, is_counted_X)
        p_XU = torch.sigmoid((x_XU - mean_U) * torch.rsqrt(variance_U + self.EPSILON))
        return x_XU * (self.alpha + (1 - self.alpha) * p_XU)

    def _batch_statistics(self, x_XU: Tensor, is_counted_X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance [U] of the counted rows, after the running ones took them in."""
        x_XU = x_XU.to(self.running_mean.dtype)
        share_X1 = (is_counted_X / is_counted_X.sum().clamp(min=1)).unsqueeze(1)
        mean_U = (x_XU * share_X1).sum(dim=0)
        variance_U = ((x_XU - mean_U).square() * share_X1).sum(dim=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean_U, self.MOMENTUM)
            self.running_variance.lerp_(variance_U, self.MOMENTUM)
        return mean_U, variance_U


class Head(nn.Module):
    """Fully connected layers with an activation of choice between them and one output, the logit.

    With "relu" it is `training.models.head.MLP`. There is no batch norm in front of it, as the
    authors' code has one: it would make a score in training depend on the request's companions.
    """

    def __init__(self, n_features: int, units: Sequence[int], activation: Activation) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in pairwise([n_features, *units])
        )
        self.activations = nn.ModuleList(_activation(activation, n_out) for n_out in units)
        self.output = nn.Linear([n_features, *units][-1], 1)

    def forward(self, features_BCF: Tensor, candidate_items_BC: Tensor) -> Tensor:
        """Return the logits [B, C]; candidates that are padding enter no statistics."""
        is_candidate_X = (candidate_items_BC != PADDING_ROW).flatten()
        x = features_BCF.flatten(0, 1)
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = layer(x)
            x = activation(x, is_candidate_X) if isinstance(activation, Dice) else activation(x)
        logits_X1: Tensor = self.output(x)
        return logits_X1.view_as(candidate_items_BC)


def _activation(activation: Activation, units: int) -> nn.Module:
    match activation:
        case "dice":
            return Dice(units)
        case "prelu":
            return nn.PReLU(units, init=PRELU_SLOPE)
        case "relu":
            return nn.ReLU()


class DIN(nn.Module):
    """logit = MLP([sum_j w_j e_j, v, m, m * v]), m the mean of the behaviors.

    As in the authors' code, but without a user id, and with the mean in place of the sum: the sum
    grows with the history.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        attention_units: Sequence[int],
        head_units: Sequence[int],
        normalise: bool = True,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.items = items
        self.history = HistoryEncoder(spec, embedding_dim)
        self.attention = TargetAttention(embedding_dim, attention_units, normalise=normalise)
        self.head = Head(4 * embedding_dim, head_units, activation)

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        is_behavior_BL = history_items != PADDING_ROW
        history_BLD = self.history(self.items, history_items, history_buckets)
        target_BCD = self.items(candidate_items)
        weights_BCL = self.attention(history_BLD, target_BCD, is_behavior_BL)
        user_BCD = weights_BCL @ history_BLD
        features_BCF = with_mean(user_BCD, target_BCD, history_BLD, is_behavior_BL)
        logits_BC: Tensor = self.head(features_BCF, candidate_items)
        return logits_BC


def with_mean(
    user_BCD: Tensor, target_BCD: Tensor, history_BLD: Tensor, is_behavior_BL: Tensor
) -> Tensor:
    """Return the head's features [user, v, m, m * v], m the mean of the behaviors, 0 of none."""
    n_behaviors_B1 = is_behavior_BL.sum(dim=1, keepdim=True).clamp(min=1)
    mean_BD = history_BLD.sum(dim=1) / n_behaviors_B1
    mean_BCD = mean_BD.unsqueeze(1).expand_as(target_BCD)
    return torch.cat([user_BCD, target_BCD, mean_BCD, mean_BCD * target_BCD], dim=2)
