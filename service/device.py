"""Where a graph runs: onnxruntime on the CPU, or on a GPU with captured CUDA graphs.

Shapes: B requests, C candidates, L history length, G time granularities.
"""

import logging
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from contract.bundle import OUTPUT_NAME, WEIGHTS_NAME, Precision
from contract.encoding import ModelInputs
from contract.errors import BundleError
from service.logs import log_event
from service.shapes import Shape

Provider = Literal["cpu", "cuda"]

_log = logging.getLogger(__name__)
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Sizes are computed on the CPU by design, and stay there: no captured graph runs them again.
_SHAPE_OPERATORS = frozenset(
    {
        *("Add", "Cast", "Concat", "Div", "Equal", "Expand", "Gather", "Mul", "Range", "Reshape"),
        *("Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
    }
)
# Of onnxruntime's own numbers, for a run that is neither captured nor replayed.
_NOT_CAPTURED = -1
# onnxruntime has no type for it: these are the words of its arenas, of C++, CUDA, cuBLAS and cuDNN.
_OUT_OF_MEMORY = re.compile(
    "Failed to allocate memory for requested buffer|is smaller than requested bytes|bad_alloc"
    "|out of memory|ALLOC_FAILED|ALLOCATION_FAILED"
)
_FATAL = 4


class Device(Protocol):
    """Runs one graph. Called by one thread at a time."""

    def inputs(self, shape: Shape) -> ModelInputs:
        """Return arrays of zeros of the shape, to be filled and run before the next call."""

    def run(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Return scores float32 [B, C]."""


class CpuDevice:
    """onnxruntime on `threads` cores; 0 is all of them."""

    def __init__(self, graph: Path, *, threads: int, granularities: int) -> None:
        options = _options()
        options.intra_op_num_threads = threads
        self.session = _open(graph, options, _CPU)
        self._granularities = granularities

    def inputs(self, shape: Shape) -> ModelInputs:
        """Return new arrays."""
        return _new_inputs(shape, self._granularities, lambda axes: np.zeros(axes, dtype=np.int64))

    def run(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Return scores float32 [B, C]."""
        (scores_BC,) = self.session.run([OUTPUT_NAME], inputs.as_feed())
        return scores_BC  # type: ignore[no-any-return]  # onnxruntime is untyped


class ExplainGraph:
    """A bundle's explain graph, on `threads` cores of the CPU wherever its scores are computed: it
    is asked rarely and for few candidates, and a GPU would hold the tables twice.
    """

    def __init__(self, graph: Path, *, threads: int) -> None:
        options = _options()
        options.intra_op_num_threads = threads
        self.session = _open(graph, options, _CPU)

    def run(self, inputs: ModelInputs) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scores float32 [B, C] and weights float32 [B, C, P, L]."""
        scores_BC, weights_BCPL = self.session.run([OUTPUT_NAME, WEIGHTS_NAME], inputs.as_feed())
        return scores_BC, weights_BCPL


class CudaDevice:
    """onnxruntime on a GPU: fixed buffers and one captured CUDA graph for each shape.

    Raises BundleError unless the whole graph is placed on the GPU, but for arithmetic on sizes.
    `precision`: of the bundle; only "tf32" lets the device round the factors of products.
    """

    def __init__(self, graph: Path, *, precision: Precision, granularities: int) -> None:
        options = _options()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider_options = {
            "enable_cuda_graph": "1",
            # onnxruntime's default is TF32: bundles that do not say so have not been checked so.
            "use_tf32": str(int(precision == "tf32")),
        }
        self.session = _open(graph, options, _CUDA, provider_options)
        refuse_compute_off(self.session, _CUDA, graph)
        self._granularities = granularities
        self._graph_ids = count(1)
        self._buffers: dict[Shape, BoundBuffers] = {}
        self._uncaptured: tuple[Shape, BoundBuffers] | None = None

    def capture(self, shape: Shape) -> None:
        """Keep buffers for the shape; its first run captures a CUDA graph, later ones replay it."""
        self._buffers[shape] = BoundBuffers(
            self.session,
            shape,
            self._granularities,
            device="cuda",
            graph_id=next(self._graph_ids),
        )

    def forget(self, shape: Shape) -> None:
        """Give up the buffers of a shape, if there are any; from now on it is run uncaptured."""
        self._buffers.pop(shape, None)

    def inputs(self, shape: Shape) -> ModelInputs:
        """Return the shape's own arrays, in pinned memory where onnxruntime offers it."""
        buffers = self._buffers.get(shape)
        if buffers is None:  # larger than the grid: run as it is
            buffers = self._uncaptured_buffers(shape)
        self._next = buffers
        return buffers.cleared_inputs()

    def _uncaptured_buffers(self, shape: Shape) -> "BoundBuffers":
        # The latest are kept: the blocks of a catalogue come one after the other.
        if self._uncaptured is None or self._uncaptured[0] != shape:
            buffers = BoundBuffers(
                self.session, shape, self._granularities, device="cuda", graph_id=_NOT_CAPTURED
            )
            self._uncaptured = (shape, buffers)
        return self._uncaptured[1]

    def run(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Return scores float32 [B, C] of the arrays that `inputs` gave last."""
        assert inputs is self._next.host_inputs, "run what inputs() returned last"
        return self._next.run()


class BoundBuffers:
    """Input and output of one shape at fixed addresses, bound to a session.

    `device`: where they are; "cpu" binds in the same way. `graph_id`: of the CUDA graph that is
    captured for them.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        shape: Shape,
        granularities: int,
        *,
        device: str,
        graph_id: int,
    ) -> None:
        self._session = session
        self._host: list[ort.OrtValue] = []
        self.host_inputs = _new_inputs(shape, granularities, self._new_host_array)
        self._device = [
            ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), np.int64, device, 0)
            for value in self._host
        ]
        self._scores = ort.OrtValue.ortvalue_from_shape_and_type(
            [shape.batch, shape.candidates], np.float32, device, 0
        )
        self._binding = session.io_binding()
        for name, value in zip(self.host_inputs.as_feed(), self._device, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(OUTPUT_NAME, self._scores)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph_id))

    def cleared_inputs(self) -> ModelInputs:
        """Return the arrays to fill, all zero."""
        for array in self.host_inputs.as_feed().values():
            array.fill(0)
        return self.host_inputs

    def run(self) -> NDArray[np.float32]:
        """Copy the inputs to the device, run, and return a copy of the scores [B, C]."""
        for host, device in zip(self._host, self._device, strict=True):
            device.update_inplace(host)
        self._session.run_with_iobinding(self._binding, self._options)
        (scores_BC,) = self._binding.copy_outputs_to_cpu()
        return np.array(scores_BC, copy=True)

    def _new_host_array(self, axes: tuple[int, ...]) -> NDArray[np.int64]:
        memory = _pinned_memory()
        kwargs: dict[str, Any] = {} if memory is None else {"memory_info": memory}
        value = ort.OrtValue.ortvalue_from_shape_and_type(axes, np.int64, **kwargs)
        self._host.append(value)
        return value.numpy()  # type: ignore[no-any-return]  # a view of the same memory


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a run, or the arrays for it, failed for want of memory."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def refuse_compute_off(session: ort.InferenceSession, provider: str, graph: Path) -> None:
    """Raise BundleError when a node other than arithmetic on sizes is placed elsewhere.

    The session must have been made with `session.record_ep_graph_assignment_info`. What computes
    with the operators of sizes (a table's `Gather`, say) must copy its result to the GPU, and a
    session that captures CUDA graphs refuses copies by itself.
    """
    strays = sorted(
        {
            f"{node.op_type} on {part.ep_name}"
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
            if part.ep_name != provider and node.op_type not in _SHAPE_OPERATORS
        }
    )
    if strays:
        raise BundleError(
            f"bundle {graph.parent}: {graph.name} does not run on {provider} alone: "
            f"{', '.join(strays)}"
        )


