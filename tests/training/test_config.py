"""Run files: what is not known or not allowed is refused by the name of its key."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from contract.features import DAYS, HOURS
from training.config import (
    Bert4RecConfig,
    FpmcConfig,
    Gru4RecConfig,
    HstuConfig,
    ImnConfig,
    LinRecConfig,
    NextItemConfig,
    PkmActConfig,
    PopularityConfig,
    RunConfig,
    SasRecConfig,
    YouTubeDnnConfig,
    load_config,
    parse_config,
)
from training.errors import ConfigError

NAMED_RUNS = Path(__file__).parents[2] / "training" / "runs"
MINIMAL = 'name = "run"\n[model]\nname = "imn"\n'


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


class TestDefaults:
    def test_name_and_model_are_enough(self, tmp_path):
        config = load(tmp_path, MINIMAL)
        assert config.model == ImnConfig(name="imn")
        assert config.features.history_length == 1000
        assert config.features.granularities == (HOURS, DAYS)

    def test_split_is_that_of_the_imn_paper(self, tmp_path):
        data = load(tmp_path, MINIMAL).data
        assert (data.split, data.test_fraction, data.samples) == ("time", 0.2, "auto")

    def test_probabilities_are_those_of_the_samples_uncalibrated(self, tmp_path):
        config = load(tmp_path, MINIMAL)
        assert (config.data.click_rate, config.train.calibration) == (None, "none")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            pytest.param("imn", ImnConfig, id="imn"),
            pytest.param("youtube_dnn", YouTubeDnnConfig, id="youtube_dnn"),
            pytest.param("popularity", PopularityConfig, id="popularity"),
            pytest.param("fpmc", FpmcConfig, id="fpmc"),
            pytest.param("gru4rec", Gru4RecConfig, id="gru4rec"),
            pytest.param("sasrec", SasRecConfig, id="sasrec"),
            pytest.param("bert4rec", Bert4RecConfig, id="bert4rec"),
            pytest.param("linrec", LinRecConfig, id="linrec"),
            pytest.param("hstu", HstuConfig, id="hstu"),
            pytest.param("pkm_act", PkmActConfig, id="pkm_act"),
        ],
    )
    def test_the_name_of_the_model_chooses_its_settings(self, tmp_path, name, expected):
        assert isinstance(load(tmp_path, MINIMAL, f"model.name={name}").model, expected)

    def test_a_config_cannot_be_changed(self, tmp_path):
        config = load(tmp_path, MINIMAL)
        with pytest.raises(ValidationError, match="Instance is frozen"):
            config.train.seed = 2  # type: ignore[misc]


class TestFiles:
    def test_every_value_can_be_set(self, tmp_path):
        config = load(
            tmp_path,
            """
            name = "imn-3p+.v2"
            [features]
            history_length = 200
            granularities = [{ name = "minutes", unit_s = 60, n_buckets = 24 }]
            [data]
            split = "leave-one-out"
            samples = "negatives"
            negative_sampling = "popularity"
            n_negatives = 4
            min_item_count = 5
            max_candidates = 8
            unknown_rate = 0
            click_rate = 0.02
            [model]
            name = "imn"
            iterations = 1
            enhancement_steps = 2
            head_units = [32, 16, 8]
            item_features = ["category", "brand"]
            [train]
            seed = 0
            learning_rate = 1
            checkpoint_every_s = 0
            calibration = "isotonic"
            """,
        )
        assert config.features.granularities[0].unit_s == 60
        assert config.data.split == "leave-one-out"
        assert config.data.unknown_rate == 0
        assert config.data.click_rate == 0.02
        assert config.train.calibration == "isotonic"
        assert config.model == ImnConfig(
            name="imn",
            iterations=1,
            enhancement_steps=2,
            head_units=(32, 16, 8),
            item_features=("category", "brand"),
        )
        assert config.train.learning_rate == 1.0

    def test_every_ablation_of_imn_can_be_set(self, tmp_path):
        config = load(
            tmp_path,
            MINIMAL,
            "model.attention=dot",
            "model.weights=softmax",
            "model.walk=target",
            "model.segment=100",
        )
        assert config.model == ImnConfig(
            name="imn", attention="dot", weights="softmax", walk="target", segment=100
        )
        config = load(tmp_path, MINIMAL, "model.distance=false", "model.cross=delayed")
        assert config.model == ImnConfig(name="imn", distance=False, cross="delayed")

    def test_every_value_of_a_next_item_run_can_be_set(self, tmp_path):
        config = load(
            tmp_path,
            """
            name = "sasrec"
            [features]
            granularities = [
                { name = "age", unit_s = 1, n_buckets = 4294967296, scale = "linear" },
            ]
            [data]
            split = "leave-one-out"
            [next_item]
            loss = "sampled_softmax"
            negatives = "in-batch"
            n_negatives = 64
            logq = true
            exclude_own = false
            prefixes_per_user = 0
            rows = "all"
            same_length = true
            protocols = ["pop100", "uni100"]
            n_ranked = 50
            [model]
            name = "sasrec"
            positions = "relative"
            norm = "post"
            mask_padding = false
            user_embedding = true
            [train]
            validate_every = 5
            precision = "bf16"
            max_train_s = 90
            adam_beta2 = 0.98
            """,
        )
        assert config.features.granularities[0].scale == "linear"
        assert config.next_item == NextItemConfig(
            loss="sampled_softmax",
            negatives="in-batch",
            n_negatives=64,
            logq=True,
            exclude_own=False,
            prefixes_per_user=0,
            rows="all",
            same_length=True,
            protocols=("pop100", "uni100"),
            n_ranked=50,
        )
        assert config.model == SasRecConfig(
            name="sasrec",
            positions="relative",
            norm="post",
            mask_padding=False,
            user_embedding=True,
        )
        train = config.train
        assert (train.validate_every, train.precision, train.max_train_s) == (5, "bf16", 90.0)
        assert parse_config(config.model_dump(mode="json"), "dump") == config

    def test_what_was_dumped_as_json_parses_to_the_same(self, tmp_path):
        """The resolved config is kept beside what it produced, in checkpoints and manifests."""
        config = load(tmp_path, MINIMAL, "train.seed=5", "model.head_units=[3]")
        assert parse_config(json.loads(config.model_dump_json()), "dump") == config
        assert parse_config(config.model_dump(mode="json"), "dump") == config

    def test_no_category_as_it_was_said_once_is_no_feature(self, tmp_path):
        config = load(tmp_path, MINIMAL, "model.use_category=false")
        assert config == load(tmp_path, MINIMAL)

    def test_every_named_run_is_valid_and_called_like_its_file(self):
        """There may be none."""
        named = {path.stem: load_config(path).name for path in sorted(NAMED_RUNS.glob("*.toml"))}
        assert named == {stem: stem for stem in named}

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"away\.toml: not readable as TOML: .*No such file"):
            load_config(tmp_path / "away.toml")

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"name = ", id="half a line"),
            pytest.param(b"name = '\xff'", id="no utf-8"),
            pytest.param(b"a = 1\na = 2", id="a key twice"),
        ],
    )
    def test_a_file_that_is_no_toml(self, tmp_path, content):
        path = tmp_path / "run.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"run\.toml: not readable as TOML"):
            load_config(path)


class TestRefused:
    @pytest.mark.parametrize(
        ("override", "key"),
        [
            pytest.param("seed=1", "seed", id="top level"),
            pytest.param("train.sede=1", "train.sede", id="in a section"),
            pytest.param("model.layers=1", "model.imn.layers", id="in the model"),
            pytest.param("data.features.x=1", "data.features", id="a section of a section"),
            pytest.param("features.length=1", "features.length", id="in the features"),
        ],
    )
    def test_an_unknown_key_by_its_name(self, tmp_path, override, key):
        with pytest.raises(ConfigError, match=rf"run\.toml: {key}: Extra inputs are not permitted"):
            load(tmp_path, MINIMAL, override)

    @pytest.mark.parametrize(
        ("features", "reason"),
        [
            pytest.param(["brand", "category", "brand"], "names one of them twice", id="twice"),
            pytest.param(["Brand"], "should match pattern", id="no name"),
        ],
    )
    def test_features_of_items_that_cannot_be(self, tmp_path, features, reason):
        with pytest.raises(ConfigError, match=rf"model\.imn.*: .*{reason}"):
            load(tmp_path, MINIMAL, f"model.item_features={features}")

    @pytest.mark.parametrize("value", ["true", "1"])
    def test_a_category_as_it_was_asked_for_once(self, tmp_path, value):
        with pytest.raises(
            ConfigError, match=r"model\.use_category: has become model\.item_features = \['category"
        ):
            load(tmp_path, MINIMAL, f"model.use_category={value}")

    def test_a_setting_of_another_model(self, tmp_path):
        with pytest.raises(ConfigError, match=r"model\.youtube_dnn\.iterations: Extra inputs"):
            load(tmp_path, MINIMAL, "model.name=youtube_dnn", "model.iterations=2")

    def test_an_unknown_model_with_those_there_are(self, tmp_path):
        with pytest.raises(ConfigError, match=r"model: .*'none'.*'imn', 'youtube_dnn', 'din'"):
            load(tmp_path, MINIMAL, "model.name=none")

    @pytest.mark.parametrize(
        ("override", "reason"),
        [
            pytest.param("train.seed='1'", "train.seed: .*valid integer", id="text as integer"),
            pytest.param("train.seed=1.0", "train.seed: .*valid integer", id="float as integer"),
            pytest.param("train.seed=true", "train.seed: .*valid integer", id="bool as integer"),
            pytest.param("train.learning_rate=fast", "train.learning_rate: .*number", id="a word"),
            pytest.param("model.distance=1", "model.imn.distance: .*boolean", id="1 as bool"),
            pytest.param("model.head_units=64", "model.imn.head_units: .*", id="no list"),
            pytest.param(
                "model.item_features=category", "model.imn.item_features: .*", id="a word as list"
            ),
            pytest.param("train=3", "train: .*", id="a number as section"),
            pytest.param("name=5", "name: .*valid string", id="a number as name"),
        ],
    )
    def test_a_wrong_type(self, tmp_path, override, reason):
        with pytest.raises(ConfigError, match=reason):
            load(tmp_path, MINIMAL, override)

    @pytest.mark.parametrize(
        ("override", "reason"),
        [
            pytest.param("train.batch_size=0", "train.batch_size: .*or equal to 1", id="batch"),
            pytest.param("train.seed=-1", "train.seed: .*or equal to 0", id="seed"),
            pytest.param("train.learning_rate=0", "train.learning_rate: .*than 0", id="rate"),
            pytest.param("train.learning_rate=nan", "train.learning_rate: ", id="nan"),
            pytest.param(
                "data.test_fraction=1", "data.test_fraction: .*less than 1", id="fraction"
            ),
            pytest.param("data.unknown_rate=1", "data.unknown_rate: .*less than 1", id="unknown"),
            pytest.param("data.click_rate=0", "data.click_rate: .*greater than 0", id="no clicks"),
            pytest.param("data.click_rate=2", "data.click_rate: .*less than 1", id="percent"),
            pytest.param(
                "train.calibration=beta", "train.calibration: .*'isotonic'", id="calibration"
            ),
            pytest.param(
                "data.split=random", "data.split: .*'time' or 'leave-one-out'", id="split"
            ),
            pytest.param(
                "model.head_units=[0]", r"model.imn.head_units.0: .*equal to 1", id="units"
            ),
            pytest.param("features.history_length=0", "features.history_length: ", id="history"),
            pytest.param("features.granularities=[]", "features.granularities: ", id="no units"),
            pytest.param("name=IMN 3P", "name: .*pattern", id="name"),
            pytest.param("name=../run", "name: .*pattern", id="name with a path"),
        ],
    )
    def test_a_value_out_of_range(self, tmp_path, override, reason):
        with pytest.raises(ConfigError, match=reason):
            load(tmp_path, MINIMAL, override)

    @pytest.mark.parametrize(
        ("override", "reason"),
        [
            pytest.param("next_item.loss=hinge", "next_item.loss: .*'softmax'", id="loss"),
            pytest.param(
                "next_item.negatives=hard", "next_item.negatives: .*'in-batch'", id="negatives"
            ),
            pytest.param("next_item.n_negatives=0", "next_item.n_negatives: ", id="no negatives"),
            pytest.param(
                "next_item.prefixes_per_user=-1", "next_item.prefixes_per_user: ", id="prefixes"
            ),
            pytest.param("next_item.rows=oldest", "next_item.rows: .*'newest' or 'all'", id="rows"),
            pytest.param("next_item.protocols=[]", "next_item.protocols: ", id="no protocol"),
            pytest.param(
                'next_item.protocols=["pop1000"]',
                "next_item.protocols.0: .*'full', .*'uni100'",
                id="protocol",
            ),
            pytest.param(
                "next_item.logq=true", "next_item: .*logq corrects a sampled_softmax", id="logq"
            ),
            pytest.param(
                "next_item.negatives=in-batch",
                "next_item: .*negatives: in-batch goes with a sampled_softmax",
                id="in-batch",
            ),
            pytest.param("next_item.n_ranked=0", "next_item.n_ranked: ", id="ranked"),
            pytest.param("next_item.k=10", "next_item.k: Extra inputs", id="no such key"),
            pytest.param("train.validate_every=0", "train.validate_every: ", id="validate"),
            pytest.param("train.precision=fp16", "train.precision: .*'fp32' or 'bf16'", id="fp16"),
            pytest.param("train.max_train_s=-1", "train.max_train_s: ", id="less than no time"),
            pytest.param("train.max_train_s=inf", "train.max_train_s: ", id="endless"),
            pytest.param("train.adam_beta2=1", "train.adam_beta2: .*less than 1", id="beta"),
            pytest.param("model.dropout=1", "model.sasrec.dropout: .*less than 1", id="dropout"),
            pytest.param("model.layers=0", "model.sasrec.layers: ", id="no layers"),
            pytest.param("model.heads=0", "model.sasrec.heads: .*equal to 1", id="no heads"),
            pytest.param("model.norm=none", "model.sasrec.norm: .*'post' or 'query'", id="norm"),
        ],
    )
    def test_a_value_that_no_next_item_run_has(self, tmp_path, override, reason):
        with pytest.raises(ConfigError, match=reason):
            load(tmp_path, MINIMAL, "model.name=sasrec", override)

    @pytest.mark.parametrize(
        ("overrides", "reason"),
        [
            pytest.param(
                ["model.attention=dot", "model.distance=false"],
                "distance: attention = 'dot' sees no differences anyway",
                id="distance of dot products",
            ),
            pytest.param(
                ["model.attention=none", "model.distance=false"],
                "distance: attention = 'none' sees no differences anyway",
                id="distance of nothing",
            ),
            pytest.param(
                ["model.attention=none", "model.weights=softmax"],
                "weights: attention = 'none' makes none",
                id="no weights to normalise",
            ),
            pytest.param(
                ["model.attention=none", "model.walk=target"],
                "walk: attention = 'none' sees neither memory nor target",
                id="nothing is looked at",
            ),
            pytest.param(
                ["model.cross=delayed", "model.walk=target"],
                "walk: cross = 'delayed' keeps the target out of it",
                id="a target that is not there",
            ),
            pytest.param(
                ["model.cross=delayed", "model.enhancement_steps=1"],
                "enhancement_steps: each of them meets the target",
                id="an enhancement of a delayed cross",
            ),
            pytest.param(["model.segment=-1"], "segment: .*or equal to 0", id="a segment"),
            pytest.param(["model.walk=none"], "walk: .*'iterative' or 'target'", id="no walk"),
        ],
    )
    def test_ablations_of_imn_that_make_no_sense(self, tmp_path, overrides, reason):
        with pytest.raises(ConfigError, match=rf"model\.imn.*{reason}"):
            load(tmp_path, MINIMAL, *overrides)

    @pytest.mark.parametrize("name", ["sasrec", "bert4rec", "linrec", "hstu", "pkm_act"])
    def test_heads_that_cannot_share_the_width(self, tmp_path, name):
        settings = (f"model.name={name}", "model.embedding_dim=10", "model.heads=4")
        reason = rf"model\.{name}: .*heads: 4 of them do not divide embedding_dim = 10"
        with pytest.raises(ConfigError, match=reason):
            load(tmp_path, MINIMAL, *settings)

    @pytest.mark.parametrize(
        ("overrides", "reason"),
        [
            pytest.param(
                ["model.experts=9", "model.keys_per_side=8"],
                r"experts: 9 are more than keys_per_side = 8",
                id="more than a side has",
            ),
            pytest.param(
                ["model.embedding_dim=15", "model.heads=3"],
                r"embedding_dim: product keys need an even one, got 15",
                id="an odd width",
            ),
        ],
    )
    def test_experts_that_product_keys_cannot_name(self, tmp_path, overrides, reason):
        """Without product keys there is nothing to name."""
        with pytest.raises(ConfigError, match=reason):
            load(tmp_path, MINIMAL, "model.name=pkm_act", *overrides)
        load(tmp_path, MINIMAL, "model.name=pkm_act", "model.product_keys=false", *overrides)

    def test_all_reasons_at_once(self, tmp_path):
        with pytest.raises(ConfigError, match=r"name: Field required; model: Field required"):
            load(tmp_path, "")

    @pytest.mark.parametrize(
        "override",
        [
            pytest.param('features.history_length="50"', id="text"),
            pytest.param("features.history_length=50.0", id="float"),
        ],
    )
    def test_a_wrong_type_in_the_features(self, tmp_path, override):
        with pytest.raises(ConfigError, match=r"features\.history_length: .*valid integer"):
            load(tmp_path, MINIMAL, override)

    @pytest.mark.parametrize("override", ["name=2024-01-01", "train.seed=07:30:00"])
    def test_a_date_or_time(self, tmp_path, override):
        with pytest.raises(ConfigError, match=r"name|seed"):
            load(tmp_path, MINIMAL, override)

    def test_an_infinite_learning_rate(self, tmp_path):
        with pytest.raises(ConfigError, match=r"train\.learning_rate"):
            load(tmp_path, MINIMAL, "train.learning_rate=inf")


class TestOverrides:
    def test_replace_single_values_the_last_one_wins(self, tmp_path):
        text = MINIMAL + "[train]\nseed = 1\npatience = 7\n"
        config = load(tmp_path, text, "train.seed=2", "train.seed=3")
        assert config.train.seed == 3
        assert config.train.patience == 7

    @pytest.mark.parametrize(
        ("override", "section", "key", "value"),
        [
            pytest.param("data.split=leave-one-out", "data", "split", "leave-one-out", id="word"),
            pytest.param("data.split='time'", "data", "split", "time", id="quoted"),
            pytest.param("train.learning_rate=3e-4", "train", "learning_rate", 3e-4, id="float"),
            pytest.param("train.weight_decay=0", "train", "weight_decay", 0.0, id="0 as float"),
            pytest.param("model.distance=false", "model", "distance", False, id="bool"),
            pytest.param("model.head_units=[9, 8]", "model", "head_units", (9, 8), id="list"),
            pytest.param("model.head_units=[]", "model", "head_units", (), id="empty list"),
        ],
    )
    def test_values_are_toml_bare_words_are_strings(self, tmp_path, override, section, key, value):
        config = load(tmp_path, MINIMAL, override)
        assert getattr(getattr(config, section), key) == value

    def test_a_section_may_be_new(self, tmp_path):
        assert load(tmp_path, 'name = "x"\n', "model.name=popularity").model.name == "popularity"

    @pytest.mark.parametrize("override", ["train.seed", "=3", "", "seed 3"])
    def test_without_key_and_value_is_refused(self, tmp_path, override):
        with pytest.raises(ConfigError, match=rf"--set '{override}': expected section\.key=value"):
            load(tmp_path, MINIMAL, override)

    def test_below_a_value_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"--set 'name\.x=1': name is not a section"):
            load(tmp_path, MINIMAL, "name.x=1")
