"""A trained model to an ONNX graph with dynamic B (requests), L (history) and C (candidates)."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from contract.bundle import INPUT_NAMES, OUTPUT_NAME
from contract.features import FeatureSpec
from exporter.errors import ExportError
from exporter.recurrence import recurrences_as_operators

OPSET = 20
# One protobuf message may have 2 GiB; larger tables go into a file beside the graph.
_MAX_EMBEDDED_BYTES = 1 << 30


def convert(
    scorer: nn.Module, spec: FeatureSpec, path: Path, outputs: Sequence[str] = (OUTPUT_NAME,)
) -> None:
    """Write the graph of `scorer` to `path` (and `path`.data, when its tables are large).

    `outputs`: names of what it returns. Raises ExportError when torch cannot convert the model.
    """
    batch, candidates = torch.export.Dim("B", min=1), torch.export.Dim("C", min=1)
    history = {0: batch}
    if spec.history_length > 1:  # torch knows no dynamic axis of one size
        history[1] = torch.export.Dim("L", min=1, max=spec.history_length)
    n_bytes = sum(t.nbytes for t in scorer.state_dict().values())
    try:
        with (
            warnings.catch_warnings(),
            _quiet("torch.onnx"),
            _quiet("onnxscript"),
            _quiet("onnx_ir"),
            recurrences_as_operators(),
            # With gradients, attention may be traced as a kernel that writes its output in another
            # order than the one it is written down as.
            torch.no_grad(),
        ):
            # torch warns of its own deprecations while it exports
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                scorer.eval(),
                _example(spec),
                dynamo=True,
                input_names=INPUT_NAMES,
                output_names=outputs,
                opset_version=OPSET,
                verbose=False,
                dynamic_shapes=(history, history, {0: batch, 1: candidates}),
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"torch cannot export {type(scorer).__name__}: {error}") from error
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    program.save(path, external_data=n_bytes > _MAX_EMBEDDED_BYTES)


def _example(spec: FeatureSpec) -> tuple[Tensor, Tensor, Tensor]:
    # Sizes other than 1: torch takes an axis of 1 for a constant.
    length = min(5, spec.history_length)
    n_granularities = len(spec.granularities)
    return (
        torch.ones(2, length, dtype=torch.int64),
        torch.zeros(2, length, n_granularities, dtype=torch.int64),
        torch.ones(2, 3, dtype=torch.int64),
    )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a logger speak of errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
