"""An A/B test and its controls: what the service is told, where histories begin, what is said."""

import argparse
import tomllib
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import redis

from contract.history_log import HistoryLog
from contract.records import decode_records, encode_records
from loadtest.ab.comparison import compare
from loadtest.ab.report import Report
from loadtest.ab.simulation import SimulationError
from loadtest.ab.visits import Run
from loadtest.benchmarks.ab import (
    Results,
    add_command,
    figures,
    section,
    set_histories,
    write_experiments,
)
from loadtest.redis_server import redis_server
from loadtest.world import WorldSettings, make_world, write_log
from tests.loadtest.ab.runs import STARTED, drawn_visits
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource

SETTINGS = {"candidates": 50, "shown": 5, "users": 4}


def report(seed: int, shares: dict[str, float], *, n_users: int = 400, **ctrs: float) -> Report:
    """Return the report of people dealt out by `shares`, where even ones are stated."""
    stated = dict.fromkeys(shares, 0.5)
    run = Run(started=STARTED, stated_shares=stated, baseline=next(iter(shares)), settings=SETTINGS)
    visits = drawn_visits(seed, n_users=n_users, shares=shares, **ctrs)
    return Report(run=run, comparison=compare(visits, run))


@pytest.fixture(scope="module")
def results() -> Results:
    even, uneven = {"a": 0.5, "b": 0.5}, {"a": 0.4, "b": 0.6}
    return Results(
        ab=report(1, {"din": 0.5, "imn": 0.5}, imn=1.5),
        unposted_clicks=3,
        # Two seeds with nothing to be found, one with much.
        aa=(report(2, even), report(3, even), report(4, even, b=2.0)),
        planted=report(5, uneven, n_users=1500),
    )


class TestFigures:
    def test_uplift_and_interval_are_those_of_the_run(self, results):
        found = figures(results)
        assert found["ctr_uplift_ci_low"] < found["ctr_uplift"] < found["ctr_uplift_ci_high"]
        assert found["ctr_uplift"] == results.ab.comparison.arms[1].uplifts["ctr"].value
        assert found["ctr_uplift_p"] < 0.001
        assert found["visits"] == results.ab.comparison.traffic.n_requests
        assert found["errors"] == 0

    def test_significant_controls_are_counted(self, results):
        significant = [one.comparison.arms[1].uplifts["ctr"].p_value < 0.05 for one in results.aa]
        assert significant[-1]
        assert figures(results)["aa_significant_of_3"] == sum(significant)

    def test_the_planted_fault_is_seen(self, results):
        assert figures(results)["srm_p_planted"] < 0.001


class TestSection:
    def test_all_p_values_of_the_controls_are_listed(self, results):
        listed = [f"{one.comparison.arms[1].uplifts['ctr'].p_value:.3f}" for one in results.aa]
        assert f"All p-values: {', '.join(listed)}." in section(results)

    def test_verdict_losses_and_the_fault_are_said(self, results):
        text = section(results)
        assert results.ab.verdicts[0] in text
        assert "3 clicks not in histories" in text
        assert "caught as a mismatch" in text

    def test_a_fault_that_was_not_noticed_is_said_too(self, results):
        missed = Results(ab=results.ab, unposted_clicks=0, aa=results.aa, planted=results.aa[0])
        assert "not noticed" in section(missed)


def test_the_experiments_file_names_salt_bundles_and_shares(tmp_path):
    file = tmp_path / "experiments.toml"
    bundle = tmp_path / 'with "quotes"'
    write_experiments(file, "ab-1", {"a": (bundle, 0.4), "b": (tmp_path, 0.6)})
    assert tomllib.loads(file.read_text()) == {
        "salt": "ab-1",
        "arms": {
            "a": {"bundle": str(bundle), "share": 0.4},
            "b": {"bundle": str(tmp_path), "share": 0.6},
        },
    }


def test_histories_are_those_before_the_visits_and_nothing_else(tmp_path):
    settings = WorldSettings(
        users=30, items=140, targets=6, history_length=40, memory=30, visits=2, candidates=6
    )
    world = make_world(settings)
    write_log(world, settings, tmp_path / "log.parquet")
    prepare(LogSource(path=tmp_path / "log.parquet"), tmp_path / "log", PrepareOptions())
    log = HistoryLog(tmp_path / "log")
    assert log.header.n_behaviors > 30 * 40  # with the clicks of its visits
    organic = pl.read_parquet(tmp_path / "log.parquet").filter(pl.col("label").is_null())
    with redis_server() as url, redis.Redis.from_url(url) as client:
        client.set("history:1", encode_records([5], [6]))  # left by an earlier run
        client.set("history:stranger", b"")
        set_histories(url, log, before_s=world.history_end_s)
        assert len(client.keys()) == 30
        for user in range(1, 31):
            value = client.get(f"history:{user}")
            assert isinstance(value, bytes)
            records = decode_records(value)
            expected = organic.filter(user_id=user)
            assert records["time"].tolist() == expected["timestamp"].to_list()
            assert records["item"].tolist() == expected["item_id"].to_list()


class TestRefused:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            pytest.param(["--bundle", "imn=a"], "for two arms, .* got imn=a", id="one"),
            pytest.param(["--bundle", "imn", "--bundle", "din=b"], "ARM=FOLDER", id="no folder"),
            pytest.param(["--bundle", "a=a", "--bundle", "a=b"], "for two arms", id="twice"),
            pytest.param(
                ["--bundle", "a=a", "--bundle", "b=b", "--aa-seeds", "0"],
                "--aa-seeds must be at least 1, got 0",
                id="no seeds",
            ),
        ],
    )
    def test_flags(self, tmp_path, flags, message):
        with pytest.raises(SimulationError, match=message):
            command(tmp_path / "runs", *flags)

    def test_a_folder_that_is_not_empty(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(SimulationError, match="is not empty: name another folder"):
            command(tmp_path, "--bundle", "a=a", "--bundle", "b=b")


def command(folder: Path, *flags: str) -> Any:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    where = ["world.npz", "--log", "log", "--folder", str(folder)]
    options = parser.parse_args(["ab-results", *where, *flags])
    return options.run(options)
