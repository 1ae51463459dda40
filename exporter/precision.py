"""Variants of a model for devices that compute faster with fewer bits, and what that costs.

fp32   as trained
tf32   the same graph; the device may round the factors of matrix products to 10 mantissa bits
fp16   weights, and what nodes hand to each other, are float16; sums inside of a node are float32

A CPU does neither: it has no TF32, and onnxruntime runs float16 nodes in float32 there and leaves
the roundings between them out. So both are emulated in torch, with the roundings of the device.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from contract.bundle import Precision
from contract.features import FeatureSpec
from exporter.errors import ExportError, ValueMismatchError
from exporter.parity import prove_values
from training.checkpoint import TrainedModel
from training.data.click_data import open_click_data
from training.data.log import PreparedLog
from training.data.splits import Part
from training.evaluation import evaluate
from training.metrics import auc

# fp32 too: a GPU adds up in another order.
MIN_TOLERANCE = 1e-3
# Largest difference from the fp32 model, of a score (relative above 1), that is exported at all.
MAX_DIFFERENCE = 5e-2
# Devices round a little differently (TF32 units may cut bits off), and random inputs do not meet
# the worst case.
TOLERANCE_FACTOR = 4

_TF32_DROPPED_BITS = 23 - 10
# Carries out one operation of torch: (operation, arguments, keyword arguments) -> result.
_Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

_aten = torch.ops.aten
# Where the factors stand among the arguments; addends are not rounded.
_FACTORS: dict[Any, tuple[int, int]] = {
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.mv: (0, 1),
    _aten.dot: (0, 1),
    _aten.addmm: (1, 2),
    _aten.addmv: (1, 2),
    _aten.addbmm: (1, 2),
    _aten.baddbmm: (1, 2),
    _aten.convolution: (0, 1),
}


def round_to_tf32(numbers: Tensor) -> Tensor:
    """Return float32 numbers rounded to 10 mantissa bits, to nearest, ties to even."""
    bits = numbers.view(torch.int32)
    last_kept_bit = (bits >> _TF32_DROPPED_BITS) & 1
    just_below_half = (1 << (_TF32_DROPPED_BITS - 1)) - 1
    rounded = (bits + just_below_half + last_kept_bit) & -(1 << _TF32_DROPPED_BITS)
    return rounded.view(torch.float32)


def emulate(scorer: nn.Module, precision: Precision) -> nn.Module:
    """Return a module in evaluation mode that scores as a device of that precision does."""
    match precision:
        case "fp32":
            return scorer.eval()
        case "tf32":
            return _Emulation(scorer, _round_factors).eval()
        case "fp16":
            return _Emulation(copy.deepcopy(scorer).half().float(), _round_results).eval()
        case _:
            assert_never(precision)


class _Emulation(nn.Module):
    def __init__(self, scorer: nn.Module, run: _Run) -> None:
        super().__init__()
        self.scorer = scorer
        self._run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        # Attention as plain products, as it stands in the graph: a fused kernel cannot be rounded.
        with sdpa_kernel(SDPBackend.MATH), _Operations(self._run):
            scores: Tensor = self.scorer(*inputs)
            return scores


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Lets `run` carry out every operation, and every part of a composite one.

    In inference mode torch shows `linear` and `gru_cell` whole: their products would go unseen.
    """

    def __init__(self, run: _Run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        return self._run(func, args, kwargs) if result is NotImplemented else result


def _round_factors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation; float32 factors of a product or convolution are rounded to TF32."""
    rounded = list(args)
    for i in _FACTORS.get(func.overloadpacket, ()):
        if args[i].dtype == torch.float32:
            rounded[i] = round_to_tf32(args[i])
    return func(*rounded, **kwargs)


def _round_results(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation; what is float32 in its results is rounded to float16."""
    result = func(*args, **kwargs)
    if func.is_view:  # nothing new to round; and a view of a weight must not be written to
        return result
    # In place: `add_` and its like write into a tensor that others hold.
    return tree_map_only(Tensor, _round_to_float16_, result)


def _round_to_float16_(numbers: Tensor) -> Tensor:
    return numbers.copy_(numbers.half()) if numbers.dtype == torch.float32 else numbers


def halve(path: Path) -> None:
    """Replace a graph by its float16 form; inputs and outputs keep their names and types.

    Tables that lie in a file beside the graph lie there again.
    """
    # By its path: shapes of a graph of more than 2 GiB can be inferred from a file only.
    model = convert_float_to_float16(str(path), keep_io_types=True)
    data = path.with_name(f"{path.name}.data")
    is_external = data.exists()
    data.unlink(missing_ok=True)  # onnx would append to it
    path.unlink()
    onnx.save(model, path, save_as_external_data=is_external, location=data.name)


def measured_tolerance(
    precision: Precision,
    variants: Sequence[nn.Module | ort.InferenceSession],
    scorer: nn.Module,
    spec: FeatureSpec,
    n_rows: int,
) -> float:
    """Return the golden tolerance of a variant: four times the largest difference (relative above
    1) of any of `variants` from `scorer` over the grid of the parity proof, at least 1e-3.

    Raises ExportError where a score differs by more than 5e-2, or is not a number.
    """
    try:
        rows = [
            row
            for variant in variants
            for row in prove_values(variant, scorer, spec, n_rows, tolerance=MAX_DIFFERENCE)
        ]
    except ValueMismatchError as error:
        raise ExportError(f"{precision} is too coarse for this model: {error}") from error
    return max(MIN_TOLERANCE, TOLERANCE_FACTOR * max(row.max_difference for row in rows))


def aucs_on_test_part(
    trained: TrainedModel, log: PreparedLog, scorers: Sequence[nn.Module]
) -> list[float]:
    """Return the AUC of each scorer on the test part of the log that the model was trained on.

    Raises ExportError where it is not a number.
    """
    loader = open_click_data(log, trained.config).loaders[Part.TEST]
    aucs = []
    for scorer in scorers:
        # A scorer has taken its last step: as an "affinity" its score is left as it is.
        evaluation = evaluate(scorer, "affinity", loader, torch.device("cpu"))
        aucs.append(auc(evaluation.labels, evaluation.scores))
    if not np.isfinite(aucs).all():
        raise ExportError(
            "the AUC is not a number: the test part holds one label only, or a score is none"
        )
    return aucs
