"""From settings to models: every one is built, and no setting is lost on the way."""

from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel, TypeAdapter
from torch import Tensor, nn

from contract.catalogue import FIRST_ROW
from contract.features import AGE_SECONDS, DAYS, HOURS, FeatureSpec
from tests.training.models.next_item_checks import histories
from training.config import ClickModelConfig, ModelConfig, NextItemModelConfig, SasRecConfig
from training.errors import ConfigError
from training.models.build import Scorer, build_model, score_kind
from training.models.next_item import NextItemModel

SPEC = FeatureSpec(history_length=12, granularities=(HOURS, DAYS, AGE_SECONDS))
N_ROWS, N_USERS = 20, 3
COUNTS = torch.arange(N_ROWS)
ROWS = (torch.arange(N_ROWS) - FIRST_ROW).clamp(min=0)
FEATURES = {"brand": ROWS % 5, "category": ROWS % 3}


def by_name(configs: tuple[type[BaseModel], ...]) -> dict[str, type[BaseModel]]:
    return {get_args(one.model_fields["name"].annotation)[0]: one for one in configs}


NAMES = by_name(get_args(NextItemModelConfig))
CLICK_NAMES = by_name(get_args(ClickModelConfig))


def config_of(name: str, **settings: object) -> ModelConfig:
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python({"name": name, **settings})
    return config


def build(config: ModelConfig, **options: Any) -> nn.Module:
    return build_model(
        config,
        SPEC,
        **{
            "item_counts": COUNTS,
            "features_of_row": None,
            "n_users": N_USERS,
            "seed": 1,
            **options,
        },
    )


@pytest.mark.parametrize("name", [*NAMES, *CLICK_NAMES, "popularity"])
class TestEveryModel:
    def test_is_built_from_its_name_alone_and_scores(self, name):
        model = build(config_of(name)).eval()
        assert isinstance(model, NextItemModel) == (name in NAMES)
        items = torch.tensor([[0, 0, 3, 1], [0, 0, 0, 0], [4, 5, 6, 7]])
        candidates = torch.tensor([[2, 1, 0]] * 3)
        scores = model(items, torch.zeros(3, 4, 3, dtype=torch.int64), candidates)
        assert scores.shape == (3, 3)
        assert scores.isfinite().all()

    def test_is_the_same_from_a_seed_which_torch_does_not_notice(self, name):
        before = torch.random.get_rng_state()
        one, same, other = (build(config_of(name), seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), before)
        weights, again = one.state_dict(), same.state_dict()
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[key], again[key]) for key in weights)
        if name != "popularity":
            drawn = other.state_dict()
            assert any(not torch.equal(weights[key], drawn[key]) for key in weights)

    def test_says_what_its_scores_mean(self, name):
        kind = score_kind(config_of(name))
        assert kind == ("probability" if name in CLICK_NAMES else "affinity")


def test_a_seed_is_not_needed():
    with torch.random.fork_rng(devices=[]):
        one, other = (build(config_of("sasrec"), seed=None).state_dict() for _ in range(2))
    assert any(not torch.equal(one[key], other[key]) for key in one)


# Where a setting matters only beside another.
BESIDE: dict[str, dict[str, Any]] = {
    "sasrec.user_dropout": {"user_embedding": True},
    "sasrec.codebook_size": {"codes": 4},
    "sasrec.quantisation": {"codes": 4},
    "pkm_act.chunk": {"form": "causal"},
}
# Where half of what is there unless said is the same, or means the same to the model.
ANOTHER = {
    "dien.auxiliary_weight": 0.0,
    "mimn.utilisation_weight": 0.3,
    "sasrec_click.dropout": 0.1,
}
SETTINGS = [
    (name, setting)
    for name, config in {**NAMES, **CLICK_NAMES}.items()
    for setting in config.model_fields
    if setting != "name" and name != "imn"  # whose settings have tests beside the model's
]


