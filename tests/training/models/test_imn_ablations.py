"""IMN's ablations: each is what its equation says, written with plain loops, and keeps the
contract's promises.
"""

import math
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from exporter.convert import convert
from tests.training.models.click_checks import (
    assert_company_changes_nothing,
    assert_every_parameter_learns,
    assert_exports,
    assert_order_of_candidates_is_free,
    assert_padding_changes_nothing,
    operators,
)
from tests.training.models.inputs import N_ROWS, SPEC, imn, inputs
from tests.training.models.literal_imn import literal_gru
from training.config import ImnConfig
from training.errors import ConfigError
from training.models.build import Scorer, build_model
from training.models.encoder import ItemEncoder
from training.models.imn import (
    DotAttention,
    EvenWeights,
    IterativeMemoryNetwork,
    MultiWayAttention,
    with_ones,
)

WIDTH = 6
IMN_SETTINGS = ("attention", "weights", "distance", "walk", "cross", "segment")
SINGLE: list[dict[str, Any]] = [
    {"attention": "none"},
    {"attention": "dot"},
    {"weights": "softmax"},
    {"distance": False},
    {"walk": "target"},
    {"cross": "delayed"},
    {"segment": 5},
]
EXPORTED: list[dict[str, Any]] = [
    {"attention": "none"},
    {"attention": "dot", "walk": "target"},
    {"weights": "softmax", "cross": "delayed"},
    {"distance": False, "segment": 5},
]
TOGETHER: list[dict[str, Any]] = [
    *EXPORTED[1:],
    {"segment": 1},
    {"attention": "none", "cross": "delayed", "segment": 4},
    {"attention": "dot", "weights": "softmax", "cross": "delayed", "segment": 3},
    {"weights": "softmax", "distance": False, "walk": "target", "segment": 4},
]


