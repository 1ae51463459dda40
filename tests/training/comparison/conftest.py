"""A prepared log without labels, whose items have features."""

import polars as pl
import pytest

from training.data.log import PreparedLog
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource


@pytest.fixture(scope="session")
def plain_log(tmp_path_factory: pytest.TempPathFactory) -> PreparedLog:
    """120 behaviors of five users with eight items, of three brands."""
    folder = tmp_path_factory.mktemp("plain")
    item = [1 + row * 3 % 8 for row in range(120)]
    pl.DataFrame(
        {
            "user": [row % 5 for row in range(120)],
            "item": item,
            "timestamp": range(120),
            "brand": [one % 3 for one in item],
        }
    ).write_csv(folder / "log.csv")
    source = LogSource(path=folder / "log.csv", item_features={"brand": "brand"})
    prepare(source, folder / "log", PrepareOptions())
    return PreparedLog(folder / "log")