def _open(
    graph: Path,
    options: ort.SessionOptions,
    provider: str,
    provider_options: dict[str, str] | None = None,
) -> ort.InferenceSession:
    if provider not in ort.get_available_providers():
        raise BundleError(
            f"bundle {graph.parent}: cannot run on {provider}: this onnxruntime has only "
            f"{', '.join(ort.get_available_providers())}"
        )
    try:
        session = ort.InferenceSession(
            graph, options, providers=[(provider, provider_options or {})]
        )
    except Exception as error:  # onnxruntime's errors share no base class but Exception
        raise BundleError(
            f"bundle {graph.parent}: {graph.name} cannot be loaded for {provider}: {error}"
        ) from error
    # onnxruntime opens a session on the CPU when a GPU's libraries are missing.
    if session.get_providers()[0] != provider:
        raise BundleError(
            f"bundle {graph.parent}: asked for {provider}, got {session.get_providers()}"
        )
    # Nor may it move there when a run fails.
    session.disable_fallback()
    return session


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    # What it has to say of an error, the exception says, too; stderr is for events.
    options.log_severity_level = _FATAL
    return options


def _new_inputs(
    shape: Shape, granularities: int, new: Callable[[tuple[int, ...]], NDArray[np.int64]]
) -> ModelInputs:
    return ModelInputs(
        history_items=new((shape.batch, shape.length)),
        history_buckets=new((shape.batch, shape.length, granularities)),
        candidate_items=new((shape.batch, shape.candidates)),
    )


def _pinned_memory() -> Any:
    """Return onnxruntime's handle of host memory that a GPU reads directly; None without."""
    for device in ort.get_ep_devices():
        if device.ep_name == _CUDA:
            memory = device.memory_info(ort.OrtDeviceMemoryType.HOST_ACCESSIBLE)
            if memory is None:
                log_event(_log, logging.WARNING, "no-pinned-memory")
            return memory
    return None
