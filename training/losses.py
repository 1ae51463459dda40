"""Losses of next-item models: a target against the catalogue, or against a sample of it.

Shapes: N targets, D embedding width, R catalogue rows, S shared negatives, K negatives a target,
B rows of the batch, L history length.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from contract.catalogue import FIRST_ROW, PADDING_ROW
from training.config import NextItemConfig
from training.errors import ConfigError

_NEVER = float("-inf")
_BLOCK_ROWS = 256
_BLOCK_ROWS_GPU = 8192


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a batch learns: `vectors` [N, D] of users, the `rows` int64 [N] that they are to find
    and the row of the batch that each comes from, `origins` int64 [N]; `own` int64 [B, L'] holds
    the catalogue rows that a row of the batch is made of.
    """

    vectors: Tensor
    rows: Tensor
    origins: Tensor
    own: Tensor


class NextItemLoss:
    """The loss that a run asks for.

    `item_counts`: int64 [R], behaviors of each row in the training part. All losses are sums over
    the targets, in nats. Raises ConfigError for a catalogue without items.
    """

    def __init__(self, config: NextItemConfig, item_counts: Tensor) -> None:
        if len(item_counts) <= FIRST_ROW:
            raise ConfigError("the training part holds no item to learn")
        self.config = config
        # An item of the catalogue that was shown but never chosen keeps one share.
        weights_R = item_counts.double().clamp(min=1)
        weights_R[:FIRST_ROW] = 0
        if config.negatives == "uniform":
            weights_R = (weights_R > 0).double()
        self._share_R = weights_R / weights_R.sum()
        self._cumulative_R = torch.cumsum(self._share_R, dim=0)

    def __call__(self, targets: Targets, item_table_RD: Tensor) -> Tensor:
        """Return the summed loss of all targets."""
        match self.config.loss:
            case "softmax":
                return softmax_loss(targets, item_table_RD)
            case "sampled_softmax":
                negatives_S = self._shared_negatives(targets.rows)
                share_R = self._share_R.to(targets.rows.device) if self.config.logq else None
                return sampled_softmax_loss(
                    targets,
                    item_table_RD,
                    negatives_S,
                    share_R=share_R,
                    exclude_own=self.config.exclude_own,
                )
            case "bce" | "bpr":
                negatives_NK = self._draw(
                    (len(targets.rows), self.config.n_negatives), targets.rows.device
                )
                pairwise = bce_loss if self.config.loss == "bce" else bpr_loss
                return pairwise(
                    targets, item_table_RD, negatives_NK, exclude_own=self.config.exclude_own
                )

    def _shared_negatives(self, targets_N: Tensor) -> Tensor:
        n_negatives = self.config.n_negatives
        if self.config.negatives == "in-batch":
            order = torch.randperm(len(targets_N), device=targets_N.device)
            return targets_N[order[:n_negatives]]
        return self._draw((n_negatives,), targets_N.device)

    def _draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return draw_rows(self._cumulative_R, shape, device)


