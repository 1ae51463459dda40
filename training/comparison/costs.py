"""What next-item models cost: time of scoring, time and memory over the length of the history.

Models are timed in turns, one call of each after the other, so that what else the machine does
meets all of them alike. On the CPU the clock is the processor time of the one thread that computes:
the latency on a core that has nothing else to do, whatever it is doing beside.

Shapes: B requests, C candidates, L history length, G time granularities.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from contract.catalogue import FIRST_ROW
from contract.features import FeatureSpec
from training.config import RunConfig
from training.losses import NextItemLoss, Targets
from training.models.build import build_model
from training.models.next_item import NextItemModel

LENGTHS = (64, 128, 256, 512, 1024)
N_CANDIDATES = 100
TRAINING_BATCH = 8
_ROUNDS = 50
_WARM_UP_ROUNDS = 3
_LARGEST_AGE = 1 << 22
# Kineto announces every profile on stderr from this level down, and reads it when torch is loaded.
_QUIET = ("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to be built untrained: `n_rows` of the catalogue, `n_users` of the log.

    `as_published`: all positions are read, not what the last one needs alone, and all attention
    weights stand in memory, as in the code that papers measure.
    """

    config: RunConfig
    n_rows: int
    n_users: int
    as_published: bool = False

    def build(self, history_length: int) -> tuple[NextItemModel, FeatureSpec]:
        """Return the run's model for histories of another length, and its spec."""
        spec = self.config.features.model_copy(update={"history_length": history_length})
        model = build_model(
            self.config.model,
            spec,
            item_counts=self.item_counts,
            features_of_row=None,
            n_users=self.n_users,
            seed=1,
        )
        assert isinstance(model, NextItemModel)
        return model, spec

    def attention(self) -> AbstractContextManager[object]:
        """Return what the model has to run in."""
        return sdpa_kernel(SDPBackend.MATH) if self.as_published else nullcontext()

    @property
    def item_counts(self) -> Tensor:
        """Return one behavior for each item, int64 [n_rows]: what is rare costs no less."""
        return torch.ones(self.n_rows, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class LengthCost:
    """Of one model at one history length: median seconds to read one user's history, and bytes
    that a training step of `TRAINING_BATCH` full rows needs at its peak beside weights and inputs.
    """

    encode_s: float
    step_bytes: int


def scoring_s(
    models: Mapping[str, tuple[NextItemModel, FeatureSpec]], *, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Return the median seconds in which each model scores `N_CANDIDATES` for one user.

    Full history, batch 1, evaluation mode, processor time of one thread.
    """

    def call(model: NextItemModel, spec: FeatureSpec) -> Callable[[], object]:
        n_rows = len(model.item_table())
        items_BL, buckets_BLG = full_rows(n_rows, spec, 1)
        candidates_BC = torch.arange(N_CANDIDATES).unsqueeze(0) % (n_rows - FIRST_ROW) + FIRST_ROW
        return lambda: model(items_BL, buckets_BLG, candidates_BC)

    calls = {name: call(model.eval(), spec) for name, (model, spec) in models.items()}
    with torch.inference_mode(), one_thread():
        return in_turns(calls, rounds, time.thread_time)


def costs_by_length(
    subjects: Mapping[str, Subject],
    *,
    lengths: Sequence[int] = LENGTHS,
    device: torch.device,
    rounds: int = _ROUNDS,
) -> dict[str, dict[int, LengthCost]]:
    """Return the cost of each model at each history length.

    Memory is taken in a process of its own.
    """
    encode_s = {length: _encode_s(subjects, length, device, rounds) for length in lengths}
    with process_of_its_own() as process:
        return {
            name: {
                length: LengthCost(
                    encode_s=encode_s[length][name],
                    step_bytes=process.submit(step_bytes, subject, length, device).result(),
                )
                for length in lengths
            }
            for name, subject in subjects.items()
        }


def step_bytes(subject: Subject, history_length: int, device: torch.device) -> int:
    """Return the bytes that torch holds at the peak of one training step, in float32: activations
    and gradients, of the run's own loss, without weights, inputs and Adam's state.

    A step learns what a step of the run does: the target after every position of causal models,
    the last one of the others.
    """
    model, spec = subject.build(history_length)
    model = model.to(device).train()
    loss = NextItemLoss(subject.config.next_item, subject.item_counts)
    items_BL, buckets_BLG = (
        rows.to(device) for rows in full_rows(subject.n_rows, spec, TRAINING_BATCH)
    )
    users_B = torch.zeros(TRAINING_BATCH, dtype=torch.int64, device=device)

    def step() -> None:
        vectors_ND, rows_N, origins_N = model.training_pairs(
            items_BL, buckets_BLG, items_BL, users_B
        )
        learned = Targets(vectors=vectors_ND, rows=rows_N, origins=origins_N, own=items_BL)
        loss(learned, model.item_table()).backward()  # type: ignore[no-untyped-call]

    with subject.attention():
        return peak_bytes(step, device)


def process_of_its_own() -> ProcessPoolExecutor:
    """Return one more process, for measurements of memory."""
    os.environ.setdefault(*_QUIET)
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the bytes that torch holds at the peak of a step beside what it held before."""
    return _peak_bytes_on_gpu(step, device) if device.type == "cuda" else _peak_bytes_on_cpu(step)


def full_rows(n_rows: int, spec: FeatureSpec, batch: int) -> tuple[Tensor, Tensor]:
    """Return random histories without padding, int64 [B, L], and buckets, int64 [B, L, G]."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, spec.history_length)
    items_BL = torch.randint(FIRST_ROW, n_rows, shape, generator=generator)
    buckets = [
        torch.randint(min(one.n_buckets, _LARGEST_AGE), shape, generator=generator)
        .sort(dim=1, descending=True)
        .values
        for one in spec.granularities
    ]
    return items_BL, torch.stack(buckets, dim=2)


def describe_machine(device: torch.device) -> str:
    """Return processor, cores and versions as one line; the GPU, too, where it is the device."""
    with Path("/proc/cpuinfo").open() as file:
        processor = next(
            (one.partition(":")[2].strip() for one in file if "model name" in one), "?"
        )
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return (
        f"{processor}, {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, "
        f"torch {version('torch')}"
    )


def _encode_s(
    subjects: Mapping[str, Subject], length: int, device: torch.device, rounds: int
) -> dict[str, float]:
    def call(subject: Subject) -> Callable[[], object]:
        model, spec = subject.build(length)
        model = model.to(device).eval()
        items_BL, buckets_BLG = (rows.to(device) for rows in full_rows(subject.n_rows, spec, 1))

        read = model.encode if subject.as_published else model.encode_last

        def encode() -> None:
            with subject.attention():
                read(items_BL, buckets_BLG)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return encode

    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    with torch.inference_mode(), one_thread():
        return in_turns({name: call(one) for name, one in subjects.items()}, rounds, clock)


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float],
    *,
    limit_s: float = math.inf,
) -> dict[str, float]:
    """Return the median seconds of each call, made once in each of `rounds` rounds after some that
    do not count. A call that has taken `limit_s` in those that count is not made again.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(_WARM_UP_ROUNDS + rounds):
        for name, call in calls.items():
            if sum(seconds[name]) >= limit_s:
                continue
            started = clock()
            call()
            if number >= _WARM_UP_ROUNDS:
                seconds[name].append(clock() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _peak_bytes_on_cpu(step: Callable[[], None]) -> int:
    # The profiler meets every allocation; the size of the process would round to what the
    # allocator keeps, and count libraries that the first step loads.
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _peak_bytes_on_gpu(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, and give the others back."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
