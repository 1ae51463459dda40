"""MIMN: the machine step by step, how targets ask it, and its single operator in a graph."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.training.models.click_checks import (
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_order_of_candidates_is_free,
    assert_padding_changes_nothing,
    operators,
)
from tests.training.models.inputs import N_ROWS, SPEC, inputs
from training.models.encoder import ItemEncoder
from training.models.mimn import MIMN, InductionUnit, Memory, address, move, one_hot_of_largest

WIDTH, N_SLOTS = 6, 4
variants = pytest.mark.parametrize(
    ("weight", "induction"),
    [(0.0, False), (0.3, False), (0.0, True), (0.3, True)],
    ids=["plain", "balanced", "induction", "both"],
)


def mimn(weight: float = 0.0, induction: bool = False) -> MIMN:
    """Return a model with weights so large that every term of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MIMN(
            ItemEncoder(N_ROWS, WIDTH),
            SPEC,
            embedding_dim=WIDTH,
            n_slots=N_SLOTS,
            utilisation_weight=weight,
            induction=induction,
            head_units=(8,),
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.items.items.weight[0].zero_()
    return model.eval()


@dataclass
class LiteralMachine:
    """A machine for one user, a behavior and a slot at a time, with the weights of `memory`."""

    memory: Memory
    induction: InductionUnit | None
    controller: Tensor = field(init=False)
    read: Tensor = field(init=False)
    slots: list[Tensor] = field(init=False)
    states: list[Tensor] = field(init=False)
    added: list[Tensor] = field(init=False)
    use: Tensor = field(init=False)

    def __post_init__(self) -> None:
        like = self.memory.keys
        self.controller = torch.zeros(WIDTH).type_as(like)
        self.read = torch.tanh(self.memory.first_read)
        self.slots = [torch.tanh(one) for one in self.memory.first_slots]
        self.states = [torch.zeros(WIDTH).type_as(like) for _ in range(N_SLOTS)]
        self.added = []
        self.use = torch.zeros(N_SLOTS).type_as(like)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next controller, its parameters and the reading weights."""
        m = self.memory
        h = literal_gru(
            m.input_gates.weight @ x + m.input_gates.bias + m.read_gates.weight @ self.read,
            m.state_gates.weight @ self.controller + m.state_gates.bias,
            self.controller,
        )
        parameters = m.heads.weight @ h + m.heads.bias
        if m.heads_of_use is not None:
            parameters = parameters + m.heads_of_use.weight @ (self.use / SPEC.history_length)
        parameters = parameters.clamp(-20, 20)
        return h, parameters, self.weights(parameters[:WIDTH], parameters[4 * WIDTH])

    def weights(self, key: Tensor, sharpness: Tensor) -> Tensor:
        """Return softmax(beta (cos(k, key) + cos(k, M)) / 2)."""
        k, beta = torch.tanh(key), 2 * (math.log1p(math.exp(sharpness)) + 1)
        exponentials = torch.stack(
            [
                torch.exp(beta * (cosine(k, torch.tanh(of_slot)) + cosine(k, slot)) / 2)
                for of_slot, slot in zip(self.memory.keys, self.slots, strict=True)
            ]
        )
        return exponentials / exponentials.sum()

    def step(self, x: Tensor) -> None:
        h, parameters, reading = self.heads(x)
        writing = self.weights(parameters[WIDTH : 2 * WIDTH], parameters[4 * WIDTH + 1])
        if self.memory.heads_of_use is not None:
            writing = literal_move(writing, parameters[4 * WIDTH + 2 : -1], parameters[-1])
            self.use = self.use + writing
        if self.induction is not None:
            top = int(reading.argmax())
            unit = self.induction
            self.states[top] = literal_gru(
                unit.input_gates.weight @ torch.cat([x, self.slots[top]]) + unit.input_gates.bias,
                unit.state_gates.weight @ self.states[top] + unit.state_gates.bias,
                self.states[top],
            )
        a = torch.tanh(parameters[2 * WIDTH : 3 * WIDTH])
        e = torch.sigmoid(parameters[3 * WIDTH : 4 * WIDTH])
        self.read = sum_of(reading, self.slots)
        self.slots = [
            slot * (1 - w * e) + w * a for w, slot in zip(writing, self.slots, strict=True)
        ]
        self.controller = h
        self.added.append(a)

    def answer(self, v: Tensor) -> Tensor:
        h, _, reading = self.heads(v)
        of_both = torch.cat([h, sum_of(reading, self.slots)])
        return (self.memory.answer.weight @ of_both + self.memory.answer.bias).clamp(-20, 20)

    def induced(self, v: Tensor) -> Tensor:
        assert self.induction is not None
        scores = [self.induction.attention(torch.cat([v, s, v - s, v * s])) for s in self.states]
        return sum_of(torch.softmax(torch.cat(scores), dim=0), self.states)


def literal_gru(of_input: Tensor, of_state: Tensor, state: Tensor) -> Tensor:
    x_r, x_z, x_n = of_input.chunk(3)
    h_r, h_z, h_n = of_state.chunk(3)
    z = torch.sigmoid(x_z + h_z)
    return (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + z * state


def literal_move(weights: Tensor, shift: Tensor, sharpness: Tensor) -> Tensor:
    s = torch.softmax(shift, dim=0)
    gamma = 2 * 2 * (math.log1p(math.exp(sharpness)) + 1)
    n = len(weights)
    moved = torch.stack(
        [
            (s[0] * weights[i] + s[1] * weights[(i - 1) % n] + s[2] * weights[(i + 1) % n]) ** gamma
            for i in range(n)
        ]
    )
    return moved / moved.sum()


def cosine(one: Tensor, other: Tensor) -> Tensor:
    similarity: Tensor = one @ other / (one.norm() * other.norm())
    return similarity


def sum_of(weights: Tensor, vectors: list[Tensor]) -> Tensor:
    return torch.stack([w * one for w, one in zip(weights, vectors, strict=True)]).sum(dim=0)


def literal_machine(model: MIMN, items: Tensor, buckets: Tensor, length: int) -> LiteralMachine:
    """Return the machine after one user's history."""
    machine = LiteralMachine(model.memory, model.induction)
    for x in encoded(model, items, buckets, length):
        machine.step(x)
    return machine


def encoded(model: MIMN, items: Tensor, buckets: Tensor, length: int) -> Tensor:
    whole: Tensor = model.history(model.items, items[None], buckets[None])[0]
    return whole[len(items) - length :]


@variants
@torch.no_grad()
def test_scores_are_those_of_the_machine_step_by_step(weight, induction):
    model = mimn(weight, induction).double()
    lengths = [12, 5, 1, 0]
    items, buckets, candidates = inputs(lengths)
    logits = model(items, buckets, candidates)
    for b, length in enumerate(lengths):
        machine = literal_machine(model, items[b], buckets[b], length)
        e = encoded(model, items[b], buckets[b], length)
        zeros = torch.zeros(WIDTH, dtype=torch.float64)
        mean = e.mean(dim=0) if length else zeros
        mean_added = torch.stack(machine.added).mean(dim=0) if length else zeros
        for c, row in enumerate(candidates[b]):
            v = model.items(row)
            features = [v, mean, machine.answer(v), mean_added * v]
            if induction:
                features.append(machine.induced(v))
            expected = model.head(torch.cat(features))
            torch.testing.assert_close(logits[b, c], expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_the_means_over_slots_of_what_was_written_is_the_sum_of_what_was_added():
    """Why one vector is kept where the authors' code keeps one for each slot."""
    weights = torch.softmax(torch.randn(7, N_SLOTS), dim=1)
    added = torch.randn(7, WIDTH)
    of_slots = (weights.unsqueeze(2) * added.unsqueeze(1)).sum(dim=0)
    torch.testing.assert_close(of_slots.mean(dim=0), added.sum(dim=0) / N_SLOTS)


def test_addressing_by_hand():
    """Two slots, D = 2: cosines 1 and 0 with the slots, 0.6 and 0.8 with their keys."""
    weights = address(
        torch.tensor([[[3.0, 0.0]]]),
        torch.tensor([[math.log(math.e - 1)]]),  # softplus gives 1, and so beta = 4
        torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]),
        torch.tensor([[0.6, 0.8], [0.8, 0.6]]),
    )
    first, second = math.exp(2 * (1 + 0.6)), math.exp(2 * (0 + 0.8))
    expected = [first / (first + second), second / (first + second)]
    assert weights[0, 0].tolist() == pytest.approx(expected)


