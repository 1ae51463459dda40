"""A bundle, checked and loaded onto a device.

Shapes: B requests, C candidates.
"""

import logging
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from contract.bundle import (
    EXPLAIN,
    GOLDEN,
    INPUT_NAMES,
    MODEL,
    OUTPUT_NAME,
    WEIGHTS_NAME,
    Manifest,
    read_catalogue,
    read_manifest,
    verify_files,
)
from contract.catalogue import Catalogue
from contract.encoding import ModelInputs, encode
from contract.errors import BundleError
from contract.golden import GoldenRows
from service.device import CpuDevice, CudaDevice, ExplainGraph, Provider, is_out_of_memory
from service.logs import log_event
from service.shapes import Shape, ShapeGrid, shape_grid

_log = logging.getLogger(__name__)

# A CUDA graph is captured in the second or third run of its shape, and replayed from then on.
_WARM_RUNS = 4

# Scores float32 [B, C] and weights float32 [B, C, P, L] of inputs, wherever they lie.
Explain = Callable[[ModelInputs], tuple[NDArray[np.float32], NDArray[np.float32]]]


class Model(Protocol):
    """What the scorer needs of a model; a test's model need not be a network.

    `shapes`: what batches are padded to. `explain`: None where the bundle cannot; called by the
    same thread as `run`.
    """

    manifest: Manifest
    catalogue: Catalogue
    shapes: ShapeGrid
    explain: Explain | None

    def inputs(self, shape: Shape) -> ModelInputs:
        """Return arrays of zeros of the shape, to be filled and run before the next call."""

    def run(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Return scores float32 [B, C]. Called by one thread at a time."""

    def warm_up(self, max_work: int) -> list[tuple[int, float]]:
        """Run the shapes that will be served; return (work, seconds) of each."""


class OnnxModel:
    """A bundle on one device. Raises BundleError when anything about it does not hold."""

    def __init__(self, folder: Path, *, provider: Provider = "cpu", threads: int = 0) -> None:
        _refuse_two_runtimes()
        self.folder = folder
        self.manifest = read_manifest(folder)
        verify_files(folder, self.manifest)
        self.catalogue = read_catalogue(folder, self.manifest)
        golden = GoldenRows.load(folder / GOLDEN)
        features = self.manifest.features
        self.shapes = shape_grid(provider, features.history_length)
        graph, granularities = folder / MODEL, len(features.granularities)
        self._device: CpuDevice | CudaDevice = (
            CpuDevice(graph, threads=threads, granularities=granularities)
            if provider == "cpu"
            else CudaDevice(graph, precision=self.manifest.precision, granularities=granularities)
        )
        self.inputs = self._device.inputs
        self.run = self._device.run
        self._check_signature()
        self._check_golden(golden)
        self.explain: Explain | None = None
        if self.manifest.explains:
            self._explain_graph = ExplainGraph(folder / EXPLAIN, threads=threads)
            self._check_explain_graph(golden)
            self.explain = self._explain_graph.run

    def warm_up(self, max_work: int) -> list[tuple[int, float]]:
        """Run shapes of at most `max_work`; return (work, median seconds) of each.

        On a GPU these are all shapes, and each is captured as a CUDA graph; a CPU has nothing to
        keep, and a few shapes tell what a batch costs. Shapes of several requests for which there
        is no memory are left out: such batches are run as they are, or in parts. Raises BundleError
        where there is none for a single request.
        """
        shapes = list(self.shapes.shapes(max_work))
        if isinstance(self._device, CpuDevice):
            corners = {
                self.shapes.round_up(batch, candidates, length)
                for batch in (1, 4)
                for candidates in (1, 100)
                for length in (1, self.manifest.features.history_length)
            }
            shapes = [shape for shape in shapes if shape in corners]
        took: list[tuple[int, float]] = []
        left_out: list[Shape] = []
        for shape in shapes:
            try:
                took.append((shape.work, self._warm(shape)))
            except Exception as error:  # onnxruntime's errors share no base class but Exception
                if not is_out_of_memory(error):
                    raise
                if shape.batch == 1:
                    raise BundleError(
                        f"bundle {self.folder}: the device has no memory for one request of "
                        f"{shape.candidates:,} candidates and {shape.length:,} behaviors: {error}"
                    ) from error
                left_out.append(shape)
                if isinstance(self._device, CudaDevice):
                    self._device.forget(shape)
        if left_out:
            log_event(
                _log,
                logging.WARNING,
                "shapes-left-out",
                bundle=str(self.folder),
                shapes=len(left_out),
                smallest_work=min(shape.work for shape in left_out),
            )
        return took

    def _warm(self, shape: Shape) -> float:
        if isinstance(self._device, CudaDevice):
            self._device.capture(shape)
        taken_s = []
        for _ in range(_WARM_RUNS):
            started = time.perf_counter()
            self.run(self.inputs(shape))
            taken_s.append(time.perf_counter() - started)
        return statistics.median(taken_s[1:])

    def _check_signature(self) -> None:
        n_granularities = len(self.manifest.features.granularities)
        expected = [
            (INPUT_NAMES[0], "tensor(int64)", 2, None),
            (INPUT_NAMES[1], "tensor(int64)", 3, n_granularities),
            (INPUT_NAMES[2], "tensor(int64)", 2, None),
            (OUTPUT_NAME, "tensor(float)", 2, None),
        ]
        session = self._device.session
        nodes = [*session.get_inputs(), *session.get_outputs()]
        found = [
            (node.name, node.type, len(node.shape), node.shape[2] if len(node.shape) > 2 else None)
            for node in nodes
        ]
        if found != expected:
            raise BundleError(
                f"bundle {self.folder}: {MODEL} has (name, type, axes, granularities) {found}, "
                f"expected {expected}"
            )

    def _check_golden(self, golden: GoldenRows) -> None:
        """Score the golden rows on this very device, in the way requests are, and compare.

        On a GPU more than once: the first runs capture a CUDA graph, the last one replays it.
        """
        try:
            encoded, _ = encode(
                golden.histories,
                golden.candidates,
                golden.ranking_times,
                self.catalogue,
                self.manifest.features,
            )
            batch, candidates = encoded.candidate_items.shape
            shape = Shape(batch, candidates, encoded.history_items.shape[1])
            if isinstance(self._device, CudaDevice):
                self._device.capture(shape)
            for _ in range(_WARM_RUNS):
                inputs = self.inputs(shape)
                for array, values in zip(
                    inputs.as_feed().values(), encoded.as_feed().values(), strict=True
                ):
                    array[:] = values
                scores_BC = self.run(inputs)
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise BundleError(
                f"bundle {self.folder}: {MODEL} cannot score {GOLDEN}: {error}"
            ) from error
        self._compare(MODEL, scores_BC, golden)

    def _check_explain_graph(self, golden: GoldenRows) -> None:
        """Expect the signature of the contract, and the golden scores once more."""
        inputs = [
            (name, "tensor(int64)", axes) for name, axes in zip(INPUT_NAMES, (2, 3, 2), strict=True)
        ]
        outputs = [(OUTPUT_NAME, "tensor(float)", 2), (WEIGHTS_NAME, "tensor(float)", 4)]
        session = self._explain_graph.session
        nodes = [*session.get_inputs(), *session.get_outputs()]
        found = [(node.name, node.type, len(node.shape)) for node in nodes]
        if found != [*inputs, *outputs]:
            raise BundleError(
                f"bundle {self.folder}: {EXPLAIN} has (name, type, axes) {found}, expected "
                f"{[*inputs, *outputs]}"
            )
        try:
            encoded, _ = encode(
                golden.histories,
                golden.candidates,
                golden.ranking_times,
                self.catalogue,
                self.manifest.features,
            )
            scores_BC, _ = self._explain_graph.run(encoded)
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            raise BundleError(
                f"bundle {self.folder}: {EXPLAIN} cannot score {GOLDEN}: {error}"
            ) from error
        self._compare(EXPLAIN, scores_BC, golden)

    def _compare(self, name: str, scores_BC: NDArray[np.float32], golden: GoldenRows) -> None:
        difference_BC = np.abs(scores_BC - golden.scores)
        tolerance = self.manifest.golden_tolerance * np.maximum(1.0, np.abs(golden.scores))
        if not (difference_BC <= tolerance).all():  # written so that NaN fails too
            raise BundleError(
                f"bundle {self.folder}: {name} differs from {GOLDEN} by up to "
                f"{difference_BC.max():.2e}, allowed are {self.manifest.golden_tolerance:.0e}"
            )


def _refuse_two_runtimes() -> None:
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(found) > 1:
        raise BundleError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "uninstall both, then install one"
        )


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
