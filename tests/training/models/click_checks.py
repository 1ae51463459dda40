"""What every click model must keep, whatever it computes between history, candidate and logit.

Models are those of `SPEC` and `N_ROWS` in `inputs`, in evaluation mode.

Shapes: B requests, C candidates, L history length, G time granularities.
"""

from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import GraphProto
from torch import Tensor, nn
from torch.nn import functional

from exporter.convert import convert
from exporter.parity import open_session, prove_signature, prove_values
from tests.training.models.inputs import N_ROWS, SPEC, inputs
from training.models.build import Scorer
from training.tasks import HasTrainingLoss

# Items [B, L], buckets [B, L, G] and candidates [B, C] to one number.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def assert_padding_changes_nothing(model: nn.Module, *, tolerance: float = 1e-6) -> None:
    """A wider row with the same behaviors, or with none, scores the same."""
    items, buckets, candidates = inputs([4, 3, 2, 1, 0], length=4)
    narrow = model(items, buckets, candidates)
    for n_more in (1, SPEC.history_length - 4):
        wider = functional.pad(items, (n_more, 0)), functional.pad(buckets, (0, 0, n_more, 0))
        _assert_same(model(*wider, candidates), narrow, tolerance)


def assert_company_changes_nothing(model: nn.Module, *, tolerance: float = 1e-6) -> None:
    """A request scores the same beside others as alone, and so does each of its candidates."""
    items, buckets, candidates = inputs([12, 3, 0, 8])
    together = model(items, buckets, candidates)
    for c in range(candidates.shape[1]):
        one = model(items, buckets, candidates[:, c : c + 1])
        _assert_same(one, together[:, c : c + 1], tolerance)
    for b in range(len(items)):
        history = items[b : b + 1], buckets[b : b + 1]
        _assert_same(model(*history, candidates[b : b + 1])[0], together[b], tolerance)
        for c in range(candidates.shape[1]):
            alone = model(*history, candidates[b : b + 1, c : c + 1])
            _assert_same(alone[0, 0], together[b, c], tolerance)


def assert_order_of_candidates_is_free(model: nn.Module, *, tolerance: float = 1e-6) -> None:
    """Candidates in another order get their scores in that order."""
    items, buckets, candidates = inputs([12, 3, 0])
    scores = model(items, buckets, candidates)
    order = torch.tensor([3, 0, 4, 2, 1])
    _assert_same(model(items, buckets, candidates[:, order]), scores[:, order], tolerance)


def assert_empty_history_is_finite(model: nn.Module) -> None:
    """Padding alone gives scores that are numbers, at any width."""
    for length in (1, SPEC.history_length):
        assert model(*inputs([0, 0], length=length)).isfinite().all()


def assert_every_parameter_learns(model: nn.Module, loss: Loss | None = None) -> None:
    """One step in training mode gives every parameter a gradient that is finite and not 0.

    `loss`: the model's own where it has one, the logits' squares otherwise, unless said.
    """
    batch = inputs([12] * 8 + [7, 5, 1, 0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (loss or _own_loss(model.train()))(*batch).backward()
    model.eval()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not part of the loss"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert parameter.grad.any(), f"the gradient of {name} is 0"


def assert_exports(model: nn.Module, tmp_path: Path) -> GraphProto:
    """The graph keeps the contract with B, L and C free, scores as the model does, and holds ONNX's
    own operators only.

    It is exported at one length and proven at others, so it has no more nodes for a longer history.
    Returned for further checks.
    """
    path, scorer = tmp_path / "model.onnx", Scorer(model, "probability")
    convert(scorer, SPEC, path)
    session = open_session(path)
    prove_signature(session, SPEC)
    prove_values(session, scorer, SPEC, N_ROWS)
    graph: GraphProto = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    return graph


def operators(graph: GraphProto) -> list[str]:
    """Return the types of a graph's nodes, one a node."""
    return [node.op_type for node in graph.node]


def _own_loss(model: nn.Module) -> Loss:
    def loss(items: Tensor, buckets: Tensor, candidates: Tensor) -> Tensor:
        if isinstance(model, HasTrainingLoss):
            ones = torch.ones(candidates.shape)
            return model.training_loss(items, buckets, candidates, ones, ones)
        squares: Tensor = model(items, buckets, candidates).square().sum()
        return squares

    return loss


def _assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