def another(name: str, setting: str) -> object:
    """Return a value of the setting other than the one it has unless said."""
    if f"{name}.{setting}" in ANOTHER:
        return ANOTHER[f"{name}.{setting}"]
    field = {**NAMES, **CLICK_NAMES}[name].model_fields[setting]
    default = field.default
    if setting == "item_features":
        return ("category",)
    if isinstance(default, tuple):
        return (*default, 8)
    if isinstance(default, str):
        return next(value for value in get_args(field.annotation) if value != default)
    if isinstance(default, bool):
        return not default
    return 2 * default or 4 if isinstance(default, int) else default / 2


def shape_of(model: nn.Module) -> dict[str, object]:
    """Return everything that settings decide: shapes of weights, and numbers that modules keep."""
    found: dict[str, object] = {key: value.shape for key, value in model.state_dict().items()}
    for where, module in model.named_modules():
        found[where] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str):
                found[f"{where}.{key}"] = value
    return found


@pytest.mark.parametrize(
    ("name", "setting"), SETTINGS, ids=[f"{name}.{setting}" for name, setting in SETTINGS]
)
def test_every_setting_reaches_the_model(name, setting):
    beside = BESIDE.get(f"{name}.{setting}", {})
    plain = build(config_of(name, **beside), features_of_row=FEATURES)
    changed = build(
        config_of(name, **beside, **{setting: another(name, setting)}), features_of_row=FEATURES
    )
    assert shape_of(plain) != shape_of(changed)


@pytest.mark.parametrize("name", CLICK_NAMES)
def test_features_of_items_are_those_that_the_settings_name(name):
    model = build(
        config_of(name, item_features=("category", "brand")),
        features_of_row={"author": ROWS, **FEATURES},
    )
    assert torch.equal(model.get_buffer("items.features.0.of_row"), FEATURES["category"])
    assert torch.equal(model.get_buffer("items.features.1.of_row"), FEATURES["brand"])
    assert "items.features.2.of_row" not in model.state_dict()


class TestUsers:
    def test_have_embeddings_where_the_settings_ask_for_them(self):
        model = build(SasRecConfig(name="sasrec", user_embedding=True))
        assert model.get_parameter("users.weight").shape == (N_USERS + 1, 64)

    def test_have_none_else(self):
        assert "users.weight" not in build(SasRecConfig(name="sasrec")).state_dict()

    def test_have_factors_of_their_own_in_fpmcs_table(self):
        model = build(config_of("fpmc", user_factor="table"))
        assert model.get_parameter("users.weight").shape[0] == N_USERS + 1


class TestRefused:
    @pytest.mark.parametrize(
        "config",
        [
            pytest.param(config_of("hstu"), id="hstu"),
            pytest.param(config_of("pkm_act", form="causal"), id="causal pkm_act"),
        ],
    )
    def test_models_of_time_without_a_linear_granularity(self, config):
        with pytest.raises(ConfigError, match=r"features\.granularities: .*scale = 'linear'"):
            build_model(config, FeatureSpec(), item_counts=COUNTS, features_of_row=None, seed=1)

    @pytest.mark.parametrize("name", CLICK_NAMES)
    @pytest.mark.parametrize(
        ("features", "has"),
        [
            pytest.param(None, "no features of items", id="none"),
            pytest.param(FEATURES, "brand, category", id="others"),
        ],
    )
    def test_features_that_a_log_has_not(self, name, features, has):
        config = config_of(name, item_features=("category", "author"))
        missing = "'category'" if features is None else "'author'"
        with pytest.raises(
            ConfigError, match=rf"model\.item_features: the log has no {missing}; it has {has}"
        ):
            build(config, features_of_row=features)


class TestScorer:
    def scores(self, kind: Any) -> tuple[Tensor, Tensor]:
        model = build(config_of("sasrec")).eval()
        assert isinstance(model, NextItemModel)
        items, buckets = histories(model, SPEC, [12, 3])
        inputs = items, buckets, torch.tensor([[2, 3], [4, 5]])
        return Scorer(model, kind)(*inputs), model(*inputs)

    def test_leaves_affinities_as_they_are(self):
        scores, outputs = self.scores("affinity")
        assert torch.equal(scores, outputs)

    def test_makes_probabilities_of_logits(self):
        scores, outputs = self.scores("probability")
        torch.testing.assert_close(scores, 1 / (1 + torch.exp(-outputs)))
