"""Runs of click models side by side: which data each is of, which of them stands for its model, and
what the others vary.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from training.comparison.runs import FinishedRun, read_run
from training.comparison.setups import Setup, setups
from training.comparison.tables import figure_name
from training.config import ImnConfig, RunConfig
from training.data.click_data import reads_impressions
from training.data.log import PreparedLog
from training.errors import ConfigError

Samples = Literal["impressions", "negatives"]
Kind = Literal["ablation", "length", "side features", "other"]

# What may differ beside the one setting that makes a variant.
_BUDGET = ("train.max_train_s", "train.max_epochs", "train.patience", "train.batch_size")
_LENGTH = "features.history_length"
_FEATURES = "model.item_features"
_SAMPLES = "data.samples"
# What decides which samples are tested, beside data.samples.
_TESTED = (
    "data.split",
    "data.test_fraction",
    "data.valid_fraction",
    "data.holdout_steps",
    "data.n_negatives",
    "data.negative_sampling",
    "data.max_candidates",
    "data.min_item_count",
)
# Of IMN's settings the values that ablate a part; any segment above 0 does, too.
_ABLATIONS: dict[str, dict[object, str]] = {
    "attention": {"none": "without_attention", "dot": "dot_product"},
    "weights": {"softmax": "softmax"},
    "distance": {False: "without_distance"},
    "walk": {"target": "without_iterative_walk"},
    "cross": {"delayed": "delayed_cross"},
}
_PLUS = "_plus"
_NEGATIVES = "_negatives"
# IMN comes after the others, in order of its iterations.
_BASELINES = ("youtube_dnn", "din", "dien", "sasrec", "mimn", "ubr4ctr")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Another setup of a model than its base.

    `name`: "without_distance", "L50", "item_features", or all differing settings with their values.
    """

    kind: Kind
    name: str
    model: str
    setup: Setup


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Runs on one log that are tested on the same kind of samples.

    `history_length`: of most runs. `bases`: by model the setup that is compared with all others of
    it: the best as the model is, of that length or, where there is none, of any. `variants`: model
    by model, the best validation first. Models are in order of the tables.
    """

    name: str
    log: PreparedLog
    samples: Samples
    history_length: int
    bases: dict[str, Setup]
    variants: tuple[Variant, ...]

    @property
    def mains(self) -> dict[str, Setup]:
        """Return the setups that stand for their models: bases of the main history length."""
        return {
            model: setup
            for model, setup in self.bases.items()
            if setup.settings[_LENGTH] == self.history_length
        }

    @property
    def lengths(self) -> dict[str, dict[int, Setup]]:
        """Return by model and length what differs from a base in nothing else; of models that have
        several lengths, or another than the main one.
        """
        found = {
            model: {
                setup.settings[_LENGTH]: setup
                for setup in (base, *(v.setup for v in self.of_kind("length") if v.model == model))
            }
            for model, base in self.bases.items()
        }
        return {
            model: dict(sorted(setups.items()))
            for model, setups in found.items()
            if set(setups) != {self.history_length}
        }

    @property
    def ceiling(self) -> float | None:
        """Return the AUC of the true click probabilities, where the log has them."""
        values = [value for base in self.bases.values() for value in base.values("ceiling_auc")]
        return values[0] if values else None

    def of_kind(self, kind: Kind) -> list[Variant]:
        """Return the variants of one kind."""
        return [variant for variant in self.variants if variant.kind == kind]

    def differences(self, variant: Variant) -> dict[str, tuple[Any, Any]]:
        """Return the settings of a variant that are others in its base, and those."""
        return variant.setup.differences(self.bases[variant.model])


def compare_clicks(folders: Sequence[Path], logs: Mapping[str, PreparedLog]) -> tuple[DataSet, ...]:
    """Read finished runs of click models and set those of the same data beside each other.

    `logs`: by the name that their figures begin with. Data with labels whose run samples negatives
    all the same are told apart by "_negatives".

    Raises CheckpointError for a folder that holds no finished run of a click model, and ConfigError
    for runs of no log, or of other test samples than those beside them, or twice the same.
    """
    if not folders:
        raise ConfigError("no run to compare")
    _check_names(logs)
    of_data: dict[tuple[str, Samples], list[FinishedRun]] = {
        (name, samples): [] for name in logs for samples in ("impressions", "negatives")
    }
    for folder in folders:
        run = read_run(folder, "click")
        name = _log_name(run, logs)
        from_impressions = reads_impressions(logs[name], run.config.data)
        samples: Samples = "impressions" if from_impressions else "negatives"
        # "auto" is no other experiment than what it comes to.
        run = replace(run, settings=run.settings | {_SAMPLES: samples})
        of_data[name, samples].append(run)
    return tuple(
        _data_set(name, logs[name], samples, runs)
        for (name, samples), runs in of_data.items()
        if runs
    )


def display_name(config: RunConfig) -> str:
    """Return the name of a run's model in tables and figures, such as "imn_3p_plus"."""
    model = config.model
    if isinstance(model, ImnConfig):
        return f"imn_{model.iterations}p{_PLUS if model.enhancement_steps else ''}"
    return model.name.removesuffix("_click")