def test_weights_are_moved_in_a_ring_then_sharpened():
    """All is moved one slot up; gamma = 4 (softplus + 1) = 8 leaves equal weights equal."""
    weights = torch.tensor([[0.5, 0.0, 0.0, 0.5]])
    moved = move(weights, torch.tensor([[-20.0, 20.0, -20.0]]), torch.tensor([[0.54]]))
    assert moved[0].tolist() == pytest.approx([0.5, 0.5, 0, 0], abs=1e-6)
    flat = torch.tensor([[0.6, 0.4]])
    gamma = 4 * (math.log(1 + math.exp(0.54)) + 1)
    sharpened = move(flat, torch.tensor([[20.0, -20.0, -20.0]]), torch.tensor([[0.54]]))
    expected = 0.6**gamma / (0.6**gamma + 0.4**gamma)
    assert sharpened[0, 0].item() == pytest.approx(expected)


def test_the_sharpest_parameters_leave_weights_that_are_numbers():
    spread = address(
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[20.0]]),
        torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]),
        torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
    )
    moved = move(spread[:, 0], torch.tensor([[20.0, -20.0, -20.0]]), torch.tensor([[20.0]]))
    assert moved.tolist() == [[1, 0]]


def test_of_equal_weights_the_first_is_the_largest():
    weights = torch.tensor([[0.2, 0.4, 0.4], [1.0, 0.0, 0.0]])
    assert one_hot_of_largest(weights).tolist() == [[0, 1, 0], [1, 0, 0]]


