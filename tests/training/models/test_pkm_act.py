"""PKM-ACT and its causal form are what their equations say, and keep what next-item models keep."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from contract.features import AGE_SECONDS, DAYS, HOURS, FeatureSpec
from tests.training.models.next_item_checks import (
    N_ROWS,
    SPEC,
    assert_causal,
    assert_company_changes_nothing,
    assert_empty_history_is_finite,
    assert_every_parameter_learns,
    assert_exports,
    assert_last_equals_encode,
    assert_not_causal,
    assert_padding_changes_nothing,
    histories,
    with_large_weights,
)
from training.errors import ConfigError
from training.models.encoder import ItemEncoder
from training.models.pkm_act import PkmAct

WIDTH = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "last": {"form": "last"},
    "last, one layer": {"form": "last", "n_layers": 1},
    "last, one pooling": {"form": "last", "stride": 12},
    "last without time": {"form": "last", "time_features": False},
    "last without query network": {"form": "last", "query_network": False},
    "last without product keys": {"form": "last", "product_keys": False},
    "last without dispatcher": {"form": "last", "dispatcher": False},
    "causal": {"form": "causal"},
    "causal, one layer": {"form": "causal", "n_layers": 1},
    "causal, uneven chunks": {"form": "causal", "chunk": 5},
    "causal, chunks of one": {"form": "causal", "chunk": 1},
    "causal, one chunk": {"form": "causal", "chunk": 16},
    "causal without time": {"form": "causal", "time_features": False},
    "causal without query network": {"form": "causal", "query_network": False},
    "causal without product keys": {"form": "causal", "product_keys": False},
    "causal without dispatcher": {"form": "causal", "dispatcher": False},
}
CAUSAL = {name: changes for name, changes in VARIANTS.items() if changes["form"] == "causal"}


def pkm_act(spec: FeatureSpec = SPEC, **changes: Any) -> PkmAct:
    fields: dict[str, Any] = {
        "embedding_dim": WIDTH,
        "n_layers": 2,
        "n_heads": 2,
        "ffn_units": 12,
        "dropout": 0.0,
        "keys_per_side": 5,
        "n_experts": 3,
        "stride": 3,
        "chunk": 4,
    }
    model = PkmAct(ItemEncoder(N_ROWS, WIDTH), spec, **(fields | changes))
    with_large_weights(model)
    return model


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> PkmAct:
    return pkm_act(**VARIANTS[request.param])


def test_padding_changes_nothing(variant):
    assert_padding_changes_nothing(variant)


def test_company_changes_nothing(variant):
    assert_company_changes_nothing(variant)


def test_an_empty_history_is_finite(variant):
    assert_empty_history_is_finite(variant)


def test_the_last_vector_alone_is_that_of_all(variant):
    assert_last_equals_encode(variant)


@pytest.mark.parametrize("changes", CAUSAL.values(), ids=CAUSAL)
def test_the_causal_form_is_causal(changes):
    assert_causal(pkm_act(**changes))


def test_the_form_last_is_not_and_learns_last_positions_only():
    model = pkm_act()
    assert_not_causal(model)
    assert not model.learns_whole_rows


# With one chunk nothing is ever gathered, and in chunks of one there is nothing to weigh.
_LEARNING = VARIANTS.keys() - {"causal, one chunk", "causal, chunks of one"}


@pytest.mark.parametrize("name", sorted(_LEARNING))
def test_every_parameter_learns(name):
    assert_every_parameter_learns(pkm_act(**VARIANTS[name]))


@pytest.mark.parametrize("form", ["last", "causal"])
def test_it_exports(form, tmp_path):
    assert_exports(pkm_act(form=form), SPEC, tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 12),
    chunk=st.integers(1, 7),
    n_layers=st.integers(1, 3),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_what_comes_after_a_position_does_not_change_its_vector(
    length, chunk, n_layers, seed, data
):
    """Another item leaves all vectors before it as they are; another time may change the one right
    before it, and none of the earlier.
    """
    model = pkm_act(form="causal", chunk=chunk, n_layers=n_layers)
    items, buckets = histories(model, SPEC, [length], width=length, seed=seed)
    place = data.draw(st.integers(1, length - 1), label="place")
    other_items, other_buckets = items.clone(), buckets.clone()
    other_items[0, place] = data.draw(st.integers(1, N_ROWS - 1), label="item")
    other_buckets[0, place, 2] = data.draw(st.integers(0, 1 << 22), label="age")
    before_LD = model.encode(items, buckets)[0]
    other_item_LD = model.encode(other_items, buckets)[0]
    torch.testing.assert_close(other_item_LD[:place], before_LD[:place])
    other_time_LD = model.encode(items, other_buckets)[0]
    torch.testing.assert_close(other_time_LD[: place - 1], before_LD[: place - 1])


def test_the_vector_of_a_position_knows_when_the_next_behavior_is():
    model = pkm_act(form="causal")
    items, buckets = histories(model, SPEC, [12])
    before_LD = model.encode(items, buckets)[0]
    buckets[0, 6, 2] = buckets[0, 5, 2]
    after_LD = model.encode(items, buckets)[0]
    assert not torch.allclose(after_LD[5], before_LD[5])


@pytest.mark.parametrize("form", ["last", "causal"])
@pytest.mark.parametrize("position", [0, 3, 10])
def test_every_behavior_matters_to_the_last_vector(form, position):
    model = pkm_act(form=form)
    items, buckets = histories(model, SPEC, [12])
    before_BD = model.encode_last(items, buckets)
    items[0, position] = 1 + items[0, position] % (N_ROWS - 1)
    assert not torch.allclose(model.encode_last(items, buckets), before_BD)


@pytest.mark.parametrize(("form", "granularity"), [("last", 0), ("last", 1), ("causal", 2)])
def test_times_matter_only_as_time_features(form, granularity):
    items, buckets = histories(pkm_act(), SPEC, [12])
    changed = buckets.clone()
    changed[:, :, granularity] = buckets[:, :, granularity] // 3
    model = pkm_act(form=form)
    assert not torch.allclose(model.encode_last(items, changed), model.encode_last(items, buckets))
    model = pkm_act(form=form, time_features=False)
    assert torch.equal(model.encode_last(items, changed), model.encode_last(items, buckets))


@pytest.mark.parametrize("form", ["last", "causal"])
@pytest.mark.parametrize("lengths", [[12], [11, 5], [4, 1], [8]], ids=str)
def test_it_is_the_literal_model(form, lengths):
    model = pkm_act(form=form)
    items, buckets = histories(model, SPEC, lengths)
    found_BLD = model.encode(items, buckets)
    literal = literal_last if form == "last" else literal_causal
    for b, length in enumerate(lengths):
        expected = literal(model, items[b, 12 - length :], buckets[b, 12 - length :])
        torch.testing.assert_close(
            found_BLD[b, 12 - length :], torch.stack(expected), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("form", ["last", "causal"])
def test_the_chosen_experts_can_be_counted(form):
    model = pkm_act(form=form)
    layers: Any = model.layers
    items, buckets = histories(model, SPEC, [12, 6, 0])
    chosen = model.chosen_experts(items, buckets)
    assert chosen.shape == (2, 3, 3)
    assert chosen.dtype == torch.int64
    for layer, experts_BK in zip(layers, chosen, strict=True):
        served: list[Tensor] = []
        hook = layer.experts.register_forward_hook(lambda _, __, out, to=served: to.append(out))
        model.encode(items, buckets)
        hook.remove()
        served_BKD = served[0][:, -1]
        values_BKD = layer.experts.keys.values.weight[experts_BK]
        torch.testing.assert_close(
            functional.normalize(served_BKD, dim=2), functional.normalize(values_BKD, dim=2)
        )


def test_without_product_keys_no_experts_are_chosen():
    model = pkm_act(product_keys=False)
    with pytest.raises(ValueError, match="a model without product keys chooses no experts"):
        model.chosen_experts(*histories(model, SPEC, [3]))


@pytest.mark.parametrize("form", ["last", "causal"])
def test_untrained_keys_learn_as_fast_as_the_experts(form):
    """Gradients that reach the keys must not be a trickle that an optimiser would lose in noise."""
    torch.manual_seed(0)
    model = PkmAct(
        ItemEncoder(N_ROWS, 16), SPEC, form=form, embedding_dim=16, n_layers=2, n_heads=2,
        ffn_units=32, dropout=0.0, keys_per_side=5, n_experts=3, chunk=4,
    )  # fmt: skip
    model.encode_last(*histories(model, SPEC, [12, 12, 10])).square().sum().backward()
    layers: Any = model.layers
    for layer in layers:
        keys = layer.experts.keys
        assert keys.sub_keys.grad.norm() > 0.01 * keys.values.weight.grad.norm()


@pytest.mark.parametrize("form", ["last", "causal"])
def test_the_last_layer_feeds_the_last_position_only(form):
    model = pkm_act(form=form, ffn_units=100)
    batch = histories(model, SPEC, [12])
    of_one_position = 2 * 2 * WIDTH * 100
    saved = flops(model.encode, *batch) - flops(model.encode_last, *batch)
    assert 11 * of_one_position < saved < 2 * 11 * of_one_position


def test_the_cost_of_the_causal_form_is_linear():
    spec = FeatureSpec(history_length=512, granularities=(AGE_SECONDS,))
    model = pkm_act(spec, form="causal", chunk=16, ffn_units=4)
    short, long = (histories(model, spec, [length], width=length) for length in (256, 512))
    assert flops(model.encode, *long) < 2.2 * flops(model.encode, *short)


@pytest.mark.parametrize(
    ("form", "granularities", "message"),
    [
        ("last", (AGE_SECONDS,), "needs one with scale = 'doubling', got .'age_seconds'"),
        ("causal", (HOURS, DAYS), "needs one with scale = 'linear'"),
    ],
    ids=["last", "causal"],
)
def test_time_features_need_their_scale(form, granularities, message):
    spec = FeatureSpec(history_length=12, granularities=granularities)
    with pytest.raises(ConfigError, match=message):
        pkm_act(spec, form=form)
    items, buckets = histories(pkm_act(), spec, [12, 3])
    model = pkm_act(spec, form=form, time_features=False)
    assert model.encode_last(items, buckets).isfinite().all()


def test_experts_must_fit_each_side():
    with pytest.raises(ValueError, match="each side of 5 keys must hold the experts"):
        pkm_act(n_experts=6)


def flops(function, *arguments: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return int(counter.get_total_flops())


# The model as its equations say, behavior by behavior: lists of vectors of one history without any
# padding, every sum a loop. Linear maps, layer norms and feed-forwards are the model's own. Parts
# are `Any`: nn.Module does not tell the types of its parts.


def literal_last(model: Any, items: Tensor, buckets: Tensor) -> list[Tensor]:
    encoder = model.tokens.history
    first_position = len(encoder.positions.weight) - len(items)
    x = [
        (
            model.items(item)
            + encoder.positions.weight[first_position + place]
            + encoder.buckets[0].weight[behavior[0]]
            + encoder.buckets[1].weight[behavior[1]]
        )
        * WIDTH**0.5
        for place, (item, behavior) in enumerate(zip(items, buckets, strict=True))
    ]
    for layer in model.layers:
        memory = [layer.norm(one) for one in x]
        tokens: Sequence[Tensor | None] = [None] * (layer.experts.query.length - len(x)) + memory
        for step in layer.experts.query.steps:
            tokens = literal_pooling(step, tokens, layer.experts.query.stride, causal=False)
        (query,) = tokens
        assert query is not None
        experts = literal_experts(layer.experts.keys, query)
        gathered = [
            one + literal_attention(layer.gathering.attention, one, memory) for one in experts
        ]
        x = [literal_action(layer, one, gathered) for one in x]
    return [model.norm(one) for one in x]


def literal_causal(model: Any, items: Tensor, buckets: Tensor) -> list[Tensor]:
    size, n = model.tokens.chunk, len(items)
    ages = [*buckets[:, 2].tolist(), 0]  # at the end: now
    chunk_of = [(n - 1 - place) // size for place in range(n)]  # 0 is the newest
    x = [
        (model.items(items[j]) + model.tokens.waits.weight[bucket(ages[j] - ages[j + 1])])
        * WIDTH**0.5
        for j in range(n)
    ]
    for layer in model.layers:
        memory = [layer.norm(one) for one in x]
        n_missing = -n % size
        pooled = literal_pooling(
            layer.experts.query.pooling, [None] * n_missing + memory, size, causal=True
        )
        gathered_of = {}
        for chunk in set(chunk_of):
            before = len(pooled) - 1 - chunk - 1
            query = layer.experts.query.start if before < 0 else pooled[before]
            assert query is not None
            earlier = [memory[j] for j in range(n) if chunk_of[j] > chunk]
            gathered_of[chunk] = [
                one + literal_kernel_attention(layer.gathering, one, earlier)
                for one in literal_experts(layer.experts.keys, query)
            ]
        following = []
        for i in range(n):
            near = [j for j in range(i + 1) if chunk_of[j] == chunk_of[i]]
            biases = [
                layer.nearby.distance_bias[:, i - j]
                + layer.nearby.time_bias[bucket(ages[j] - ages[i + 1])]
                for j in near
            ]
            seen = literal_attention(
                layer.nearby.attention, memory[i], [memory[j] for j in near], biases
            )
            following.append(literal_action(layer, x[i] + seen, gathered_of[chunk_of[i]]))
        x = following
    return [model.norm(one) for one in x]


def bucket(elapsed: int) -> int:
    return elapsed.bit_length()


def literal_action(layer: Any, x: Tensor, gathered: Sequence[Tensor]) -> Tensor:
    x = x + literal_attention(layer.dispatch.attention, layer.dispatch.norm(x), gathered)
    fed: Tensor = x + layer.feed_forward(layer.feed_forward_norm(x))
    return fed


def literal_pooling(
    pooling: Any, tokens: Sequence[Tensor | None], size: int, *, causal: bool
) -> list[Tensor | None]:
    groups = [tokens[first : first + size] for first in range(0, len(tokens), size)]
    merged: list[Tensor | None] = []
    for group in groups:
        members = [torch.zeros(WIDTH) if one is None else one for one in group]
        is_padding = all(one is None for one in group)
        merged.append(None if is_padding else pooling.merge(torch.cat(members)))
    if pooling.attention is None or pooling.norm is None:
        return merged
    attended: list[Tensor | None] = []
    for place, one in enumerate(merged):
        others = merged[: place + 1] if causal else merged
        memory = [pooling.norm(other) for other in others if other is not None]
        attended.append(
            None
            if one is None
            else one + literal_attention(pooling.attention, pooling.norm(one), memory)
        )
    return attended


def literal_experts(keys: Any, query: Tensor) -> list[Tensor]:
    """Scores all experts, sorts them and weights the best."""
    first, second = keys.query(query).chunk(2)
    n = keys.keys_per_side
    scores = {
        i * n + j: (first @ keys.sub_keys[0, :, i] + second @ keys.sub_keys[1, :, j]).item()
        for i in range(n)
        for j in range(n)
    }
    best = sorted(scores, key=lambda expert: -scores[expert])[: keys.n_experts]
    shares = torch.tensor([scores[expert] for expert in best]).softmax(0)
    return [
        keys.values.weight[expert] * share * keys.n_experts * WIDTH**0.5
        for expert, share in zip(best, shares, strict=True)
    ]


def literal_attention(
    attention: Any,
    query: Tensor,
    memory: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    size = WIDTH // attention.n_heads
    heads = []
    for head in range(attention.n_heads):
        part = slice(head * size, (head + 1) * size)
        scores, values = [], []
        for place, one in enumerate(memory):
            key, value = attention.key_value(one).chunk(2)
            bias = 0.0 if biases is None else biases[place][head]
            scores.append(attention.query(query)[part] @ key[part] / size**0.5 + bias)
            values.append(value[part])
        weights = torch.stack(scores).softmax(0)
        heads.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
    met: Tensor = attention.output(torch.cat(heads))
    return met


def literal_kernel_attention(gathering: Any, query: Tensor, memory: Sequence[Tensor]) -> Tensor:
    def phi(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.exp())

    size = WIDTH // gathering.n_heads
    heads = []
    for head in range(gathering.n_heads):
        part = slice(head * size, (head + 1) * size)
        total, weight_sum = torch.zeros(size), torch.zeros(())
        for one in memory:
            key, value = gathering.key_value(one).chunk(2)
            weight = phi(gathering.query(query)[part]) @ phi(key[part])
            total, weight_sum = total + weight * value[part], weight_sum + weight
        heads.append(total / weight_sum if memory else total)
    gathered: Tensor = gathering.output(torch.cat(heads))
    return gathered