def draw_rows(cumulative_R: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return rows of the catalogue, int64 of `shape`; `cumulative_R`: sums of their shares."""
    tickets = torch.rand(shape, dtype=torch.float64, device=device)
    rows = torch.searchsorted(cumulative_R.to(device), tickets, right=True)
    return rows.clamp(FIRST_ROW, len(cumulative_R) - 1)


def softmax_loss(targets: Targets, item_table_RD: Tensor) -> Tensor:
    """Return the cross-entropy over the whole catalogue; padding is no item."""
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        targets.vectors, item_table_RD[PADDING_ROW + 1 :], targets.rows - (PADDING_ROW + 1)
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_n -log softmax(x_n W^T)[y_n], a block of rows at a time, with gradients on the way.

    The logits of all rows at once would be the largest tensor of a training step by far, and going
    over it again and again its largest cost; a block stays in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, vectors_ND: Tensor, table_RD: Tensor, rows_N: Tensor) -> Tensor:
        # Products may be of fewer bits, as autocast says; sums and exponentials are float32.
        device = vectors_ND.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else table_RD.dtype
        )
        block_rows = _BLOCK_ROWS if device == "cpu" else _BLOCK_ROWS_GPU
        factor_RD = table_RD.to(dtype)
        loss = torch.zeros((), dtype=table_RD.dtype, device=table_RD.device)
        vectors_grad = torch.empty_like(vectors_ND)
        table_grad = torch.zeros_like(table_RD)
        for first in range(0, len(vectors_ND), block_rows):
            block = slice(first, first + block_rows)
            vectors, rows_K1 = vectors_ND[block].to(dtype), rows_N[block, None]
            logits = (vectors @ factor_RD.T).to(table_RD.dtype)
            log_sum_K1 = logits.logsumexp(dim=1, keepdim=True)
            loss += (log_sum_K1 - logits.gather(1, rows_K1)).sum()
            # What remains is the gradient of the logits: softmax less one at the target.
            gradient = logits.sub_(log_sum_K1).exp_()
            gradient.scatter_add_(1, rows_K1, torch.full_like(rows_K1, -1, dtype=gradient.dtype))
            gradient = gradient.to(dtype)
            vectors_grad[block] = gradient @ factor_RD
            table_grad += gradient.T @ vectors
        ctx.save_for_backward(vectors_grad, table_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        vectors_grad, table_grad = ctx.saved_tensors
        return vectors_grad * scale, table_grad * scale, None


def sampled_softmax_loss(
    targets: Targets,
    item_table_RD: Tensor,
    negatives_S: Tensor,
    *,
    share_R: Tensor | None,
    exclude_own: bool,
) -> Tensor:
    """Return the cross-entropy of each target against the S negatives that the batch shares.

    A negative that is the target itself does not count, nor, with `exclude_own`, one of the row's
    own items. `share_R`: how often each row is drawn; its logarithm is taken from the logits of
    negatives and targets alike (Yi et al., "Sampling-bias-corrected neural modeling", 2019).
    """
    target_N1 = (targets.vectors * item_table_RD[targets.rows]).sum(dim=1, keepdim=True)
    logits_NS = targets.vectors @ item_table_RD[negatives_S].T
    if share_R is not None:
        target_N1 = target_N1 - share_R[targets.rows].log().float().unsqueeze(1)
        logits_NS = logits_NS - share_R[negatives_S].log().float()
    excluded_NS = negatives_S == targets.rows[:, None]
    if exclude_own:
        excluded_NS = excluded_NS | _own(targets, negatives_S, len(item_table_RD))
    logits_NS = logits_NS.masked_fill(excluded_NS, _NEVER)
    log_sum_N = torch.logsumexp(torch.cat([target_N1, logits_NS], dim=1), dim=1)
    return (log_sum_N - target_N1[:, 0]).sum()


def bce_loss(
    targets: Targets, item_table_RD: Tensor, negatives_NK: Tensor, *, exclude_own: bool
) -> Tensor:
    """Return the binary cross-entropy of each target and the mean of that of its K negatives
    (SASRec's loss has K = 1).
    """
    positive_N, negative_NK, kept_NK = _pairs(
        targets, item_table_RD, negatives_NK, exclude_own=exclude_own
    )
    losses_NK = functional.softplus(negative_NK) * kept_NK
    mean_N = losses_NK.sum(dim=1) / kept_NK.sum(dim=1).clamp(min=1)
    return (functional.softplus(-positive_N) + mean_N).sum()


def bpr_loss(
    targets: Targets, item_table_RD: Tensor, negatives_NK: Tensor, *, exclude_own: bool
) -> Tensor:
    """Return -log sigmoid(target - negative), averaged over the negatives (Rendle et al., 2009)."""
    positive_N, negative_NK, kept_NK = _pairs(
        targets, item_table_RD, negatives_NK, exclude_own=exclude_own
    )
    losses_NK = functional.softplus(negative_NK - positive_N[:, None]) * kept_NK
    return (losses_NK.sum(dim=1) / kept_NK.sum(dim=1).clamp(min=1)).sum()


def _pairs(
    targets: Targets, item_table_RD: Tensor, negatives_NK: Tensor, *, exclude_own: bool
) -> tuple[Tensor, Tensor, Tensor]:
    positive_N = (targets.vectors * item_table_RD[targets.rows]).sum(dim=1)
    negative_NK = torch.einsum("nd,nkd->nk", targets.vectors, item_table_RD[negatives_NK])
    kept_NK = negatives_NK != targets.rows[:, None]
    if exclude_own:
        own_BR = _membership(targets.own, len(item_table_RD))
        kept_NK = kept_NK & ~own_BR[targets.origins[:, None], negatives_NK]
    return positive_N, negative_NK, kept_NK


def _own(targets: Targets, negatives_S: Tensor, n_rows: int) -> Tensor:
    """Return whether each shared negative is one of the row's own items, bool [N, S]."""
    own_BS = _membership(targets.own, n_rows)[:, negatives_S]
    return own_BS[targets.origins]


def _membership(own_BL: Tensor, n_rows: int) -> Tensor:
    member_BR = torch.zeros(len(own_BL), n_rows, dtype=torch.bool, device=own_BL.device)
    return member_BR.scatter_(1, own_BL, value=True)
