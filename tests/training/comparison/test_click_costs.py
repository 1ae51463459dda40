"""Costs of click models: complete, of what a run computes, and summed up as exponents."""

from typing import get_args

import pytest
import torch
from torch import nn

from contract.features import FeatureSpec
from tests.training.runs import next_item_config, run_config
from training.comparison.click_costs import (
    ClickCost,
    ClickSubject,
    Orders,
    _seconds,
    click_costs,
    expected_orders,
    exponents,
    figures,
    step_bytes,
)
from training.config import ClickModelConfig
from training.errors import ConfigError
from training.models.imn import IterativeMemoryNetwork

CPU = torch.device("cpu")
MODELS = [
    get_args(config.model_fields["name"].annotation)[0] for config in get_args(ClickModelConfig)
]


def subject(name: str, **settings: object) -> ClickSubject:
    model = {"name": name, "embedding_dim": 4, "head_units": [8], **settings}
    return ClickSubject(config=run_config(model=model), n_rows=30)


def made_up(*costs: tuple[int, float, float, int]) -> dict[int, ClickCost]:
    """Return costs of (length, seconds of a step, ms of scoring, bytes)."""
    return {
        length: ClickCost(steps_per_s=1 / step_s, score_ms=score_ms, step_bytes=n_bytes)
        for length, step_s, score_ms, n_bytes in costs
    }


class TestCosts:
    def test_each_model_has_a_cost_at_each_length(self):
        subjects = {name: subject(name) for name in MODELS}
        costs = click_costs(subjects, device=CPU, lengths=(4, 8), rounds=1)
        assert list(costs) == MODELS
        for name, by_length in costs.items():
            assert list(by_length) == [4, 8]
            for length, cost in by_length.items():
                assert cost.steps_per_s > 0
                assert cost.score_ms > 0
                assert cost.step_bytes == step_bytes(subjects[name], length, CPU)

    @pytest.mark.parametrize("name", MODELS)
    def test_memory_of_a_training_step_grows_with_the_history(self, name):
        assert 0 < step_bytes(subject(name), 8, CPU) < step_bytes(subject(name), 32, CPU)

    def test_the_step_has_the_loss_of_the_run(self):
        """DIEN's auxiliary network sees every behavior twice, with 100 units."""
        with_auxiliary, without = (
            step_bytes(subject("dien", auxiliary_weight=weight), 16, CPU) for weight in (1.0, 0.0)
        )
        assert with_auxiliary > without + 32 * 15 * 100 * 4

    @pytest.mark.parametrize("name", ["sasrec_click", "ubr4ctr"])
    def test_no_weights_of_all_pairs_of_behaviors_are_kept(self, name):
        """As `expected_orders` says of what is built here: they would be 4 times as many."""
        short, long = (step_bytes(subject(name), length, CPU) for length in (128, 256))
        assert long < 2.5 * short

    def test_a_call_is_a_training_step_or_scores_one_user(self, monkeypatch):
        """On one thread: steps of 32 rows with 2 candidates move weights, scoring is without
        gradient, of 100 candidates.
        """
        seen: list[tuple[object, ...]] = []
        weights = []
        build = ClickSubject.build

        def watched(one: ClickSubject, length: int) -> tuple[nn.Module, FeatureSpec]:
            model, spec = build(one, length)
            assert isinstance(model, IterativeMemoryNetwork)
            weight = model.memory.weight_ih

            def note(module, inputs):
                shapes = tuple(tuple(tensor.shape) for tensor in inputs)
                grad = torch.is_grad_enabled()
                seen.append((module.training, grad, torch.get_num_threads(), *shapes))
                weights.append(weight.detach().clone())

            model.register_forward_pre_hook(note)
            return model, spec

        monkeypatch.setattr(ClickSubject, "build", watched)
        seconds = _seconds({"imn": subject("imn")}, 6, CPU, rounds=1)
        assert all(taken > 0 for taken in seconds["imn"])
        step = (True, True, 1, (32, 6), (32, 6, 2), (32, 2))
        scoring = (False, False, 1, (1, 6), (1, 6, 2), (1, 100))
        half = len(seen) // 2
        assert seen == [step] * half + [scoring] * half
        assert not torch.equal(weights[0], weights[1])
        assert torch.equal(weights[-2], weights[-1])

    def test_of_a_next_item_model_are_refused(self):
        with pytest.raises(ConfigError, match=r"model\.name: 'sasrec' is no click model"):
            click_costs({"sasrec": ClickSubject(config=next_item_config(), n_rows=30)}, device=CPU)

    def test_of_features_that_no_log_gives_are_refused(self):
        with pytest.raises(ConfigError, match=r"model\.item_features: the log has no 'brand'"):
            click_costs({"din": subject("din", item_features=["brand"])}, device=CPU)


class TestExponents:
    def test_are_the_powers_that_costs_grow_with(self):
        lengths = (100, 200, 400)
        costs = {"made_up": made_up(*((n, 3e-6 * n, 2e-4 * n**2, 100) for n in lengths))}
        found = exponents(costs)["made_up"]
        assert found.training_time == pytest.approx(1)
        assert found.inference_time == pytest.approx(2)
        assert found.memory == pytest.approx(0)

    def test_are_of_the_three_largest_lengths(self):
        """Whatever the shorter ones cost, and in whatever order they come."""
        costs = made_up((400, 4, 4, 4), (1, 9, 9, 9), (100, 1, 1, 1), (50, 8, 8, 8), (200, 2, 2, 2))
        assert exponents({"made_up": costs})["made_up"].memory == pytest.approx(1)

    def test_of_one_length_are_refused(self):
        with pytest.raises(ValueError, match=r"din: an exponent needs two lengths, got \[50\]"):
            exponents({"din": made_up((50, 1, 1, 1))})


class TestFigures:
    def test_have_costs_and_exponents_by_name(self):
        costs = {"imn_3p": made_up((50, 0.5, 7.0, 1_000_000), (100, 1.0, 7.0, 4_000_000))}
        assert figures(costs) == {
            "imn_3p_steps_per_s_L50": 2.0,
            "imn_3p_score_ms_L50": 7.0,
            "imn_3p_step_mb_L50": 1.0,
            "imn_3p_steps_per_s_L100": 1.0,
            "imn_3p_score_ms_L100": 7.0,
            "imn_3p_step_mb_L100": 4.0,
            "imn_3p_exponent_training_time": pytest.approx(1),
            "imn_3p_exponent_inference_time": pytest.approx(0),
            "imn_3p_exponent_memory": pytest.approx(2),
        }


class TestOrders:
    @pytest.mark.parametrize("name", MODELS)
    def test_every_click_model_has_orders(self, name):
        described, built = expected_orders(subject(name).config.model)
        assert described.sequential_steps == built.sequential_steps
        assert (described.sequential_steps == "O(L)") == (name in ("dien", "mimn"))

    def test_sasrec_of_one_layer_reads_the_last_position_alone(self):
        one, two = (expected_orders(subject("sasrec_click", layers=n).config.model) for n in (1, 2))
        assert one[0] == two[0] == Orders(time="O(L^2 d)", memory="O(L^2)", sequential_steps="O(1)")
        assert (one[1].time, two[1].time) == ("O(L d^2)", "O(L^2 d)")
        assert one[1].memory == two[1].memory == "O(L d)"

    def test_of_a_next_item_model_are_refused(self):
        with pytest.raises(ConfigError, match=r"model\.name: 'sasrec' is no click model"):
            expected_orders(next_item_config().model)
