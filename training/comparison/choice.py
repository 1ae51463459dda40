"""Runs of next-item models side by side: which of them stands for its model, what the others vary,
and whether a difference is more than chance.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

from training.comparison.runs import FinishedRun, read_run
from training.comparison.significance import TTest, welch_t_test
from training.config import NextItemModelConfig
from training.data.log import PreparedLog
from training.errors import ConfigError
from training.ranking import CUTOFFS, PROTOCOLS, Protocol

METRICS = tuple(f"{name}{k}" for k in CUTOFFS for name in ("ndcg", "hr", "mrr"))
MODELS: tuple[str, ...] = tuple(
    get_args(config.model_fields["name"].annotation)[0] for config in get_args(NextItemModelConfig)
)
SUBJECT = "pkm_act"
BASELINE = "sasrec"
# What does not make another experiment of a run.
_SEED = "train.seed"
_INDIFFERENT = ("name", _SEED, "train.checkpoint_every_s")
# What decides which targets are ranked against what.
_RANKING = ("data.holdout_steps", "data.min_item_count", "next_item.n_ranked")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A metric over seeds; `deviation`: sample standard deviation, None of one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), deviation=deviation)


@dataclass(frozen=True)
class Setup:
    """Runs with the same settings, one a seed, in order of the seed."""

    runs: tuple[FinishedRun, ...]

    @property
    def model(self) -> str:
        """Return the model's name in a run file."""
        return self.runs[0].config.model.name

    @property
    def settings(self) -> dict[str, Any]:
        """Return all settings but seed and name, such as "train.batch_size"."""
        flat = _flat(self.runs[0].config.model_dump(mode="json"))
        return {key: value for key, value in flat if key not in _INDIFFERENT}

    @property
    def validation(self) -> Spread:
        """Return what validation watched, at each run's best epoch."""
        return Spread.of([run.validation for run in self.runs])

    @property
    def best_validation(self) -> float:
        """Return what validation watched, of the best run: what setups compete by."""
        return max(run.validation for run in self.runs)

    def values(self, metric: str) -> list[float]:
        """Return a test metric of each run, such as "full_ndcg10"; none where it was not taken."""
        return [run.test[metric] for run in self.runs if metric in run.test]

    def test(self, metric: str) -> Spread | None:
        """Return a test metric over the seeds, None where it was not taken."""
        values = self.values(metric)
        return Spread.of(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`mains`: of each model the setup of the run with the best validation, the test part unseen,
    in order of MODELS. `variants`: all other setups, model by model, best first.

    `metric`: what validation of all runs watched. `protocols`: all that any run was ranked under.
    """

    metric: str
    protocols: tuple[Protocol, ...]
    mains: dict[str, Setup]
    variants: tuple[Setup, ...]

    @property
    def setups(self) -> tuple[Setup, ...]:
        """Return main setups and variants."""
        return (*self.mains.values(), *self.variants)

    @property
    def best_baseline(self) -> Setup | None:
        """Return, of the other models than PKM-ACT, the one with the best validation."""
        baselines = [setup for name, setup in self.mains.items() if name != SUBJECT]
        return max(baselines, key=lambda setup: setup.best_validation, default=None)

    def differences(self, variant: Setup) -> dict[str, tuple[Any, Any]]:
        """Return the settings of a variant that are others in its model's main setup, and those."""
        theirs = self.mains[variant.model].settings
        return {
            key: (value, theirs[key])
            for key, value in variant.settings.items()
            if value != theirs[key]
        }

    def test_of_lead(self, metric: str) -> TTest | None:
        """Return the t-test of PKM-ACT against the best baseline in one metric of the test part.

        None where one of them has fewer than two seeds, or has not got the metric.
        """
        subject, baseline = self.mains.get(SUBJECT), self.best_baseline
        if subject is None or baseline is None:
            return None
        one, other = subject.values(metric), baseline.values(metric)
        return welch_t_test(one, other) if min(len(one), len(other)) > 1 else None


def compare(folders: Sequence[Path], log: PreparedLog) -> Comparison:
    """Read finished runs and set them beside each other.

    Raises CheckpointError for a folder that holds no finished run of a next-item model, and
    ConfigError for runs that cannot be compared: of another log, chosen by different metrics,
    ranked against something else, or twice the same.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise ConfigError("no run to compare")
    for run in runs:
        _check(run, runs[0], log)
    setups = _setups(runs)
    mains = {name: setups[name][0] for name in MODELS if name in setups}
    return Comparison(
        metric=runs[0].metric,
        protocols=tuple(
            p for p in PROTOCOLS if any(p in r.config.next_item.protocols for r in runs)
        ),
        mains=mains,
        variants=tuple(variant for name in mains for variant in setups[name][1:]),
    )


def _check(run: FinishedRun, first: FinishedRun, log: PreparedLog) -> None:
    if run.data_fingerprint != log.header.fingerprint:
        raise ConfigError(f"{run.folder}: was trained on another log than {log.folder}")
    if run.metric != first.metric:
        raise ConfigError(
            f"{run.folder}: validation watched {run.metric}, in {first.folder} {first.metric}"
        )
    mine, its = (dict(_flat(one.config.model_dump(mode="json"))) for one in (run, first))
    for key in _RANKING:
        if mine[key] != its[key]:
            raise ConfigError(
                f"{run.folder}: ranked with {key} = {mine[key]}, {first.folder} with {its[key]}"
            )


def _setups(runs: Sequence[FinishedRun]) -> dict[str, list[Setup]]:
    """Return the setups of each model, the best validation first."""
    alike: dict[str, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        alike[json.dumps(Setup((run,)).settings)].append(run)
    setups: dict[str, list[Setup]] = defaultdict(list)
    for seeds in alike.values():
        for one, other in combinations(seeds, 2):
            if one.config.train.seed == other.config.train.seed:
                raise ConfigError(
                    f"{other.folder}: has the settings and the seed of {one.folder}; "
                    "one of them is enough"
                )
        setup = Setup(tuple(sorted(seeds, key=lambda run: run.config.train.seed)))
        setups[setup.model].append(setup)
    for ranked in setups.values():
        ranked.sort(key=lambda setup: setup.best_validation, reverse=True)
    return setups


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
