"""What the proofs find: graphs that are not the model."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from torch import nn

from contract.features import FeatureSpec
from exporter.errors import (
    AxisMismatchError,
    ExportError,
    NameMismatchError,
    TypeMismatchError,
    ValueMismatchError,
)
from exporter.parity import (
    example_inputs,
    open_session,
    prove_explanations,
    prove_signature,
    prove_values,
    random_inputs,
)

SPEC = FeatureSpec(history_length=30)


class HalfOfRow(nn.Module):
    """The model that the graphs below compute, or fail to: score = row / 2."""

    def forward(self, _items, _buckets, candidates):
        return candidates.float() * 0.5


def graph(
    path: Path,
    *,
    factor: float = 0.5,
    names: tuple[str, ...] = ("history_items", "history_buckets", "candidate_items"),
    axes: tuple[str | int, ...] = ("B", "L", "C"),
    candidate_type: int = TensorProto.INT64,
    output: str = "scores",
    n_granularities: int = 2,
):
    """Write a graph that multiplies candidates by `factor`, with the signature asked for."""
    b, length, c = axes
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", [names[2]], ["floats"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["floats", "factor"], [output]),
            ],
            "g",
            [
                helper.make_tensor_value_info(names[0], TensorProto.INT64, [b, length]),
                helper.make_tensor_value_info(
                    names[1], TensorProto.INT64, [b, length, n_granularities]
                ),
                helper.make_tensor_value_info(names[2], candidate_type, [b, c]),
            ],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [b, c])],
            [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.save(model, path)
    return open_session(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


class WithWeights(nn.Module):
    """The model that `explain_graph` computes: as HalfOfRow, and every behavior weighs its row."""

    def forward(self, items, _buckets, candidates):
        weights_BCPL = items.float()[:, None, None, :].expand(-1, candidates.shape[1], 2, -1)
        return candidates.float() * 0.5, weights_BCPL


def explain_graph(path: Path, *, factor: float = 0.5, weight: float = 1.0, names=None):
    """Write an explain graph by hand, with two passes; `weight` is what a row is multiplied by."""
    names = names or ("scores", "weights")
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["candidate_items"], ["floats"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["floats", "factor"], [names[0]]),
                helper.make_node("Cast", ["history_items"], ["rows"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["rows", "weight"], ["weighed"]),
                helper.make_node("Unsqueeze", ["weighed", "middle"], ["of_any"]),
                helper.make_node("Unsqueeze", ["floats", "last"], ["of_candidates"]),
                helper.make_node("Mul", ["of_candidates", "nothing"], ["zeros"]),
                helper.make_node("Add", ["of_any", "zeros"], [names[1]]),
            ],
            "g",
            [
                helper.make_tensor_value_info("history_items", TensorProto.INT64, ["B", "L"]),
                helper.make_tensor_value_info("history_buckets", TensorProto.INT64, ["B", "L", 2]),
                helper.make_tensor_value_info("candidate_items", TensorProto.INT64, ["B", "C"]),
            ],
            [
                helper.make_tensor_value_info(names[0], TensorProto.FLOAT, ["B", "C"]),
                helper.make_tensor_value_info(names[1], TensorProto.FLOAT, ["B", "C", 2, "L"]),
            ],
            [
                helper.make_tensor("factor", TensorProto.FLOAT, [], [factor]),
                helper.make_tensor("weight", TensorProto.FLOAT, [], [weight]),
                helper.make_tensor("nothing", TensorProto.FLOAT, [2, 1], [0.0, 0.0]),
                helper.make_tensor("middle", TensorProto.INT64, [2], [1, 2]),
                helper.make_tensor("last", TensorProto.INT64, [2], [2, 3]),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.save(model, path)
    return open_session(path)


class TestExplanations:
    def test_those_of_the_model_pass(self, path):
        session = explain_graph(path.with_name("explain.onnx"))
        prove_signature(session, SPEC, n_passes=2)
        prove_explanations(session, graph(path), WithWeights(), SPEC, n_rows=50)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"factor": 0.6}, "scores differ by", id="scores of another graph"),
            pytest.param({"weight": 1.1}, "weights differ by", id="weights of another model"),
        ],
    )
    def test_others_are_refused(self, path, changes, message):
        session = explain_graph(path.with_name("explain.onnx"), **changes)
        with pytest.raises(ValueMismatchError, match=message):
            prove_explanations(session, graph(path), WithWeights(), SPEC, n_rows=50)

    def test_so_are_other_names_and_passes(self, path):
        named = explain_graph(path, names=("scores", "attention"))
        with pytest.raises(NameMismatchError, match="outputs: the graph has"):
            prove_signature(named, SPEC, n_passes=2)
        with pytest.raises(AxisMismatchError, match="weights: the graph has"):
            prove_signature(explain_graph(path), SPEC, n_passes=3)


def test_a_graph_that_is_the_model_passes(path):
    session = graph(path)
    prove_signature(session, SPEC)
    rows = prove_values(session, HalfOfRow(), SPEC, n_rows=50)
    assert len(rows) == 3 * 3 * 3
    assert all(row.max_difference == 0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"names": ("items", "history_buckets", "candidate_items")},
            NameMismatchError, "inputs: the graph has ('items'", id="input name",
        ),
        pytest.param(
            {"output": "logits"}, NameMismatchError, "outputs: the graph has ('logits',)",
            id="output name",
        ),
        pytest.param(
            {"candidate_type": TensorProto.INT32}, TypeMismatchError,
            "candidate_items: the graph has tensor(int32), expected tensor(int64)", id="type",
        ),
        pytest.param(
            {"axes": (2, "L", "C")}, AxisMismatchError,
            "history_items: the graph has [2, 'L'], expected ['B', 'L']", id="fixed batch",
        ),
        pytest.param(
            {"n_granularities": 1}, AxisMismatchError,
            "history_buckets: the graph has ['B', 'L', 1]", id="granularities",
        ),
    ],
)  # fmt: skip
def test_a_signature_that_differs_has_its_own_error(path, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        prove_signature(graph(path, **changes), SPEC)


@pytest.mark.parametrize("factor", [0.5001, float("nan")], ids=["off", "NaN"])
def test_values_that_differ_are_refused_with_their_shape(path, factor):
    with pytest.raises(ValueMismatchError, match="at B=1, L=1, C=1: scores differ"):
        prove_values(graph(path, factor=factor), HalfOfRow(), SPEC, n_rows=50)


def test_a_file_that_is_no_graph_is_refused(path):
    path.write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"onnxruntime cannot load model\.onnx"):
        open_session(path)


def test_the_grid_holds_empty_full_and_unknown():
    grid = list(example_inputs(FeatureSpec(), 100, np.random.default_rng(0)))
    assert {inputs.history_items.shape[0] for inputs in grid} == {1, 2, 8}
    assert {inputs.history_items.shape[1] for inputs in grid} == {1, 7, 100, 1000}
    assert {inputs.candidate_items.shape[1] for inputs in grid} == {1, 10, 500}
    several = [inputs for inputs in grid if len(inputs.history_items) > 1]
    assert all((inputs.history_items[0] > 0).all() for inputs in several)
    assert all((inputs.history_items[1] == 0).all() for inputs in several)
    assert any((inputs.history_items == 1).any() for inputs in grid)
    assert any((inputs.candidate_items == 1).any() for inputs in grid)


def test_an_empty_catalogue_has_unknown_items_only():
    inputs = random_inputs(SPEC, 2, (4, 10, 5), np.random.default_rng(0))
    assert set(np.unique(inputs.candidate_items)) == {1}
