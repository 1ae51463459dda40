"""Runs of the same settings as one setup: averages over seeds, and what tells two setups apart."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from training.comparison.runs import FinishedRun
from training.errors import ConfigError


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
        return self.runs[0].settings

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

    def differences(self, other: "Setup") -> dict[str, tuple[Any, Any]]:
        """Return the settings that are others in a setup of the same model, and those."""
        theirs = other.settings
        return {
            key: (value, theirs[key])
            for key, value in self.settings.items()
            if value != theirs[key]
        }


def setups(runs: Sequence[FinishedRun]) -> list[Setup]:
    """Return runs as setups, the best validation first.

    Raises ConfigError for two runs of the same settings and seed.
    """
    alike: dict[str, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        alike[json.dumps(run.settings)].append(run)
    for seeds in alike.values():
        for one, other in combinations(seeds, 2):
            if one.config.train.seed == other.config.train.seed:
                raise ConfigError(
                    f"{other.folder}: has the settings and the seed of {one.folder}; "
                    "one of them is enough"
                )
    made = [Setup(tuple(sorted(seeds, key=_seed))) for seeds in alike.values()]
    return sorted(made, key=lambda setup: setup.best_validation, reverse=True)


def _seed(run: FinishedRun) -> int:
    return run.config.train.seed
