"""What lower precision does to numbers, and what of it a bundle accepts."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from contract.features import FeatureSpec
from exporter.errors import ExportError
from exporter.parity import open_session
from exporter.precision import (
    aucs_on_test_part,
    emulate,
    halve,
    measured_tolerance,
    round_to_tf32,
)
from training.checkpoint import load_model
from training.data.log import PreparedLog

SPEC = FeatureSpec(history_length=30)
HALF_STEP = 2.0**-11  # half of the distance from 1 to the next number of TF32 and of float16


@pytest.mark.parametrize(
    ("number", "rounded"),
    [
        pytest.param(1 + 2**-10, 1 + 2**-10, id="last kept bit"),
        pytest.param(1 + HALF_STEP, 1.0, id="tie to even, down"),
        pytest.param(1 + 3 * HALF_STEP, 1 + 2**-9, id="tie to even, up"),
        pytest.param(1 + HALF_STEP + 2**-23, 1 + 2**-10, id="above the tie"),
        pytest.param(1 + HALF_STEP - 2**-23, 1.0, id="below the tie"),
        pytest.param(-1 - 3 * HALF_STEP, -1 - 2**-9, id="negative"),
        pytest.param(2 - 2**-23, 2.0, id="carry into the exponent"),
        pytest.param(2.0**-126 * (1 + 3 * HALF_STEP), 2.0**-126 * (1 + 2**-9), id="small"),
        pytest.param(3.4028234663852886e38, math.inf, id="largest float32"),
        pytest.param(-math.inf, -math.inf, id="infinity"),
        pytest.param(0.0, 0.0, id="zero"),
    ],
)
def test_tf32_rounds_to_ten_mantissa_bits(number, rounded):
    assert round_to_tf32(torch.tensor([number])).item() == rounded


def test_not_a_number_stays_so():
    assert round_to_tf32(torch.tensor([math.nan, -math.nan])).isnan().all()


def test_numbers_without_an_order_in_memory_are_rounded():
    numbers = torch.full((2, 3), 1 + HALF_STEP).t()
    assert round_to_tf32(numbers).tolist() == [[1.0, 1.0]] * 3


class Attention(nn.Module):
    """softmax(q k) v of one key, which is v."""

    def forward(self, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(values, values, values)


class ColdCell(nn.Module):
    """A GRU cell in state 0: its state, which is not rounded outside of products, plays no part."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        new_state: Tensor = self.cell(inputs, torch.zeros(len(inputs), 4))
        return new_state


class Einsum(nn.Module):
    """A product that torch composes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("bd,hd->bh", inputs, self.weight)


PRODUCTS = {
    "linear": lambda: nn.Linear(4, 4),
    "linear without bias": lambda: nn.Linear(4, 4, bias=False),
    "bilinear": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Linear(4, 4)),
    "gru cell": ColdCell,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3)),
    "einsum": Einsum,
}


@pytest.mark.parametrize("grad_mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("module", PRODUCTS.values(), ids=PRODUCTS)
def test_the_factors_of_every_product_are_rounded(module, grad_mode):
    torch.manual_seed(1)
    exact, inputs = module(), torch.randn(3, 4)
    expected_of = module()
    expected_of.load_state_dict(
        {
            name: weight if "bias" in name else round_to_tf32(weight)
            for name, weight in exact.state_dict().items()
        }
    )
    with grad_mode():
        found, unrounded = emulate(exact, "tf32")(inputs), exact(inputs)
        expected = expected_of(round_to_tf32(inputs))
    assert torch.equal(found, expected)
    assert not torch.equal(found, unrounded)


@pytest.mark.parametrize("grad_mode", [torch.inference_mode, torch.no_grad])
def test_fused_attention_is_taken_apart(grad_mode):
    with grad_mode():
        found = emulate(Attention(), "tf32")(torch.full((1, 1, 1, 8), 1 + 3 * HALF_STEP))
    assert found.unique().tolist() == [1 + 2**-9]


def test_what_is_added_to_a_product_is_not_rounded():
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.bias, 1 + HALF_STEP)
    assert emulate(layer, "tf32")(torch.zeros(1, 2)).item() == 1 + HALF_STEP


class Sum(nn.Module):
    """A weight plus its input; then the first number is multiplied in place, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 1 + HALF_STEP))

    def forward(self, inputs: Tensor) -> Tensor:
        total = self.weight + inputs
        total[:1].mul_(1 + HALF_STEP)
        return total


@pytest.mark.parametrize("grad_mode", [torch.inference_mode, torch.no_grad])
def test_float16_rounds_weights_and_every_result(grad_mode):
    module = Sum()
    with grad_mode():
        found = emulate(module, "fp16")(torch.tensor([HALF_STEP, 2.0**-10 + HALF_STEP]))
    # The weights are 1 in float16. First: 1 + 2^-11 is 1, and so is 1 * (1 + 2^-11). Second:
    # 1 + 3 * 2^-11 is 1 + 2^-9.
    assert found.tolist() == [1.0, 1 + 2**-9]
    assert module.weight.tolist() == [1 + HALF_STEP] * 2  # the model itself is as it was


def test_float16_overflows():
    assert emulate(nn.ReLU(), "fp16")(torch.tensor([7e4])).item() == math.inf


class Off(nn.Module):
    """Scores that are all `difference` away from 0."""

    def __init__(self, difference: float = 0.0) -> None:
        super().__init__()
        self.difference = difference

    def forward(self, _items: Tensor, _buckets: Tensor, candidates: Tensor) -> Tensor:
        return torch.full(candidates.shape, self.difference)


@pytest.mark.parametrize(
    ("differences", "tolerance"),
    [([1e-5], 1e-3), ([1e-2], 4e-2), ([1e-2, 1e-3], 4e-2), ([1e-3, 1e-2], 4e-2)],
)
def test_the_tolerance_is_four_times_the_largest_difference(differences, tolerance):
    variants = [Off(difference) for difference in differences]
    found = measured_tolerance("fp16", variants, Off(), SPEC, n_rows=50)
    assert found == pytest.approx(tolerance)


@pytest.mark.parametrize("difference", [0.06, math.nan, math.inf])
def test_a_precision_that_is_too_coarse_is_refused(difference):
    with pytest.raises(ExportError, match="fp16 is too coarse for this model: at B=1, L=1, C=1"):
        measured_tolerance("fp16", [Off(difference)], Off(), SPEC, n_rows=50)


def test_an_auc_that_is_not_a_number_is_refused(trained_checkpoint, world_log):
    with pytest.raises(ExportError, match="the AUC is not a number"):
        aucs_on_test_part(
            load_model(trained_checkpoint), PreparedLog(world_log), [Off(), Off(math.nan)]
        )


def test_tables_beside_the_graph_stay_beside_it(tmp_path: Path):
    path = tmp_path / "model.onnx"
    table = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "rows"], ["embedded"]),
            helper.make_node("Relu", ["embedded"], ["scores"]),
        ],
        "g",
        [helper.make_tensor_value_info("rows", TensorProto.INT64, ["B"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 8])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    halve(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size == 600 * 8 * 2
    (scores,) = open_session(path).run(None, {"rows": np.arange(600)})
    np.testing.assert_array_equal(scores, np.maximum(table.astype(np.float16), 0))
    assert scores.dtype == np.float32
