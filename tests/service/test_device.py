"""Where a graph runs, on a real graph: the CPU, and the bound buffers of a GPU on the CPU."""

import numpy as np
import onnxruntime as ort
import pytest

from contract.bundle import MODEL, OUTPUT_NAME
from contract.catalogue import FIRST_ROW
from contract.encoding import ModelInputs
from contract.errors import BundleError
from service.device import (
    BoundBuffers,
    CpuDevice,
    CudaDevice,
    is_out_of_memory,
    refuse_compute_off,
)
from service.shapes import Shape
from tests.service.dummy_model import OUT_OF_MEMORY
from tests.service.tiny_bundle import ITEM_IDS

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GRANULARITIES = 2
SHAPES = [
    pytest.param(Shape(1, 1, 1), id="smallest"),
    pytest.param(Shape(3, 7, 5), id="odd"),
    pytest.param(Shape(4, 16, 8), id="full histories"),
]
without_cuda = pytest.mark.skipif(
    CUDA in ort.get_available_providers(), reason="this machine has CUDA"
)


@pytest.fixture(scope="module")
def graph(good_bundle):
    return good_bundle / MODEL


@pytest.fixture(scope="module")
def device(graph):
    return CpuDevice(graph, threads=1, granularities=GRANULARITIES)


def fill(inputs: ModelInputs, rng: np.random.Generator) -> None:
    """Write random rows and buckets, with some padding on the left of the histories."""
    n_rows = FIRST_ROW + len(ITEM_IDS)
    length = inputs.history_items.shape[1]
    first = int(rng.integers(0, length))
    for name, array in inputs.as_feed().items():
        values = rng.integers(0, 5 if name == "history_buckets" else n_rows, array.shape)
        array[:] = values
    inputs.history_items[:, :first] = 0
    inputs.history_buckets[:, :first] = 0


def scores_of(session: ort.InferenceSession, inputs: ModelInputs) -> np.ndarray:
    (scores_BC,) = session.run([OUTPUT_NAME], inputs.as_feed())
    return np.asarray(scores_BC)


class TestCpuDevice:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_inputs_are_zeros_of_the_shape(self, device, shape):
        inputs = device.inputs(shape)
        assert inputs.history_items.shape == (shape.batch, shape.length)
        assert inputs.history_buckets.shape == (shape.batch, shape.length, GRANULARITIES)
        assert inputs.candidate_items.shape == (shape.batch, shape.candidates)
        for array in inputs.as_feed().values():
            assert array.dtype == np.int64
            assert not array.any()

    @pytest.mark.parametrize("threads", [0, 1, 2], ids=["all cores", "one", "two"])
    def test_it_scores_what_the_graph_scores(self, graph, threads):
        device = CpuDevice(graph, threads=threads, granularities=GRANULARITIES)
        inputs = device.inputs(Shape(3, 7, 5))
        fill(inputs, np.random.default_rng(1))
        scores = device.run(inputs)
        assert scores.dtype == np.float32
        assert scores.shape == (3, 7)
        expected = scores_of(ort.InferenceSession(graph, providers=[CPU]), inputs)
        np.testing.assert_allclose(scores, expected, atol=1e-6)
        assert len(np.unique(scores)) > 7

    def test_inputs_asked_for_again_are_zero_again(self, device):
        shape = Shape(2, 3, 4)
        fill(device.inputs(shape), np.random.default_rng(1))
        assert not any(array.any() for array in device.inputs(shape).as_feed().values())


