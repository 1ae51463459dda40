"""What click models cost over the length of the history: training, scoring, memory.

The measurements of IMN's Figure 4, and the orders of its Table 2 beside the exponents that the
measured costs grow with. Models are timed in turns, one call of each after the other, with one
thread: processor time on the CPU, wall time on a GPU.

Shapes: B rows, C candidates, L history length, G time granularities. In orders, d is any width.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from contract.catalogue import FIRST_ROW
from contract.features import FeatureSpec
from training.comparison.costs import (
    N_CANDIDATES,
    full_rows,
    in_turns,
    one_thread,
    peak_bytes,
    process_of_its_own,
)
from training.config import (
    ClickModelConfig,
    ModelConfig,
    RunConfig,
    SasRecClickConfig,
    Ubr4CtrConfig,
)
from training.errors import ConfigError
from training.models.build import build_model
from training.tasks import ClickLoss

LENGTHS = (50, 100, 200, 500, 1000)
TRAINING_BATCH = 32
_TRAINING_CANDIDATES = 2
_ROUNDS = 15
# Recurrent models take seconds for a step of 1,000 behaviors: three of 2 s are enough of them.
_LIMIT_S = 6.0
_LENGTHS_OF_AN_EXPONENT = 3


@dataclass(frozen=True, kw_only=True)
class Orders:
    """How time and memory of a training step grow, and how many steps wait for one another."""

    time: str
    memory: str
    sequential_steps: str


# Derived from the models as their authors describe them, not copied from a table.
EXPECTED_ORDERS: Mapping[str, Orders] = {
    "youtube_dnn": Orders(time="O(L d)", memory="O(L d)", sequential_steps="O(1)"),
    "din": Orders(time="O(L d^2)", memory="O(L d)", sequential_steps="O(1)"),
    "dien": Orders(time="O(L d^2)", memory="O(L d)", sequential_steps="O(L)"),
    "mimn": Orders(time="O(L d^2)", memory="O(L d)", sequential_steps="O(L)"),
    "ubr4ctr": Orders(time="O(L^2 d)", memory="O(L^2)", sequential_steps="O(1)"),
    "sasrec_click": Orders(time="O(L^2 d)", memory="O(L^2)", sequential_steps="O(1)"),
    "imn": Orders(time="O(P L d^2)", memory="O(P L d)", sequential_steps="O(P)"),
}
"""By the model's name in a run file; P passes."""