@torch.no_grad()
def test_the_loss_is_the_bce_and_the_variance_of_what_was_written_to_each_slot():
    model = mimn(0.3).double()
    lengths = [12, 5, 0]
    items, buckets, candidates = inputs(lengths)
    labels = torch.arange(15).reshape(3, 5) % 2 * torch.ones((), dtype=torch.float64)
    mask = torch.arange(15).reshape(3, 5) % 4 != 0
    logits = model(items, buckets, candidates)
    expected = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(lengths):
        use = literal_machine(model, items[b], buckets[b], length).use / SPEC.history_length
        assert use.sum().item() == pytest.approx(length / SPEC.history_length)
        imbalance = ((use - use.mean()) ** 2).mean()
        for c in range(5):
            if mask[b, c]:
                p = torch.sigmoid(logits[b, c] if labels[b, c] else -logits[b, c])
                expected = expected - p.log() + 0.3 * imbalance
    found = model.training_loss(items, buckets, candidates, labels, mask)
    torch.testing.assert_close(found, expected)


def test_without_regularisation_the_loss_is_the_bce():
    model = mimn()
    items, buckets, candidates = inputs([12, 0])
    ones = torch.ones(2, 5)
    bce = functional.binary_cross_entropy_with_logits(
        model(items, buckets, candidates), ones, reduction="sum"
    )
    torch.testing.assert_close(model.training_loss(items, buckets, candidates, ones, ones), bce)


@variants
def test_the_rules_of_click_models_hold(weight, induction):
    model = mimn(weight, induction)
    assert_padding_changes_nothing(model, tolerance=1e-5)
    assert_company_changes_nothing(model, tolerance=1e-5)
    assert_order_of_candidates_is_free(model, tolerance=1e-5)
    assert_empty_history_is_finite(model)


def test_a_request_is_read_once_however_many_candidates_it_has():
    model = mimn()
    rows = []
    model.memory.state_gates.register_forward_hook(lambda *call: rows.append(call[2].shape[:-1]))
    model(*inputs([12, 3], n_candidates=5))
    assert rows == [(2,)] * 12 + [(2, 1)]


@variants
def test_every_parameter_learns(weight, induction):
    assert_every_parameter_learns(mimn(weight, induction))


def test_each_recurrence_is_one_operator_of_any_length(tmp_path):
    """With all that it may have; the plain one is served in test_bundles_by_http."""
    found = operators(assert_exports(mimn(weight=0.3, induction=True), tmp_path))
    assert found.count("Scan") == 2
    assert not {"Loop", "If"} & set(found)
