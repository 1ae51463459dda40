"""A small prepared log and short runs on it."""

from pathlib import Path

import pytest

from loadtest.world import WorldSettings, make_world, write_log
from training.data.log import PreparedLog
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource


@pytest.fixture(scope="session")
def world_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared synthetic log: 60 people, 1,440 labelled impressions, 24 .. 72 behaviors each."""
    folder = tmp_path_factory.mktemp("world")
    settings = WorldSettings(
        users=60, items=80, topics=4, targets=6, history_length=24, memory=20, visits=3,
        candidates=8, targets_per_visit=2, recipes=1,
    )  # fmt: skip
    write_log(make_world(settings), settings, folder / "world.parquet")
    prepare(LogSource(path=folder / "world.parquet"), folder / "log", PrepareOptions())
    return folder / "log"


@pytest.fixture
def log(world_log: Path) -> PreparedLog:
    return PreparedLog(world_log)
