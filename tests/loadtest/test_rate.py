"""`python -m loadtest rate` against a small real server, and its search on given results."""

import argparse
import json
import math
import re

import numpy as np
import polars as pl
import pytest

from loadtest.objective import FAIL, INVALID, PASS, Objective, RateError
from loadtest.rate import add_command, search
from loadtest.redis_server import free_port
from loadtest.run_folder import Run
from tests.loadtest.given_results import SENDING, result_of
from tests.loadtest.recording_server import recording_server

# Another program may keep the generator waiting; only the tests about that are about that.
PATIENT = ("--max-late-s", "10", "--timeout-s", "10")
EASY = ("--max-p99-s", "9", "--within-s", "9")


def rate(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["rate", *flags])
    code: int = options.run(options)
    return code


# Runs.


def test_stages_are_sent_as_written_and_the_run_is_a_folder(tmp_path, capsys):
    folder = tmp_path / "runs" / "first"
    stages = "100x0.2,0x0.1,100-300x0.2"
    with recording_server() as server:
        code = rate(
            *("--url", server.url, "--stages", stages, "--arrivals", "constant"),
            *("--folder", str(folder), "--candidates", "5", "--deadline-ms", "500"),
            *(*PATIENT, *EASY),
        )
    assert code == PASS
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.json",
        "report.md",
        "requests.parquet",
        "settings.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["first"], "nothing is left over"
    report = json.loads((folder / "report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == stages.split(",")
    assert [stage.get("requests", 0) for stage in report["stages"]] == [20, 0, 40]
    requests = pl.read_parquet(folder / "requests.parquet")
    assert requests.schema == {
        "stage": pl.Int32,
        "due_s": pl.Float64,
        "latency_s": pl.Float64,
        "status": pl.Int32,
        "send_delay_s": pl.Float64,
        "queued": pl.Boolean,
        "sent": pl.Boolean,
    }
    assert requests["stage"].to_list() == [0] * 20 + [2] * 40
    assert requests["status"].unique().to_list() == [200]
    p99_s = np.sort(requests["latency_s"].to_numpy())[math.ceil(0.99 * 60) - 1]
    assert report["judged"]["p99_s"] == p99_s, "exact, not rounded"
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["stages"] == stages
    assert settings["started"].startswith("20")
    assert (folder / "report.md").read_text().startswith("# PASS p99 ")
    assert capsys.readouterr().out.splitlines()[-1].startswith("PASS p99 ")
    assert len(server.received) >= 60
    for received in server.received:
        assert received.path == "/score"
        assert received.headers["x-deadline-ms"] == "500"
        assert received.headers["content-type"] == "application/json"
        assert len(received.body["candidates"]) == 5


def test_a_missed_objective_fails_and_the_run_is_written_all_the_same(tmp_path, capsys):
    """The first request, which only asks whether the service is there, is answered."""
    seen = []

    def refuse(_received):
        seen.append(1)
        return 200 if len(seen) == 1 else 503

    with recording_server(refuse) as server:
        code = rate(
            *("--url", server.url, "--rate", "100", "--duration-s", "0.3"),
            *("--folder", str(tmp_path / "run"), *PATIENT),
        )
    assert code == FAIL
    assert "FAIL: p99 infinite > 30 ms; 0 % within 30 ms < 99 %" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["statuses"].keys() == {"503"}
    assert report["judged"]["errors"] == 1.0
    latencies_s = pl.read_parquet(tmp_path / "run" / "requests.parquet")["latency_s"]
    assert latencies_s.is_infinite().all()


def test_a_generator_that_falls_behind_has_its_own_exit_code(tmp_path):
    with recording_server() as server:
        code = rate(
            *("--url", server.url, "--rate", "50", "--duration-s", "0.2"),
            *("--folder", str(tmp_path / "run"), *EASY, "--max-late-s", "0"),
        )
    assert code == INVALID
    assert json.loads((tmp_path / "run" / "report.json").read_text())["verdict"] == "INVALID"


def test_no_deadline_is_sent_unless_asked(tmp_path):
    with recording_server() as server:
        rate(
            *("--url", f"{server.url}/shop/", "--rate", "50", "--duration-s", "0.1"),
            *("--arrivals", "constant", "--folder", str(tmp_path / "run"), *PATIENT),
        )
    assert {received.path for received in server.received} == {"/shop/score"}
    assert all("x-deadline-ms" not in received.headers for received in server.received)


def test_a_search_finds_the_highest_rate_that_may_be_tried_where_all_hold(tmp_path):
    with recording_server() as server:
        code = rate(
            *("--url", server.url, "--search", "--lowest", "20", "--highest", "40"),
            *("--duration-s", "0.3", "--folder", str(tmp_path / "run"), *PATIENT, *EASY),
            *("--min-rate", "40", "--arrivals", "constant"),
        )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert code == PASS
    assert report["highest_rate"] == 40.0
    assert report["line"].startswith("PASS highest rate 40.0 requests/s; p99 ")
    assert [stage["stage"] for stage in report["stages"]] == ["20.0/s, held", "40.0/s, held"]
    assert report["warnings"] == ["the highest rate that may be tried held: raise --highest 40"]


def searched(*, server_holds: float, generator_holds: float, min_rate: float = 0.0) -> Run:
    """Search with a server that is slow, and a generator that is late, from some rates on."""

    def offer(rate, _seed):
        return result_of(
            [0.01 if rate <= server_holds else 1.0] * 10,
            send_delays_s=np.full(10, 0.0 if rate <= generator_holds else 0.01),
        )

    objective = Objective(min_rate=min_rate)
    return search(offer, objective, SENDING, lowest=100.0, highest=1000.0, precision=0.1, seed=1)


def test_a_search_ends_at_the_rate_that_the_server_holds():
    done = searched(server_holds=300.0, generator_holds=math.inf, min_rate=200.0)
    assert done.verdict.code == PASS
    assert 300 / 1.1 < done.figures["highest_rate"] <= 300
    assert done.warnings == []
    assert len(done.parts) > 4


def test_a_search_below_the_rate_that_was_asked_for_fails():
    done = searched(server_holds=300.0, generator_holds=math.inf, min_rate=1500.0)
    assert done.verdict.code == FAIL
    assert re.fullmatch(r"FAIL: highest rate 2\d\d\.\d requests/s < 1,500\.0", done.verdict.line)


def test_a_search_in_which_no_rate_holds_says_what_the_last_one_missed():
    done = searched(server_holds=0.0, generator_holds=math.inf)
    assert done.verdict.code == FAIL
    assert done.verdict.line.startswith("FAIL: p99 1000 ms > 30 ms")


def test_a_search_that_the_generator_ended_early_is_invalid():
    done = searched(server_holds=math.inf, generator_holds=300.0, min_rate=500.0)
    assert done.verdict.code == INVALID
    assert done.verdict.line.startswith("INVALID: the generator fell behind: p99 of its delays 10")


def test_a_search_that_the_generator_ended_late_enough_passes_with_a_warning():
    done = searched(server_holds=math.inf, generator_holds=300.0, min_rate=200.0)
    assert done.verdict.code == PASS
    assert done.warnings[0].startswith("the search ended at the generator's own limit: the gener")


# What cannot be run.


def test_a_folder_that_holds_something_is_refused_before_anything_is_sent(tmp_path):
    (tmp_path / "report.json").touch()
    with recording_server() as server, pytest.raises(RateError, match="not empty: name another"):
        rate("--url", server.url, "--rate", "10", "--folder", str(tmp_path))
    assert server.received == []


def test_a_service_that_is_not_there_is_an_error(tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    message = f"nothing answers at {re.escape(url)}/score"
    with pytest.raises(RateError, match=message):
        rate("--url", url, "--rate", "10", "--folder", str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_service_that_does_not_understand_is_an_error(tmp_path):
    with (
        recording_server(lambda _received: 422) as server,
        pytest.raises(RateError, match=r"/score answers 422: \{\}"),
    ):
        rate("--url", server.url, "--rate", "10", "--folder", str(tmp_path / "run"))
    assert len(server.received) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rate", "0"), "--rate must be positive requests/s, got 0"),
        (("--stages", "10x1", "--duration-s", "5"), "--stages say how long they last"),
        (("--stages", "ten"), "stage 'ten' is not RATExSECONDS"),
        (("--rate", "10", "--bodies", "0"), "at least one body is needed"),
        (("--rate", "10", "--burst-factor", "99"), "factor of bursts must be within"),
        (("--rate", "10", "--candidates", "none"), "'none' is no distribution of sizes"),
        (("--rate", "10", "--url", "https://shop"), "expected http://HOST:PORT"),
        (("--rate", "10", "--url", "http://shop:none"), "--url http://shop:none: "),
    ],
)
def test_settings_that_cannot_be_run_are_refused_by_name(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rate("--url", "http://127.0.0.1:1", "--folder", str(tmp_path / "run"), *flags)