def named(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


every_ablation = pytest.mark.parametrize("settings", [*SINGLE, *TOGETHER], ids=named)


def ablated(settings: dict[str, Any], iterations: int = 2) -> IterativeMemoryNetwork:
    """Return an untrained IMN with weights large enough that every term of it matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = IterativeMemoryNetwork(
            ItemEncoder(N_ROWS, WIDTH),
            SPEC,
            embedding_dim=WIDTH,
            iterations=iterations,
            enhancement_steps=0 if settings.get("cross") == "delayed" else 2,
            attention_units=4,
            head_units=(8,),
            **settings,
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        with torch.no_grad():
            model.items.items.weight[0].zero_()
    return model.eval()


class Literal:
    """The model one candidate, one pass, one behavior at a time, with the weights of `model`."""

    def __init__(self, model: IterativeMemoryNetwork, settings: dict[str, Any]) -> None:
        self.model = model
        self.settings = {
            **ImnConfig(name="imn").model_dump(include=set(IMN_SETTINGS)),
            **settings,
        }

    def logits(self, items: Tensor, buckets: Tensor, candidates: Tensor) -> Tensor:
        history = self.model.history(self.model.items, items, buckets)
        rows = []
        for encoded, of_items, of_candidates in zip(history, items, candidates, strict=True):
            behaviors = [e for e, row in zip(encoded, of_items, strict=True) if row != 0]
            rows.append(
                torch.stack([self.logit(behaviors, self.model.items(v)) for v in of_candidates])
            )
        return torch.stack(rows)

    def logit(self, behaviors: list[Tensor], v: Tensor) -> Tensor:
        model, segment = self.model, self.settings["segment"]
        if segment:
            memories: list[Tensor] = []
            while behaviors:
                behaviors, newest = behaviors[:-segment], behaviors[-segment:]
                memories.insert(0, self.walk(model.attentions, model.memory, newest, v, segment))
            n_segments = math.ceil(SPEC.history_length / segment)
            u = self.walk(model.segment_attentions, model.segment_memory, memories, v, n_segments)
        else:
            length = SPEC.history_length
            u = self.walk(model.attentions, model.memory, behaviors, v, length)
        for transform in model.transforms:
            assert model.enhancement is not None
            u = literal_gru(model.enhancement, torch.cat([transform(u), v]), u)
        logit: Tensor = model.head(torch.cat([u, v]))
        return logit

    def walk(
        self,
        attentions: nn.ModuleList,
        cell: nn.GRUCell,
        behaviors: list[Tensor],
        v: Tensor,
        full_length: int,
    ) -> Tensor:
        m = v if self.model.start is None else self.model.start.weight[0]
        for attention in attentions:
            u = torch.zeros_like(v)
            if self.settings["attention"] == "none":
                total = min(0.5 * full_length, 10.0)
                weights = [v.new_tensor(total / len(behaviors)) for _ in behaviors]
            else:
                weights = self.weights(attention, behaviors, m, v)
            for w, e in zip(weights, behaviors, strict=True):
                u = u + w * e
            m = literal_gru(cell, u, m)
        return m

    def weights(
        self, attention: nn.Module, behaviors: list[Tensor], m: Tensor, v: Tensor
    ) -> list[Tensor]:
        met = [v if self.settings["walk"] == "target" else m, v]
        if self.settings["cross"] == "delayed":
            met = [m]
        scores = [self.score(attention, e, met) for e in behaviors]
        if self.settings["weights"] == "softmax":
            total = sum(torch.exp(score) for score in scores)
            return [torch.exp(score) / total for score in scores]
        return [1 / (1 + torch.exp(-score)) for score in scores]

    def score(self, attention: nn.Module, e: Tensor, met: list[Tensor]) -> Tensor:
        assert isinstance(attention, MultiWayAttention | DotAttention)
        if isinstance(attention, DotAttention):
            features = torch.stack([(e @ one) / math.sqrt(WIDTH) for one in met])
        else:
            differences = [e - one for one in met] if self.settings["distance"] else []
            products = [e * one for one in met]
            features = torch.sigmoid(attention.hidden(torch.cat([*differences, *products])))
        score: Tensor = attention.output(features)[0]
        return score


@every_ablation
def test_every_ablation_is_the_literal_one(settings):
    model = ablated(settings).double()
    batch = inputs([12, 0, 1, 7, 5], n_candidates=2)
    expected = Literal(model, settings).logits(*batch)
    torch.testing.assert_close(model(*batch), expected, rtol=1e-10, atol=1e-12)


@every_ablation
def test_padding_on_the_left_changes_nothing(settings):
    assert_padding_changes_nothing(ablated(settings), tolerance=1e-5)


@every_ablation
def test_company_and_the_order_of_candidates_change_nothing(settings):
    assert_company_changes_nothing(ablated(settings), tolerance=1e-5)
    assert_order_of_candidates_is_free(ablated(settings), tolerance=1e-5)


@every_ablation
def test_every_parameter_learns(settings):
    assert_every_parameter_learns(ablated(settings))


@pytest.mark.parametrize("settings", EXPORTED, ids=named)
def test_ablations_export_with_every_axis_free(settings, tmp_path):
    """Every setting is in one of these."""
    graph = assert_exports(ablated(settings, 1), tmp_path)
    assert not {"Loop", "Scan", "If"} & set(operators(graph))


def test_without_ablations_names_and_graph_stay_what_they_were(tmp_path):
    model, path = imn(iterations=3, enhancement_steps=3), tmp_path / "model.onnx"
    attention = [f"{part}.{one}" for part in ("hidden", "output") for one in ("weight", "bias")]
    cell = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    assert set(model.state_dict()) == {
        "items.items.weight",
        "history.positions.weight",
        *(f"history.buckets.{g}.weight" for g in range(2)),
        *(f"attentions.{n}.{one}" for n in range(3) for one in attention),
        *(f"memory.{one}" for one in cell),
        *(f"transforms.{n}.weight" for n in range(3)),
        *(f"enhancement.{one}" for one in cell),
        *(f"head.layers.{n}.{one}" for n in (0, 2) for one in ("weight", "bias")),
    }
    convert(Scorer(model, "probability"), SPEC, path)
    assert len(onnx.load(path).graph.node) == 214


@pytest.mark.parametrize("settings", [{}, *SINGLE[:-1]], ids=named)
def test_nothing_as_wide_as_the_behaviors_is_made_for_every_candidate(settings):
    """A hidden unit for each candidate and behavior is the most there is."""
    n_candidates = 40
    with LargestTensor() as largest:
        ablated(settings)(*inputs([12], n_candidates=n_candidates))
    assert 0 < largest.numel < n_candidates * SPEC.history_length * WIDTH


class LargestTensor(TorchDispatchMode):
    """Watches what operators return."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("segment", [0, 5], ids="segment={}".format)
def test_a_delayed_cross_walks_once_for_a_request(segment):
    model, widths = ablated({"cross": "delayed", "segment": segment}), []
    for module in model.modules():
        if isinstance(module, MultiWayAttention):
            module.register_forward_hook(lambda _, __, weights: widths.append(weights.shape[1]))
    model(*inputs([12, 3], n_candidates=5))
    assert widths == [1] * (4 if segment else 2)


def test_a_walk_without_feedback_is_another_only_from_the_second_pass_on():
    batch = inputs([12, 5])
    for iterations in (1, 2):
        fed, unfed = (ablated({"walk": walk}, iterations) for walk in ("iterative", "target"))
        assert torch.allclose(fed(*batch), unfed(*batch)) == (iterations == 1)


@pytest.mark.parametrize("length", [10, 1000])
def test_reads_of_a_full_history_start_alike(length):
    """Dot products that are 0 leave the bias: the weights of an untrained attention."""
    history = with_ones(torch.randn(1, length, 8), torch.ones(1, length))
    nothing = torch.zeros(1, 1, 8)
    expected = min(length / 2, 10)
    for attention in (DotAttention(length), EvenWeights(length)):
        assert attention(history, nothing, nothing).sum().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "attention",
    [MultiWayAttention(4, 3, weights="softmax"), DotAttention(weights="softmax")],
    ids=["multiway", "dot"],
)
def test_softmax_weights_add_up_to_one_without_padding(attention):
    is_behavior = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    history = torch.randn(2, 5, 4) * is_behavior.unsqueeze(2)
    way = torch.randn(2, 3, 4)
    weights = attention(with_ones(history, is_behavior), way, way)
    assert weights[0, :, :2].eq(0).all()
    assert weights[0, :, 2:].gt(0).all()
    assert weights[1].eq(0).all()
    torch.testing.assert_close(weights[0].sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("segment", [12, 13])
def test_one_segment_for_a_whole_history_is_refused(segment):
    with pytest.raises(ConfigError, match=rf"segment: one of {segment} holds all .* = 12"):
        ablated({"segment": segment})


@every_ablation
def test_settings_reach_the_model(settings):
    model = ablated(settings)
    config = ImnConfig(
        name="imn",
        embedding_dim=WIDTH,
        iterations=2,
        enhancement_steps=len(model.transforms),
        attention_units=4,
        head_units=(8,),
        **settings,
    )
    built = build_model(config, SPEC, item_counts=torch.ones(N_ROWS), features_of_row=None)
    built.load_state_dict(model.state_dict())
    batch = inputs([12, 5])
    assert torch.equal(built.eval()(*batch), model(*batch))
