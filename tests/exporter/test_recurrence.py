"""Recurrences in a graph: operators of ONNX, of any length."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from contract.features import FeatureSpec
from exporter.convert import convert
from exporter.errors import ExportError
from exporter.parity import open_session, prove_signature, prove_values
from exporter.recurrence import recurrences_as_operators
from training.models.dien import AUGRU

SPEC = FeatureSpec(history_length=30)
N_ROWS = 20


class Reader(nn.Module):
    """Meets the states of every step with the inputs, and the last states with the candidates."""

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.items = nn.Embedding(N_ROWS, 4)
        self.gru = gru

    def forward(self, items, _buckets, candidates):
        inputs = self.items(items)
        states, last = self.gru(inputs)
        user = (states * inputs).mean(dim=1) + last.sum(dim=0)
        return torch.matmul(self.items(candidates), user.unsqueeze(-1)).squeeze(-1)


def reader(**settings: bool | int) -> Reader:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Reader(nn.GRU(4, 4, **{"batch_first": True, **settings}))


@pytest.mark.parametrize(
    ("n_layers", "bias"), [(1, True), (2, False)], ids=["one with a bias", "two without"]
)
def test_every_layer_is_one_operator_and_length_stays_free(tmp_path, n_layers, bias):
    model, path = reader(num_layers=n_layers, bias=bias), tmp_path / "model.onnx"
    convert(model, SPEC, path)
    session = open_session(path)
    prove_signature(session, SPEC)
    prove_values(session, model, SPEC, N_ROWS)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("GRU") == n_layers
    assert not {"Loop", "Scan"} & set(operators)


@pytest.mark.parametrize("settings", [{"bidirectional": True}, {"batch_first": False}], ids=str)
def test_a_gru_that_the_operator_is_not_made_for_is_refused(settings):
    gru = nn.GRU(4, 4, **{"batch_first": True, **settings})
    with recurrences_as_operators(), pytest.raises(ExportError, match="only a GRU of one"):
        gru(torch.zeros(2, 3, 4))


def test_the_reason_reaches_who_exports(tmp_path: Path):
    with pytest.raises(ExportError, match="only a GRU of one direction"):
        convert(reader(bidirectional=True), SPEC, tmp_path / "model.onnx")


def test_a_gru_computes_again_afterwards():
    gru, inputs = nn.GRU(4, 4, batch_first=True), torch.ones(2, 3, 4)
    before, _ = gru(inputs)
    with pytest.raises(KeyError), recurrences_as_operators():
        raise KeyError
    torch.testing.assert_close(gru(inputs)[0], before)
    assert before.any()


class Evolution(nn.Module):
    """Meets the last state of every candidate with the candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(N_ROWS, 4)
        self.augru = AUGRU(4, 4)

    def forward(self, items, _buckets, candidates):
        inputs, targets = self.items(items), self.items(candidates)
        is_behavior = items != 0
        attention = torch.sigmoid(targets @ inputs.transpose(1, 2)) * is_behavior.unsqueeze(1)
        return (self.augru(inputs, attention, is_behavior) * targets).sum(dim=2)


@pytest.mark.parametrize("history_length", [3, 30])
def test_an_augru_is_one_scan_whose_body_is_one_step(tmp_path, history_length):
    """The example that is exported has 3 steps of 3, and 5 of 30: both give the same nodes."""
    torch.manual_seed(0)
    spec = FeatureSpec(history_length=history_length)
    model, path = Evolution(), tmp_path / "model.onnx"
    convert(model, spec, path)
    session = open_session(path)
    prove_signature(session, spec)
    prove_values(session, model, spec, N_ROWS)
    nodes = onnx.load(path).graph.node
    assert "Tanh" not in {node.op_type for node in nodes}
    (scan,) = (node for node in nodes if node.op_type == "Scan")
    (body,) = (attribute.g for attribute in scan.attribute if attribute.name == "body")
    operators = [node.op_type for node in body.node]
    assert operators.count("MatMul") == 3
    assert operators.count("Tanh") == 1
