"""Logs written by hand and prepared by the real code, for every test of this folder."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
import pytest

from training.data.log import PreparedLog
from training.data.prepare import BehaviorChoice, PrepareOptions, prepare
from training.data.readers import LogSource


@pytest.fixture(scope="session")
def make_log(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreparedLog]:
    """Return a function from columns of a log to that log, prepared.

    Of session scope, so that property tests may call it for each of their examples.
    """
    base = tmp_path_factory.mktemp("logs")
    numbers = itertools.count()

    def make(
        columns: Mapping[str, Sequence[Any]],
        *,
        behaviors: BehaviorChoice = "positives",
        min_interactions: int = 1,
        item_features: Mapping[str, str] | None = None,
    ) -> PreparedLog:
        number = next(numbers)
        path = base / f"{number}.parquet"
        pl.DataFrame(columns).write_parquet(path)
        options = PrepareOptions(behaviors=behaviors, min_interactions=min_interactions)
        source = LogSource(path=path, item_features=item_features or {})
        prepare(source, base / str(number), options)
        return PreparedLog(base / str(number))

    return make
