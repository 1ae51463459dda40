"""Costs: memory is what the tensors of a step take, and grows with the history."""

from dataclasses import replace

import pytest
import torch

from contract.features import AGE_SECONDS, DAYS, HOURS, FeatureSpec
from training.comparison.costs import (
    TRAINING_BATCH,
    Subject,
    costs_by_length,
    describe_machine,
    full_rows,
    in_turns,
    scoring_s,
    step_bytes,
)
from training.comparison.next_item_choice import MODELS
from training.config import parse_config
from training.models.sasrec import SASRec

CPU = torch.device("cpu")


def subject(model: dict[str, object], **next_item: object) -> Subject:
    config = parse_config(
        {
            "name": "tiny",
            "features": {
                "granularities": [one.model_dump(mode="json") for one in (HOURS, DAYS, AGE_SECONDS)]
            },
            "next_item": next_item,
            "model": {"embedding_dim": 8, **model},
        },
        "test",
    )
    return Subject(config=config, n_rows=30, n_users=5)


@pytest.mark.parametrize("name", MODELS)
def test_memory_of_a_training_step_grows_with_the_history(name):
    one = subject({"name": name, **({"heads": 1} if name == "hstu" else {})})
    assert 0 < step_bytes(one, 16, CPU) < step_bytes(one, 64, CPU)


def test_gradients_of_all_weights_are_part_of_a_step():
    """FPMC has hardly anything else: 4 tables of 30 rows, 8 wide, in float32."""
    assert step_bytes(subject({"name": "fpmc"}), 1, CPU) > 4 * 30 * 8 * 4


def test_the_step_has_the_loss_of_the_run():
    few, many = (
        subject({"name": "gru4rec"}, loss="sampled_softmax", n_negatives=n) for n in (1, 1000)
    )
    assert step_bytes(few, 16, CPU) < step_bytes(many, 16, CPU)


def test_each_model_has_a_cost_at_each_length():
    subjects = {name: subject({"name": name}) for name in ("sasrec", "pkm_act")}
    costs = costs_by_length(subjects, lengths=(4, 8), device=CPU, rounds=1)
    assert {name: list(by_length) for name, by_length in costs.items()} == {
        "sasrec": [4, 8],
        "pkm_act": [4, 8],
    }
    for name, one in subjects.items():
        assert costs[name][4].encode_s > 0
        assert costs[name][8].step_bytes == step_bytes(one, 8, CPU)


def test_attention_weights_as_published_grow_with_the_square_of_the_history():
    """Heads * L * L of them in float32, kept for the way back."""
    fused = subject({"name": "sasrec"})
    published = replace(fused, as_published=True)
    weights = 4 * TRAINING_BATCH * 2 * 256 * 256
    assert step_bytes(published, 256, CPU) > step_bytes(fused, 256, CPU) + weights


def test_as_published_all_positions_are_read(monkeypatch):
    published = replace(subject({"name": "sasrec"}), as_published=True)
    monkeypatch.setattr(SASRec, "encode_last", lambda *_: pytest.fail("reads the last one alone"))
    costs = costs_by_length({"sasrec": published}, lengths=(4,), device=CPU, rounds=1)
    assert costs["sasrec"][4].encode_s > 0


def test_rows_are_full_and_ages_fall():
    spec = FeatureSpec(history_length=40, granularities=(HOURS, AGE_SECONDS))
    items_BL, buckets_BLG = full_rows(12, spec, 3)
    assert items_BL.shape == (3, 40)
    assert set(items_BL.unique().tolist()) == set(range(2, 12))
    assert buckets_BLG.shape == (3, 40, 2)
    assert (buckets_BLG.diff(dim=1) <= 0).all()
    assert buckets_BLG[:, :, 0].max() < HOURS.n_buckets


def test_scoring_is_timed_on_one_thread_which_is_given_back():
    threads = []
    model, spec = subject({"name": "sasrec"}).build(8)
    model.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    seconds = scoring_s({"sasrec": (model, spec)}, rounds=2)
    assert seconds["sasrec"] > 0
    assert set(threads) == {1}
    assert torch.get_num_threads() == before


def test_a_slow_call_is_made_less_often():
    """Until it has taken the limit in rounds that count; three do not."""
    now_s = 0.0
    made: list[str] = []

    def call(name: str, takes_s: float) -> None:
        nonlocal now_s
        now_s += takes_s
        made.append(name)

    calls = {
        "slow": lambda: call("slow", 2.5),
        "slowest": lambda: call("slowest", 9.0),
        "fast": lambda: call("fast", 0.5),
    }
    median_s = in_turns(calls, 5, lambda: now_s, limit_s=6.0)
    assert median_s == {"slow": 2.5, "slowest": 9.0, "fast": 0.5}
    assert {name: made.count(name) - 3 for name in calls} == {"slow": 3, "slowest": 1, "fast": 5}
    assert made[:6] == ["slow", "slowest", "fast"] * 2


def test_a_machine_is_described_without_a_date():
    assert f"torch {torch.__version__.partition('+')[0]}" in describe_machine(CPU)
