"""A model whose scores can be read off: no weights, no network, and it can be held up.

Items 1 .. 90 are known. A score is a number of seven digits, `ddooncc`:

    dd    day bucket of the newest behavior (0 without one)
    oo    the item of the oldest behavior that the model sees (0 without one, 99 if unknown)
    n     number of behaviors that the model sees, up to 8
    cc    the candidate (99 if unknown)
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from contract.bundle import REQUIRED_FILES, FileEntry, Manifest, ScoreKind
from contract.catalogue import FIRST_ROW, PADDING_ROW, UNKNOWN_ROW, Catalogue
from contract.encoding import ModelInputs
from contract.features import DAYS, FeatureSpec
from service.model import Explain
from service.shapes import Shape, ShapeGrid

HISTORY_LENGTH = 8
KNOWN_ITEMS = 90
PASSES = 3
UNKNOWN = 99
# (work, seconds): 0.1 ms for a batch and 1 us for a pair of candidate and behavior. With this to
# begin with, the service takes a run that a test holds up for a hiccup.
QUICK = ((1, 0.000_101), (1001, 0.001_101))
# What onnxruntime raises for a run that does not fit, and its words.
OUT_OF_MEMORY = Fail(
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running FusedMatMul node. "
    "Name:'node_matmul/MatmulTransposeFusion/' Status Message: /onnxruntime_src/onnxruntime/core/"
    "framework/bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, "
    "onnxruntime::Stream*) Failed to allocate memory for requested buffer of size 51200000"
)
_PATIENCE_S = 30.0


def score_of(candidate: int, *, behaviors: int = 0, oldest: int = 0, day: int = 0) -> float:
    """Return the score that DummyModel gives; `oldest` and `candidate` are item ids."""
    return float(100_000 * day + 1_000 * oldest + 100 * behaviors + candidate)


def weight_of(candidate_row: int, behavior_row: int, one_pass: int) -> float:
    """Return the weight that DummyModel's explanations give; rows of its catalogue."""
    return 100 * _item(candidate_row) + _item(behavior_row) + one_pass / 2


def dummy_manifest(score_kind: ScoreKind = "affinity") -> Manifest:
    no_file = FileEntry(sha256="0" * 64, size_bytes=0)
    return Manifest(
        format_version=1,
        model_name="dummy",
        model_version="dummy-1",
        score_kind=score_kind,
        features=FeatureSpec(history_length=HISTORY_LENGTH, granularities=(DAYS,)),
        n_items=KNOWN_ITEMS,
        golden_tolerance=1e-3,
        metrics={"auc": 0.5},
        training_config={},
        data_fingerprint="",
        produced_with={},
        files=dict.fromkeys(REQUIRED_FILES, no_file),
    )


class DummyModel:
    """Scores as above. `runs` keeps the inputs of every run; `held` stops runs where they are.

    `fails_with` is raised instead of an answer. `answers_with` replaces all scores by one number.
    `memory`: requests x candidates x behaviors for which there is room; a larger run fails as one
    of onnxruntime's does. `forgets_a_candidate` leaves out the last column. `takes_s`: seconds of a
    run.
    `warm_up_took`: (work, seconds) of batches that the warm-up pretends to have run. `explains`:
    whether it tells what behaviors weigh, see `weight_of`.
    """

    def __init__(
        self,
        *,
        warm_up_took: Sequence[tuple[int, float]] = QUICK,
        score_kind: ScoreKind = "affinity",
        explains: bool = False,
    ) -> None:
        self.explain: Explain | None = self._explain if explains else None
        self.manifest = dummy_manifest(score_kind)
        self.catalogue = Catalogue(np.arange(1, KNOWN_ITEMS + 1, dtype=np.int64))
        self._warm_up_took = list(warm_up_took)
        # No axis has sizes: nothing is rounded up, and every batch has its own shape.
        self.shapes = ShapeGrid(batches=(), candidates=(), lengths=())
        self._may_run = threading.Event()
        self._is_busy = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.runs: list[ModelInputs] = []
        self.fails_with: Exception | None = None
        self.answers_with: float | None = None
        self.memory = 10**9
        self.forgets_a_candidate = False
        self.takes_s = 0.0
        self._is_busy.clear()
        self._may_run.set()

    @property
    def batch_sizes(self) -> list[int]:
        return [len(run.candidate_items) for run in self.runs]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold up every run until the block ends."""
        self._is_busy.clear()
        self._may_run.clear()
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let runs go on, within the block already."""
        self._may_run.set()

    def wait_until_busy(self) -> None:
        """Return when a run is being held."""
        assert self._is_busy.wait(_PATIENCE_S), "no run has begun"

    def inputs(self, shape: Shape) -> ModelInputs:
        return ModelInputs(
            history_items=np.zeros((shape.batch, shape.length), dtype=np.int64),
            history_buckets=np.zeros((shape.batch, shape.length, 1), dtype=np.int64),
            candidate_items=np.zeros((shape.batch, shape.candidates), dtype=np.int64),
        )

    def warm_up(self, max_work: int) -> list[tuple[int, float]]:
        del max_work
        return self._warm_up_took

    def _explain(self, inputs: ModelInputs) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scores_BC = self.run(inputs)
        weights_BCPL = [
            [
                [[weight_of(c, h, p) if h else 0.0 for h in row_L] for p in range(PASSES)]
                for c in row_C
            ]
            for row_L, row_C in zip(inputs.history_items, inputs.candidate_items, strict=True)
        ]
        shape = (*scores_BC.shape, PASSES, inputs.history_items.shape[1])
        return scores_BC, np.array(weights_BCPL, dtype=np.float32).reshape(shape)

    def run(self, inputs: ModelInputs) -> NDArray[np.float32]:
        self.runs.append(inputs)
        self._is_busy.set()
        assert self._may_run.wait(_PATIENCE_S), "held for too long"
        time.sleep(self.takes_s)
        if self.fails_with is not None:
            raise self.fails_with
        if inputs.candidate_items.size * inputs.history_items.shape[1] > self.memory:
            raise OUT_OF_MEMORY
        if self.answers_with is not None:
            return np.full(inputs.candidate_items.shape, self.answers_with, dtype=np.float32)
        scores_BC = _scores(inputs)
        return scores_BC[:, :-1] if self.forgets_a_candidate else scores_BC


def _scores(inputs: ModelInputs) -> NDArray[np.float32]:
    rows_BL = inputs.history_items
    n_behaviors_B = (rows_BL != PADDING_ROW).sum(axis=1)
    # Right-aligned: the oldest behavior stands n columns from the end.
    oldest_B = np.array(
        [_item(row_L[-n]) if n else 0 for row_L, n in zip(rows_BL, n_behaviors_B, strict=True)]
    )
    days_B = inputs.history_buckets[:, -1, 0]
    candidates_BC = np.vectorize(_item)(inputs.candidate_items)
    histories_B = 100_000 * days_B + 1_000 * oldest_B + 100 * n_behaviors_B
    scores_BC: NDArray[np.float32] = (histories_B[:, None] + candidates_BC).astype(np.float32)
    return scores_BC


def _item(row: int) -> int:
    return UNKNOWN if row == UNKNOWN_ROW else int(row) - FIRST_ROW + 1
