"""HSTU: the layers are the paper's equations, and the rules of next-item models hold."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch import nn

from contract.bundle import OUTPUT_NAME
from contract.encoding import ModelInputs
from contract.features import AGE_SECONDS, DAYS, FeatureSpec, Granularity
from exporter.convert import convert
from exporter.parity import VALUE_TOLERANCE, open_session
from tests.training.models import next_item_checks as checks
from tests.training.models.next_item_checks import N_ROWS, SPEC
from training.errors import ConfigError
from training.models.encoder import ItemEncoder
from training.models.hstu import HSTU, HSTULayer, elapsed_buckets
from training.models.next_item import NextItemModel

WIDTH = 6
TEMPERATURE = 0.5
BIASES = {
    "both biases": {"time_bias": True, "position_bias": True},
    "time": {"time_bias": True, "position_bias": False},
    "position": {"time_bias": False, "position_bias": True},
    "neither": {"time_bias": False, "position_bias": False},
}
every_bias = pytest.mark.parametrize("biases", BIASES.values(), ids=BIASES)


def hstu(spec=SPEC, *, n_layers=2, n_heads=2, **biases) -> NextItemModel:
    """Return a small HSTU with weights that make every term matter."""
    return checks.with_large_weights(
        HSTU(
            ItemEncoder(N_ROWS, WIDTH),
            spec,
            embedding_dim=WIDTH,
            n_layers=n_layers,
            n_heads=n_heads,
            dropout=0.3,
            temperature=TEMPERATURE,
            **biases,
        )
    )


@every_bias
@pytest.mark.parametrize("n_heads", [1, 2])
def test_each_vector_is_that_of_the_equations(n_heads, biases):
    """Over the behaviors alone, without padding, one position, head and key at a time."""
    model = hstu(n_heads=n_heads, **biases).double()
    assert isinstance(model, HSTU)
    items, buckets = checks.histories(model, SPEC, [12, 7, 1])
    buckets[0, [3, 8]] = buckets[0, [8, 3]]  # a clock was set back
    vectors = model.encode(items, buckets).detach().numpy()
    for row, length in enumerate((12, 7, 1)):
        expected = literal_hstu(
            model, items[row, -length:].tolist(), buckets[row, -length:, 2].tolist()
        )
        np.testing.assert_allclose(vectors[row, -length:], expected, rtol=1e-9, atol=1e-12)


def literal_hstu(model: HSTU, items: list[int], ages: list[int]) -> np.ndarray:
    """Return the user vector at each of the behaviors, oldest first."""
    n = model.history_length + 1
    places = range(model.history_length - len(items), model.history_length)
    x = [
        weights(model.items.items)[item] * np.sqrt(WIDTH) + weights(model.positions)[place]
        for item, place in zip(items, places, strict=True)
    ]
    # Times, and that of what follows the last behavior: the ranking time.
    times = [-age for age in ages] + [0]
    for layer in model.layers:
        assert isinstance(layer, HSTULayer)
        normed = [layer_norm(x_i) for x_i in x]
        u, q = zip(*(np.split(silu(weights(layer.gate_query) @ z), 2) for z in normed), strict=True)
        v, k = zip(*(np.split(silu(weights(layer.value_key) @ z), 2) for z in normed), strict=True)
        y = []
        for i in range(len(x)):
            heads = [
                sum(
                    silu(q[i][head] @ k[j][head] + rab(layer, times, i, j)) / n * v[j][head]
                    for j in range(i + 1)
                )
                for head in np.split(np.arange(WIDTH), layer.n_heads)
            ]
            read = layer_norm(np.concatenate(heads))
            y.append(weights(layer.output) @ (u[i] * read) + weights(layer.output, "bias") + x[i])
        x = y
    return np.array([x_i / np.linalg.norm(x_i) / model.temperature for x_i in x])


def rab(layer: HSTULayer, times: list[int], i: int, j: int) -> float:
    bias = 0.0
    if layer.distance_bias is not None:
        bias += layer.distance_bias[i - j].item()
    if layer.time_bias is not None:
        elapsed = abs(times[i + 1] - times[j])
        bias += layer.time_bias[int(np.log(max(1, elapsed)) / 0.301)].item()
    return bias


def weights(module: nn.Module, name: str = "weight") -> np.ndarray:
    array: np.ndarray = getattr(module, name).detach().numpy()
    return array


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


@every_bias
def test_padding_changes_nothing(biases):
    checks.assert_padding_changes_nothing(hstu(**biases))


def test_the_company_changes_nothing():
    checks.assert_company_changes_nothing(hstu())


@every_bias
def test_an_empty_history_is_finite(biases):
    checks.assert_empty_history_is_finite(hstu(**biases))


@every_bias
@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_last_vector_is_that_of_all(n_layers, biases):
    checks.assert_last_equals_encode(hstu(n_layers=n_layers, **biases))


def test_it_is_causal():
    checks.assert_causal(hstu())


@every_bias
def test_every_parameter_learns(biases):
    checks.assert_every_parameter_learns(hstu(**biases))


def test_it_exports(tmp_path):
    """To the tolerance of a score of 1, where the largest is 1 / temperature."""
    checks.assert_exports(hstu(), SPEC, tmp_path, tolerance=VALUE_TOLERANCE / TEMPERATURE)


def test_one_layer_without_a_time_bias_exports(tmp_path):
    spec = FeatureSpec(history_length=12)
    model = hstu(spec, n_layers=1, time_bias=False)
    checks.assert_exports(model, spec, tmp_path, tolerance=VALUE_TOLERANCE / TEMPERATURE)


def test_users_and_items_meet_at_an_angle():
    """Scores are cosines over the temperature."""
    model = hstu()
    items, buckets = checks.histories(model, SPEC, [12, 3])
    lengths = model.encode(items, buckets)[items != 0].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1 / TEMPERATURE))
    table = model.item_table()
    torch.testing.assert_close(table[1:].norm(dim=-1), torch.ones(N_ROWS - 1))
    assert (table[0] == 0).all()
    torch.testing.assert_close(model.item_vectors(torch.tensor([[3, 0]])), table[[3, 0]][None])


def test_the_ranking_time_matters_at_the_last_position_only():
    model = hstu()
    items, buckets = checks.histories(model, SPEC, [12])
    later = buckets.clone()
    later[:, :, 2] += 10**6
    before, after = model.encode(items, buckets), model.encode(items, later)
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1], rtol=1e-3, atol=1e-3)


def test_buckets_of_elapsed_time_are_those_of_the_research_code():
    """[1, 1.35), [1.35, 1.83), ... seconds: 1, then 2 after an empty bucket, ..., a year, 2^32."""
    elapsed = torch.tensor([0, 1, 2, 3, 4, 60, 86_400, 31_536_000, 2**32 - 1])
    assert elapsed_buckets(elapsed).tolist() == [0, 0, 2, 3, 4, 13, 37, 57, 73]


def beside_the_edges() -> tuple[list[int], list[Decimal]]:
    """Return the whole numbers on both sides of every bucket's edge below 2^32, and their exact
    places on the scale.
    """
    width = Decimal("0.301")
    with localcontext(prec=40):
        below = [int((width * k).exp()) for k in range(1, 74)]
        elapsed = [*below, *(n + 1 for n in below)]
        return elapsed, [Decimal(n).ln() / width for n in elapsed]


def test_no_whole_number_is_close_to_the_edge_of_a_bucket():
    _, places = beside_the_edges()
    assert min(abs(place - round(place)) for place in places if place) > Decimal("1e-10")


def test_the_bucket_is_right_on_both_sides_of_every_edge(tmp_path):
    """In torch and in an exported graph alike."""
    elapsed, places = beside_the_edges()
    expected = [int(place) for place in places]
    assert elapsed_buckets(torch.tensor(elapsed)).tolist() == expected
    convert(_BucketsOfCandidates(), SPEC, tmp_path / "buckets.onnx")
    session = open_session(tmp_path / "buckets.onnx")
    nothing = np.zeros((1, 1), dtype=np.int64)
    feed = ModelInputs(
        history_items=nothing,
        history_buckets=np.zeros((1, 1, len(SPEC.granularities)), dtype=np.int64),
        candidate_items=np.array([elapsed]),
    ).as_feed()
    (buckets,) = session.run([OUTPUT_NAME], feed)
    assert buckets[0].tolist() == expected


class _BucketsOfCandidates(nn.Module):
    def forward(self, _items, _buckets, candidates):
        return elapsed_buckets(candidates).float()


def test_only_a_time_bias_needs_ages():
    spec = FeatureSpec(history_length=5, granularities=(DAYS,))
    with pytest.raises(ConfigError, match=r"the time bias of HSTU needs one with scale = 'linear'"):
        hstu(spec, time_bias=True)
    model = hstu(spec, time_bias=False)
    items, buckets = checks.histories(model, spec, [5])
    assert torch.equal(model.encode(items, buckets + 3), model.encode(items, buckets))


@pytest.mark.parametrize(
    ("age", "n_buckets"),
    [
        (AGE_SECONDS, 74),
        (Granularity(name="age_days", unit_s=86_400, n_buckets=3, scale="linear"), 3),
        (Granularity(name="nothing", unit_s=1, n_buckets=1, scale="linear"), 1),
    ],
    ids=["seconds", "days", "nothing"],
)
def test_there_is_a_weight_for_every_bucket_that_can_occur(age, n_buckets):
    model = hstu(FeatureSpec(history_length=5, granularities=(age,)))
    assert isinstance(model, HSTU)
    (layer, _) = model.layers
    assert isinstance(layer, HSTULayer)
    assert layer.time_bias is not None
    assert len(layer.time_bias) == n_buckets


def test_heads_must_share_the_width():
    with pytest.raises(ValueError, match="a width of 6 cannot be shared by 4 heads"):
        hstu(n_heads=4)