def label(model: str) -> str:
    """Return how papers write a display name.

    >>> label("imn_3p_plus")
    'IMN-3P+'
    """
    if found := re.fullmatch(r"imn_(\d+)p(_plus)?", model):
        return f"IMN-{found[1]}P{'+' if found[2] else ''}"
    return {"youtube_dnn": "YouTube DNN", "sasrec": "SASRec"}.get(model, model.upper())


def ordered(models: Iterable[str]) -> list[str]:
    """Return display names as tables have them: others first, then IMN by its iterations."""

    def place(model: str) -> tuple[int, int, str]:
        if model in _BASELINES:
            return _BASELINES.index(model), 0, model
        return len(_BASELINES), iterations(model), model

    return sorted(models, key=place)


def iterations(model: str) -> int:
    """Return k of "imn_kp" and "imn_kp_plus", 0 of other models."""
    found = re.match(r"imn_(\d+)p", model)
    return int(found[1]) if found else 0


def _check_names(logs: Mapping[str, PreparedLog]) -> None:
    names: dict[str, str] = {}
    for name, log in logs.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*(?<!_negatives)", name):
            raise ConfigError(
                f"--log {name}: expected a name of lower-case letters, digits and _ that does not "
                f"end in {_NEGATIVES}"
            )
        if log.header.fingerprint in names:
            raise ConfigError(
                f"--log {name}: is the same log as {names[log.header.fingerprint]}; "
                "one name is enough"
            )
        names[log.header.fingerprint] = name


def _log_name(run: FinishedRun, logs: Mapping[str, PreparedLog]) -> str:
    for name, log in logs.items():
        if log.header.fingerprint == run.data_fingerprint:
            return name
    raise ConfigError(f"{run.folder}: was trained on none of the logs: {', '.join(logs)}")


def _data_set(
    name: str, log: PreparedLog, samples: Samples, runs: Sequence[FinishedRun]
) -> DataSet:
    for run in runs:
        _check_samples(run, runs[0])
    counts = Counter(run.config.features.history_length for run in runs)
    length = max(counts, key=lambda length: (counts[length], length))
    made = setups(runs)  # the best validation first
    of_model = {
        model: [setup for setup in made if display_name(setup.runs[0].config) == model]
        for model in ordered({display_name(run.config) for run in runs})
    }
    bases = {model: _base(model, ranked, length) for model, ranked in of_model.items()}
    variants = [
        variant
        for model, ranked in of_model.items()
        for variant in _variants(model, bases[model], ranked)
    ]
    return DataSet(
        name=name + _NEGATIVES if samples == "negatives" and log.header.has_labels else name,
        log=log,
        samples=samples,
        history_length=length,
        bases=bases,
        variants=(*variants, *_without_enhancement(bases)),
    )


def _check_samples(run: FinishedRun, first: FinishedRun) -> None:
    mine, its = run.settings, first.settings
    different = [f"{key} = {mine[key]}, not {its[key]}" for key in _TESTED if mine[key] != its[key]]
    if different:
        raise ConfigError(
            f"{run.folder}: is tested on other samples than {first.folder}: {'; '.join(different)}"
        )


def _base(model: str, ranked: Sequence[Setup], length: int) -> Setup:
    plain = [setup for setup in ranked if not _ablations(setup) and not setup.settings[_FEATURES]]
    at_length = [setup for setup in plain if setup.settings[_LENGTH] == length]
    if not plain:
        raise ConfigError(
            f"{ranked[0].runs[0].folder}: there is no run of {model} as it is, without ablation "
            "and features of items, to compare this one with"
        )
    return (at_length or plain)[0]


def _variants(model: str, base: Setup, ranked: Sequence[Setup]) -> list[Variant]:
    made: list[Variant] = []
    taken: set[str] = set()
    for setup in ranked:  # the best validation first: it takes the name
        if setup is base:
            continue
        kind, name = _kind(setup, base)
        if kind == "other" or name in taken:
            kind, name = "other", figure_name("", setup.differences(base))
        taken.add(name)
        made.append(Variant(kind=kind, name=name, model=model, setup=setup))
    return made


def _kind(setup: Setup, base: Setup) -> tuple[Kind, str]:
    """Return what a setup varies, and its name; "other" and no name for several settings."""
    differing = [key for key in setup.differences(base) if key not in _BUDGET]
    ablations = _ablations(setup)
    if differing == [_LENGTH]:
        return "length", f"L{setup.settings[_LENGTH]}"
    if differing == [_FEATURES]:
        return "side features", "item_features"
    if len(differing) == len(ablations) == 1:
        return "ablation", ablations[0]
    return "other", ""


def _without_enhancement(bases: Mapping[str, Setup]) -> list[Variant]:
    """Return the models without memory enhancement as ablations of those with it."""
    return [
        Variant(kind="ablation", name="without_enhancement", model=model, setup=bases[without])
        for model in bases
        if (without := model.removesuffix(_PLUS)) != model
        and without in bases
        and bases[without].settings[_LENGTH] == bases[model].settings[_LENGTH]
    ]


def _ablations(setup: Setup) -> list[str]:
    """Return the names of the ablations of a setup."""
    config = setup.runs[0].config.model
    if not isinstance(config, ImnConfig):
        return []
    found = [
        names[value]
        for key, names in _ABLATIONS.items()
        if (value := getattr(config, key)) in names
    ]
    return found + ["segmented"] * (config.segment > 0)
