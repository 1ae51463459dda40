"""Proves that a graph is the model: names, axes, types, then values over a grid of shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from contract.bundle import INPUT_NAMES, OUTPUT_NAME, WEIGHTS_NAME
from contract.catalogue import FIRST_ROW, PADDING_ROW, UNKNOWN_ROW
from contract.encoding import ModelInputs
from contract.features import FeatureSpec
from exporter.errors import (
    AxisMismatchError,
    ExportError,
    NameMismatchError,
    TypeMismatchError,
    ValueMismatchError,
)

VALUE_TOLERANCE = 1e-5
_BATCH_SIZES = (1, 2, 8)
_LENGTHS = (1, 7, 100, 1000)
_CANDIDATES = (1, 10, 500)
# Explanations are asked for few.
_EXPLAINED_CANDIDATES = (1, 20)


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """The largest difference of a score at one shape, in units of the largest score or of 1,
    whichever is more: a score near 0 is a sum of terms as large as the others.
    """

    batch_size: int
    length: int
    n_candidates: int
    max_difference: float


def open_session(path: Path) -> ort.InferenceSession:
    """Return an onnxruntime session on the CPU; ExportError when the graph cannot be loaded."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise ExportError(f"onnxruntime cannot load {path.name}: {error}") from error


def prove_signature(
    session: ort.InferenceSession, spec: FeatureSpec, *, n_passes: int | None = None
) -> None:
    """Raise unless names, axes and element types are those of the contract.

    `n_passes`: of an explain graph, which gives weights beside the scores.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    output_names = (OUTPUT_NAME,) if n_passes is None else (OUTPUT_NAME, WEIGHTS_NAME)
    _prove_equal(NameMismatchError, "inputs", tuple(i.name for i in inputs), INPUT_NAMES)
    _prove_equal(NameMismatchError, "outputs", tuple(o.name for o in outputs), output_names)
    for node in inputs:
        _prove_equal(TypeMismatchError, node.name, node.type, "tensor(int64)")
    for node in outputs:
        _prove_equal(TypeMismatchError, node.name, node.type, "tensor(float)")
    length = "L" if spec.history_length > 1 else 1
    axes = {
        "history_items": ["B", length],
        "history_buckets": ["B", length, len(spec.granularities)],
        "candidate_items": ["B", "C"],
        OUTPUT_NAME: ["B", "C"],
        WEIGHTS_NAME: ["B", "C", n_passes, length],
    }
    for node in (*inputs, *outputs):
        _prove_equal(AxisMismatchError, node.name, list(node.shape), axes[node.name])


def prove_values(
    variant: ort.InferenceSession | nn.Module,
    scorer: nn.Module,
    spec: FeatureSpec,
    n_rows: int,
    *,
    tolerance: float = VALUE_TOLERANCE,
    seed: int = 0,
) -> list[ParityRow]:
    """Compare a graph, or a variant of the model, with the model over a grid of shapes, empty and
    full histories, unknown items; raise ValueMismatchError at the first difference (see
    ParityRow) above `tolerance`.
    """
    rng = np.random.default_rng(seed)
    return [
        _compare(variant, scorer, inputs, tolerance) for inputs in example_inputs(spec, n_rows, rng)
    ]


def prove_explanations(
    graph: ort.InferenceSession,
    scoring_graph: ort.InferenceSession,
    explainer: nn.Module,
    spec: FeatureSpec,
    n_rows: int,
    *,
    tolerance: float = VALUE_TOLERANCE,
) -> None:
    """Raise ValueMismatchError unless an explain graph gives the scores of the scoring graph (see
    ParityRow) and the weights of the model, over a grid of shapes.
    """
    rng = np.random.default_rng(0)
    for inputs in example_inputs(spec, n_rows, rng, candidates=_EXPLAINED_CANDIDATES):
        _compare(graph, scoring_graph, inputs, tolerance)
        (found,) = graph.run([WEIGHTS_NAME], inputs.as_feed())
        with torch.inference_mode():
            _, weights = explainer(*map(torch.from_numpy, inputs.as_feed().values()))
        _prove_close(WEIGHTS_NAME, found, weights.numpy(), inputs, tolerance)


def example_inputs(
    spec: FeatureSpec,
    n_rows: int,
    rng: np.random.Generator,
    *,
    candidates: Sequence[int] = _CANDIDATES,
) -> Iterator[ModelInputs]:
    """Yield random inputs at every shape of the grid."""
    lengths = sorted({min(length, spec.history_length) for length in _LENGTHS})
    for batch_size in _BATCH_SIZES:
        for length in lengths:
            for n_candidates in candidates:
                yield random_inputs(spec, n_rows, (batch_size, length, n_candidates), rng)


def random_inputs(
    spec: FeatureSpec, n_rows: int, shape: tuple[int, int, int], rng: np.random.Generator
) -> ModelInputs:
    """Return inputs of shape (B, L, C): the first history is full, the second empty."""
    batch_size, length, n_candidates = shape
    n_valid_B = rng.integers(0, length, size=batch_size, endpoint=True)
    n_valid_B[0], n_valid_B[1:2] = length, 0
    valid_BL = np.arange(length) >= length - n_valid_B[:, None]
    items_BL = np.where(valid_BL, _rows((batch_size, length), n_rows, rng), PADDING_ROW)
    buckets = [
        np.where(valid_BL, rng.integers(granularity.n_buckets, size=items_BL.shape), 0)
        for granularity in spec.granularities
    ]
    return ModelInputs(
        history_items=items_BL,
        history_buckets=np.stack(buckets, axis=2),
        candidate_items=_rows((batch_size, n_candidates), n_rows, rng),
    )


def _rows(shape: Sequence[int], n_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    known = rng.integers(FIRST_ROW, max(n_rows, FIRST_ROW + 1), size=shape)
    unknown = (rng.random(shape) < 0.1) | (n_rows <= FIRST_ROW)
    return np.where(unknown, UNKNOWN_ROW, known)


def _compare(
    variant: ort.InferenceSession | nn.Module,
    scorer: ort.InferenceSession | nn.Module,
    inputs: ModelInputs,
    tolerance: float,
) -> ParityRow:
    found, expected = _scores(variant, inputs), _scores(scorer, inputs)
    batch_size, length = inputs.history_items.shape
    return ParityRow(
        batch_size=batch_size,
        length=length,
        n_candidates=inputs.candidate_items.shape[1],
        max_difference=_prove_close(OUTPUT_NAME, found, expected, inputs, tolerance),
    )


def _prove_close(
    what: str,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    inputs: ModelInputs,
    tolerance: float,
) -> float:
    """Return the largest difference, relative above 1; ValueMismatchError above `tolerance`."""
    batch_size, length = inputs.history_items.shape
    shape = f"B={batch_size}, L={length}, C={inputs.candidate_items.shape[1]}"
    if found.shape != expected.shape:
        raise ValueMismatchError(f"at {shape}: graph gives {found.shape}, model {expected.shape}")
    difference = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
    if not difference <= tolerance:  # written so that NaN fails too
        raise ValueMismatchError(
            f"at {shape}: {what} differ by {difference:.2e}, allowed are {tolerance:.0e}"
        )
    return difference


def _scores(scorer: ort.InferenceSession | nn.Module, inputs: ModelInputs) -> NDArray[np.float32]:
    feed = inputs.as_feed()
    if isinstance(scorer, nn.Module):
        with torch.inference_mode():
            scores: NDArray[np.float32] = scorer(*map(torch.from_numpy, feed.values())).numpy()
    else:
        (scores,) = scorer.run([OUTPUT_NAME], feed)
    return scores


def _prove_equal(error: type[ExportError], what: str, found: object, expected: object) -> None:
    if found != expected:
        raise error(f"{what}: the graph has {found}, expected {expected}")
