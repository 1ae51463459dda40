"""Runs of next-item models side by side: which of them stands for its model, what the others vary,
and whether a difference is more than chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from training.comparison.runs import FinishedRun, read_run
from training.comparison.setups import Setup, setups
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
# What decides which targets are ranked against what.
_RANKING = ("data.holdout_steps", "data.min_item_count", "next_item.n_ranked")


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
        return variant.differences(self.mains[variant.model])

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
    runs = [read_run(folder, "next-item") for folder in folders]
    if not runs:
        raise ConfigError("no run to compare")
    for run in runs:
        _check(run, runs[0], log)
    made = setups(runs)  # the best validation first
    by_model = {name: [setup for setup in made if setup.model == name] for name in MODELS}
    mains = {name: ranked[0] for name, ranked in by_model.items() if ranked}
    return Comparison(
        metric=runs[0].metric,
        protocols=tuple(
            p for p in PROTOCOLS if any(p in r.config.next_item.protocols for r in runs)
        ),
        mains=mains,
        variants=tuple(variant for ranked in by_model.values() for variant in ranked[1:]),
    )


def _check(run: FinishedRun, first: FinishedRun, log: PreparedLog) -> None:
    if run.data_fingerprint != log.header.fingerprint:
        raise ConfigError(f"{run.folder}: was trained on another log than {log.folder}")
    if run.metric != first.metric:
        raise ConfigError(
            f"{run.folder}: validation watched {run.metric}, in {first.folder} {first.metric}"
        )
    mine, its = run.settings, first.settings
    for key in _RANKING:
        if mine[key] != its[key]:
            raise ConfigError(
                f"{run.folder}: ranked with {key} = {mine[key]}, {first.folder} with {its[key]}"
            )