@dataclass(frozen=True, kw_only=True)
class ClickSubject:
    """A click model to be built untrained, for a catalogue of `n_rows`.

    The gradient of the item table, and Adam's step over it, cost the same at every length: a large
    catalogue flattens what is measured of training.
    """

    config: RunConfig
    n_rows: int

    def build(self, history_length: int) -> tuple[nn.Module, FeatureSpec]:
        """Return the run's model for histories of another length, and its spec.

        Raises ConfigError unless it is a click model, without features of items.
        """
        if not isinstance(self.config.model, ClickModelConfig):
            raise ConfigError(f"model.name: {self.config.model.name!r} is no click model")
        spec = self.config.features.model_copy(update={"history_length": history_length})
        model = build_model(
            self.config.model, spec, item_counts=self.item_counts, features_of_row=None, seed=1
        )
        return model, spec

    @property
    def item_counts(self) -> Tensor:
        """Return one behavior for each item, int64 [n_rows]: what is rare costs no less."""
        return torch.ones(self.n_rows, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class ClickCost:
    """Of one model at one history length.

    `steps_per_s`: training steps of `TRAINING_BATCH` full rows with 2 candidates each: forward,
    loss, backward and Adam. `score_ms`: milliseconds to score 100 candidates for one user with a
    full history. Both are of the median call. `step_bytes`: what torch holds at the peak of a
    training step, in float32: activations and gradients, without weights, inputs and Adam's state.
    """

    steps_per_s: float
    score_ms: float
    step_bytes: int


@dataclass(frozen=True, kw_only=True)
class Exponents:
    """The x in cost ~ L^x, of seconds a training step, of seconds to score, of bytes at the peak.

    1 is a cost that grows with the history, 2 with its square, 0 one that does not grow.
    """

    training_time: float
    inference_time: float
    memory: float


def click_costs(
    subjects: Mapping[str, ClickSubject],
    *,
    device: torch.device,
    lengths: Sequence[int] = LENGTHS,
    rounds: int = _ROUNDS,
) -> dict[str, dict[int, ClickCost]]:
    """Return the cost of each model at each history length.

    Of slow calls fewer than `rounds` are made, but one at least. Memory is taken in a process of
    its own. Raises ConfigError as `ClickSubject.build` does.
    """
    seconds = {length: _seconds(subjects, length, device, rounds) for length in lengths}
    with process_of_its_own() as process:
        return {
            name: {
                length: ClickCost(
                    steps_per_s=1 / seconds[length][name][0],
                    score_ms=1e3 * seconds[length][name][1],
                    step_bytes=process.submit(step_bytes, subject, length, device).result(),
                )
                for length in lengths
            }
            for name, subject in subjects.items()
        }


def step_bytes(subject: ClickSubject, history_length: int, device: torch.device) -> int:
    """Return the bytes that torch holds at the peak of one training step, see `ClickCost`."""
    model, spec = subject.build(history_length)
    loss = _loss(subject, model.to(device).train(), spec, device)

    def step() -> None:
        loss().backward()  # type: ignore[no-untyped-call]

    return peak_bytes(step, device)


def exponents(costs: Mapping[str, Mapping[int, ClickCost]]) -> dict[str, Exponents]:
    """Return what the costs of each model grow with: slopes of log cost over log L, by least
    squares.

    Of the three largest lengths only: what a call costs at any length hides the growth below.
    Raises ValueError for a model with a single length.
    """
    found = {}
    for name, by_length in costs.items():
        lengths = sorted(by_length)[-_LENGTHS_OF_AN_EXPONENT:]
        if len(lengths) < 2:
            raise ValueError(f"{name}: an exponent needs two lengths, got {lengths}")
        last = [by_length[length] for length in lengths]
        found[name] = Exponents(
            training_time=_slope(lengths, [1 / cost.steps_per_s for cost in last]),
            inference_time=_slope(lengths, [cost.score_ms for cost in last]),
            memory=_slope(lengths, [cost.step_bytes for cost in last]),
        )
    return found


def expected_orders(config: ModelConfig) -> tuple[Orders, Orders]:
    """Return the orders of a click model as its authors describe it, and as it is built here.

    SASRec with one layer reads the last position alone: only its keys and values are of all L. Of
    UBR4CTR's selection, and of further layers, torch's fused attention keeps no L x L weights.
    Raises ConfigError for other models.
    """
    if not isinstance(config, ClickModelConfig):
        raise ConfigError(f"model.name: {config.name!r} is no click model")
    described = EXPECTED_ORDERS[config.name]
    match config:
        case SasRecClickConfig(layers=1):
            return described, replace(described, time="O(L d^2)", memory="O(L d)")
        case SasRecClickConfig() | Ubr4CtrConfig():
            return described, replace(described, memory="O(L d)")
        case _:
            return described, described


def figures(costs: Mapping[str, Mapping[int, ClickCost]]) -> dict[str, float]:
    """Return all costs and exponents by name, such as "din_step_mb_L200"; 1 MB is 10^6 bytes."""
    named = {}
    for name, by_length in costs.items():
        for length, cost in by_length.items():
            named[f"{name}_steps_per_s_L{length}"] = cost.steps_per_s
            named[f"{name}_score_ms_L{length}"] = cost.score_ms
            named[f"{name}_step_mb_L{length}"] = cost.step_bytes / 1e6
    for name, found in exponents(costs).items():
        named[f"{name}_exponent_training_time"] = found.training_time
        named[f"{name}_exponent_inference_time"] = found.inference_time
        named[f"{name}_exponent_memory"] = found.memory
    return named


def _seconds(
    subjects: Mapping[str, ClickSubject], length: int, device: torch.device, rounds: int
) -> dict[str, tuple[float, float]]:
    """Return the median seconds of a training step and of scoring."""
    training, scoring = {}, {}
    for name, subject in subjects.items():
        model, spec = subject.build(length)
        model = model.to(device)
        training[name] = _training_call(subject, model, spec, device)
        scoring[name] = _scoring_call(subject, model, spec, device)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    with one_thread():
        trained_s = in_turns(training, rounds, clock, limit_s=_LIMIT_S)
        with torch.inference_mode():
            scored_s = in_turns(scoring, rounds, clock, limit_s=_LIMIT_S)
    return {name: (trained_s[name], scored_s[name]) for name in subjects}


def _training_call(
    subject: ClickSubject, model: nn.Module, spec: FeatureSpec, device: torch.device
) -> Callable[[], None]:
    loss = _loss(subject, model, spec, device)
    settings = subject.config.train
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )

    def call() -> None:
        model.train()
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _synchronise(device)

    return call


def _scoring_call(
    subject: ClickSubject, model: nn.Module, spec: FeatureSpec, device: torch.device
) -> Callable[[], None]:
    inputs = _inputs(subject, spec, device, n_rows=1, n_candidates=N_CANDIDATES)

    def call() -> None:
        model.eval()(*inputs)
        _synchronise(device)

    return call


def _loss(
    subject: ClickSubject, model: nn.Module, spec: FeatureSpec, device: torch.device
) -> Callable[[], Tensor]:
    """Return the run's own loss, the mean over the samples of a batch."""
    inputs = _inputs(
        subject, spec, device, n_rows=TRAINING_BATCH, n_candidates=_TRAINING_CANDIDATES
    )
    labels_BC = torch.zeros(inputs[2].shape, device=device)
    labels_BC[:, 0] = 1
    mask_BC = torch.ones_like(labels_BC, dtype=torch.bool)
    summed = ClickLoss(subject.config.model, subject.item_counts)
    return lambda: summed(model, inputs, labels_BC, mask_BC) / labels_BC.numel()


def _inputs(
    subject: ClickSubject,
    spec: FeatureSpec,
    device: torch.device,
    *,
    n_rows: int,
    n_candidates: int,
) -> tuple[Tensor, Tensor, Tensor]:
    items_BL, buckets_BLG = full_rows(subject.n_rows, spec, n_rows)
    candidates = torch.arange(n_rows * n_candidates) % (subject.n_rows - FIRST_ROW) + FIRST_ROW
    candidates_BC = candidates.view(n_rows, n_candidates)
    return items_BL.to(device), buckets_BLG.to(device), candidates_BC.to(device)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slope(lengths: Sequence[int], costs: Sequence[float]) -> float:
    return statistics.linear_regression(
        [math.log(length) for length in lengths], [math.log(cost) for cost in costs]
    ).slope