class TestBoundBuffers:
    """As a GPU has them, but at addresses of the CPU."""

    @pytest.fixture
    def bound(self, device):
        def bind(shape: Shape) -> BoundBuffers:
            return BoundBuffers(device.session, shape, GRANULARITIES, device="cpu", graph_id=1)

        return bind

    @pytest.mark.parametrize("shape", SHAPES)
    def test_they_score_as_the_cpu_does_run_after_run(self, device, bound, shape):
        """The addresses stay, what stands there changes."""
        buffers = bound(shape)
        rng = np.random.default_rng(1)
        seen = set()
        for _ in range(5):
            inputs = buffers.cleared_inputs()
            fill(inputs, rng)
            scores = buffers.run()
            assert scores.shape == (shape.batch, shape.candidates)
            np.testing.assert_allclose(scores, device.run(inputs), atol=1e-6)
            seen.add(scores.tobytes())
        assert len(seen) > 1

    def test_scores_of_one_run_outlive_the_next(self, bound):
        buffers = bound(Shape(2, 3, 4))
        rng = np.random.default_rng(1)
        fill(buffers.cleared_inputs(), rng)
        first = buffers.run()
        kept = first.copy()
        fill(buffers.cleared_inputs(), rng)
        assert not np.array_equal(buffers.run(), kept)
        np.testing.assert_array_equal(first, kept)

    def test_cleared_inputs_are_the_same_arrays_all_zero(self, bound):
        buffers = bound(Shape(2, 3, 4))
        first = buffers.cleared_inputs()
        fill(first, np.random.default_rng(1))
        again = buffers.cleared_inputs()
        for array, before in zip(again.as_feed().values(), first.as_feed().values(), strict=True):
            assert np.shares_memory(array, before)
            assert not array.any()

    def test_what_one_batch_left_does_not_reach_the_next(self, device, bound):
        """A smaller batch of the same shape is padded with zeros, not with its predecessor."""
        buffers = bound(Shape(4, 16, 8))
        rng = np.random.default_rng(1)
        fill(buffers.cleared_inputs(), rng)
        buffers.run()
        small = device.inputs(Shape(1, 2, 3))
        fill(small, rng)
        inputs = buffers.cleared_inputs()
        inputs.history_items[0, -3:] = small.history_items[0]
        inputs.history_buckets[0, -3:] = small.history_buckets[0]
        inputs.candidate_items[0, :2] = small.candidate_items[0]
        np.testing.assert_allclose(buffers.run()[:1, :2], device.run(small), atol=1e-6)

    def test_several_shapes_live_side_by_side(self, device, bound):
        small, large = bound(Shape(1, 2, 3)), bound(Shape(4, 16, 8))
        rng = np.random.default_rng(1)
        for buffers in (small, large, small, large):
            fill(buffers.cleared_inputs(), rng)
            expected = device.run(buffers.host_inputs)
            np.testing.assert_allclose(buffers.run(), expected, atol=1e-6)


class TestPlacement:
    @pytest.fixture
    def session(self, graph):
        """A session that knows where its nodes are: all of them on the CPU."""
        options = ort.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return ort.InferenceSession(graph, options, providers=[CPU])

    def test_a_graph_that_is_where_it_was_asked_to_be_is_accepted(self, session, graph):
        refuse_compute_off(session, CPU, graph)

    def test_a_graph_that_is_elsewhere_is_refused_with_its_operators(self, session, graph):
        """Each once, whatever the number of its nodes."""
        with pytest.raises(BundleError) as caught:
            refuse_compute_off(session, CUDA, graph)
        message = str(caught.value)
        assert message.startswith(
            f"bundle {graph.parent}: model.onnx does not run on {CUDA} alone: "
        )
        assert message.count(f"MatMul on {CPU}") == 1
        assert f"Sigmoid on {CPU}" in message

    def test_arithmetic_on_sizes_may_be_elsewhere(self, session, graph):
        with pytest.raises(BundleError) as caught:
            refuse_compute_off(session, CUDA, graph)
        assert "Shape on" not in str(caught.value)
        assert "Range on" not in str(caught.value)

    @without_cuda
    def test_a_gpu_that_is_not_there_is_named_with_what_is(self, graph):
        message = rf"bundle .*: cannot run on {CUDA}: this onnxruntime has only .*{CPU}"
        with pytest.raises(BundleError, match=message):
            CudaDevice(graph, precision="fp32", granularities=GRANULARITIES)

    def test_a_file_that_is_no_graph_is_named(self, tmp_path):
        (tmp_path / MODEL).write_bytes(b"garbage")
        message = rf"bundle .*: model\.onnx cannot be loaded for {CPU}: "
        with pytest.raises(BundleError, match=message):
            CpuDevice(tmp_path / MODEL, threads=1, granularities=GRANULARITIES)


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "error",
        [
            pytest.param(OUT_OF_MEMORY, id="an arena of onnxruntime"),
            pytest.param(
                RuntimeError("Available memory of 1024 is smaller than requested bytes of 4096"),
                id="an arena with a limit",
            ),
            pytest.param(RuntimeError("std::bad_alloc"), id="C++"),
            pytest.param(
                RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=x"), id="CUDA"
            ),
            pytest.param(RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"), id="cuBLAS"),
            pytest.param(
                RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), id="cuDNN"
            ),
            pytest.param(MemoryError(), id="Python"),
        ],
    )
    def test_it_is_known_by_its_words(self, error):
        assert is_out_of_memory(error)

    @pytest.mark.parametrize(
        "message", ["CUDA failure 700: an illegal memory access was encountered", "Invalid Feed"]
    )
    def test_other_failures_are_not_taken_for_it(self, message):
        assert not is_out_of_memory(RuntimeError(message))
