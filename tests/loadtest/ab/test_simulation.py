"""People visit a server with arms: real Locust processes, a real server, scores that are known."""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from loadtest.ab.people import Habits
from loadtest.ab.plan import Plan
from loadtest.ab.simulation import Outcome, SimulationError, add_command, read_arms, simulate
from loadtest.ab.visits import read_run, read_visits
from loadtest.redis_server import free_port
from loadtest.world import World, WorldSettings, make_world
from tests.loadtest.ab.stand_in import HANG_UP, Reply, StandIn, serve

PATIENCE_S = 120.0
HABITS = Habits(candidates=20, targets_per_visit=4, shown=5, seed=3)
COMMAND_LINE = """
import argparse, sys
from loadtest.ab.simulation import add_command
parser = argparse.ArgumentParser()
add_command(parser.add_subparsers())
options = parser.parse_args(sys.argv[1:])
sys.exit(options.run(options))
"""


@pytest.fixture(scope="module")
def world_file(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("world") / "small.world.npz"
    settings = WorldSettings(users=200, items=300, history_length=100, memory=90)
    make_world(settings).save(path)
    return path


@pytest.fixture(scope="module")
def world(world_file) -> World:
    return World.load(world_file)


@pytest.fixture
def stand_in(world) -> Iterator[StandIn]:
    server = StandIn(world)
    with serve(server):
        yield server


def plan(world_file: Path, url: str, **changes: Any) -> Plan:
    made = Plan(world=str(world_file), url=url, users=2, visits=60, habits=HABITS)
    return dataclasses.replace(made, **changes)


def questions(stand_in: StandIn) -> Counter[str]:
    """Return who asked for which candidates, and how often."""
    return Counter(
        json.dumps([body["user_id"], body["candidates"]]) for body, _ in stand_in.asked["/score"]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A run of two processes, and what its server was asked."""

    folder: Path
    outcome: Outcome
    stand_in: StandIn
    visits: pl.DataFrame


@pytest.fixture(scope="module")
def made(world_file, world, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("run")
    stand_in = StandIn(world)
    with serve(stand_in):
        outcome = simulate(
            plan(world_file, stand_in.url, users=4, processes=2, visits=202, deadline_ms=500.0),
            folder,
            baseline="wrong",
        )
    return Made(folder=folder, outcome=outcome, stand_in=stand_in, visits=read_visits(folder))


class TestRun:
    def test_so_many_visits_are_made_by_people_of_both_processes(self, made):
        assert len(made.visits) == len(made.stand_in.asked["/score"]) == 202
        assert (made.visits["status"] == 200).all()
        # Were both processes seeded alike, every visit would be there twice.
        assert set(questions(made.stand_in).values()) == {1}

    def test_the_folder_holds_the_run_and_its_report(self, made):
        assert sorted(path.name for path in made.folder.iterdir()) == [
            "locust.log",
            "report.html",
            "report.json",
            "run.json",
            "visits.parquet",
        ]
        run = read_run(made.folder)
        assert (run.stated_shares, run.baseline) == ({"wrong": 0.5, "right": 0.5}, "wrong")
        assert Plan.from_settings(run.settings).habits == HABITS

    def test_arms_and_versions_are_those_of_the_answers(self, made):
        for visit in made.visits.iter_rows(named=True):
            assert visit["arm"] == made.stand_in.arm(visit["user_id"])
            assert visit["version"] == f"{visit['arm']}-1"

    def test_who_is_ranked_for_by_the_truth_clicks_more(self, made):
        uplift = made.outcome.report.comparison.arms[1].uplifts["ctr"]
        assert uplift.low > 1.0

    def test_a_visit_asks_for_the_candidates_at_the_worlds_time(self, made, world):
        times = []
        for body, headers in made.stand_in.asked["/score"]:
            assert body.keys() == {"user_id", "candidates", "ranking_time"}
            assert len(set(body["candidates"])) == 20
            assert headers["X-Deadline-Ms"] == "500.0"
            times.append(body["ranking_time"])
        assert 0 <= min(times) - world.history_end_s < 1440 * PATIENCE_S
        at_s = made.visits["at_s"]
        assert at_s.is_sorted()
        assert max(times) - world.history_end_s == pytest.approx(1440 * at_s.max(), abs=2)

    def test_clicks_are_posted_with_the_time_of_their_visit(self, made):
        # Two visits of one person may fall on one second of the world.
        asked_at: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
        for body, _ in made.stand_in.asked["/score"]:
            asked_at[body["user_id"], body["ranking_time"]].update(body["candidates"])
        posted = [body["events"] for body, _ in made.stand_in.asked["/events"]]
        for events in posted:
            assert len({(event["user_id"], event["time"]) for event in events}) == 1
            candidates = asked_at[events[0]["user_id"], events[0]["time"]]
            assert {event["item_id"] for event in events} <= candidates
        journalled = made.visits.filter(pl.col("clicked_items").list.len() > 0)
        assert sorted([e["item_id"] for e in events] for events in posted) == sorted(
            journalled["clicked_items"].to_list()
        )
        assert made.outcome.unposted_clicks == 0

    def test_categories_are_topics_or_the_special_item_itself(self, made, world):
        index = {int(item): number for number, item in enumerate(world.item_ids)}
        clicked = made.visits.explode("clicked_items", "clicked_categories").drop_nulls()
        for visit in clicked.iter_rows(named=True):
            item = index[visit["clicked_items"]]
            topic = int(world.topics[item])
            assert visit["clicked_categories"] == (topic if topic >= 0 else -(item + 1))

    def test_latencies_are_measured(self, made):
        assert made.visits["latency_s"].is_between(0.0, PATIENCE_S, closed="none").all()


class TestTrouble:
    def test_failed_visits_show_nothing_and_change_no_other_visit(
        self, world_file, world, tmp_path
    ):
        """The same people come to a server that refuses, breaks and hangs up now and then."""

        class Troubled(StandIn):
            chances = random.Random(1)

            def score(self, body: dict[str, Any]) -> Reply:
                if body["user_id"].endswith("7"):
                    return HANG_UP, {}
                status = self.chances.choice([200, 429, 503])
                return super().score(body) if status == 200 else (status, {"title": "busy"})

            def events(self, _body: dict[str, Any]) -> Reply:
                return 503, {"title": "away"}

        calm, troubled = StandIn(world), Troubled(world)
        with serve(calm), serve(troubled):
            simulate(plan(world_file, calm.url), tmp_path / "calm")
            outcome = simulate(plan(world_file, troubled.url), tmp_path / "troubled")
        # Locust's client asks again where a kept connection was closed.
        assert questions(calm).keys() == questions(troubled).keys()
        visits = read_visits(tmp_path / "troubled")
        assert len(visits) == 60
        assert set(visits["status"]) == {0, 200, 429, 503}
        failed = visits.filter(pl.col("status") != 200)
        assert failed["arm"].is_null().all()
        assert (failed["n_shown"] == 0).all()
        assert (visits.filter(status=200)["n_shown"] == 5).all()
        assert outcome.unposted_clicks == visits["clicked_items"].list.len().sum() > 0

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            pytest.param(
                (200, {"scores": [0.5], "arm": "right", "version": "r"}),
                "POST /score: 20 finite scores are expected, got 1",
                id="scores",
            ),
            pytest.param(
                (422, {"title": "ranking_time is not known"}),
                "POST /score: 422 .*ranking_time is not known",
                id="refused question",
            ),
        ],
    )
    def test_an_unexpected_answer_ends_the_run(
        self, world_file, stand_in, tmp_path, reply, message
    ):
        stand_in.score = lambda _body: reply
        with pytest.raises(SimulationError, match=message):
            simulate(plan(world_file, stand_in.url, visits=10_000), tmp_path / "run")
        assert not (tmp_path / "run" / "visits.parquet").exists()


class TestEnd:
    def test_time_ends_a_run_and_a_rate_spreads_its_visits(self, world_file, stand_in, tmp_path):
        simulate(
            plan(world_file, stand_in.url, visits=None, run_time_s=2.0, rate=10.0), tmp_path / "run"
        )
        visits = read_visits(tmp_path / "run")
        assert 2 <= len(visits) <= 30  # one for each user at least, and a little late at most
        at_s = visits["at_s"]
        # A visit every 0.1 s; single ones come together where a busy machine was late.
        assert (at_s[-1] - at_s[0]) / (len(at_s) - 1) > 0.07

    def test_the_web_page_starts_a_run_and_an_interrupt_ends_it(
        self, world_file, stand_in, tmp_path
    ):
        """Both processes of it: nothing of Locust goes on, and the report is made."""
        port, folder = free_port(), tmp_path / "run"
        flags = ["--ui", "--ui-port", str(port), "--users", "2", "--processes", "2"]
        page = f"http://127.0.0.1:{port}"

        def people_are_there() -> bool:
            return bool(httpx.get(f"{page}/worker-count").json()["worker_count"] == 2)

        with command(world_file, stand_in, folder, *flags) as process:
            # Locust says that a run has been started when there is nobody to run it, too.
            wait_for(process, people_are_there)
            people = {"user_count": 2, "spawn_rate": 2}
            httpx.post(f"{page}/swarm", data=people, timeout=PATIENCE_S).raise_for_status()
            wait_for(process, lambda: len(stand_in.asked.get("/events", [])) > 20)
            process.send_signal(signal.SIGINT)
            printed, complaints = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, complaints
        assert "right: CTR" in printed
        assert (folder / "report.html").exists()
        n_asked = len(stand_in.asked["/score"])
        assert 20 <= len(read_visits(folder)) <= n_asked
        time.sleep(0.5)
        assert len(stand_in.asked["/score"]) == n_asked
        with pytest.raises(httpx.ConnectError):
            httpx.get(page)


class TestVerdict:
    @pytest.mark.usefixtures("signals")
    def test_a_mismatched_sample_ratio_is_exit_code_1(self, world_file, stand_in, tmp_path, capsys):
        stand_in.share_of_right = 0.2
        flags = ["--visits", "120", "--stated-share", "right=0.5", "--stated-share", "wrong=0.5"]
        assert in_process(world_file, stand_in, tmp_path / "run", *flags) == 1
        assert "not valid, the sample ratio is mismatched" in capsys.readouterr().out


class TestRefused:
    """Before anybody visits, by one clear error."""

    def test_a_folder_that_is_not_empty(self, world_file, stand_in, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(SimulationError, match="is not empty: name another folder"):
            simulate(plan(world_file, stand_in.url), tmp_path)

    def test_an_unknown_baseline(self, world_file, stand_in, tmp_path):
        with pytest.raises(
            SimulationError, match=r"one of the arms that answer \(wrong, right\), got imn"
        ):
            simulate(plan(world_file, stand_in.url), tmp_path / "run", baseline="imn")

    def test_a_shadow_as_baseline(self, world_file, stand_in, tmp_path):
        with pytest.raises(SimulationError, match="baseline must be one of the arms that answer"):
            simulate(plan(world_file, stand_in.url), tmp_path / "run", baseline="dark")

    def test_stated_shares_of_other_arms(self, world_file, stand_in, tmp_path):
        with pytest.raises(
            SimulationError, match=r"arms that answer \(wrong, right\), got wrong, imn"
        ):
            simulate(
                plan(world_file, stand_in.url),
                tmp_path / "run",
                stated_shares={"wrong": 0.5, "imn": 0.5},
            )

    def test_stated_shares_that_do_not_add_up(self, world_file, stand_in, tmp_path):
        with pytest.raises(ValueError, match=r"must add up to 1, got 1\.5"):
            simulate(
                plan(world_file, stand_in.url),
                tmp_path / "run",
                stated_shares={"wrong": 0.5, "right": 1.0},
            )
        assert not (tmp_path / "run").exists()

    @pytest.mark.usefixtures("signals")
    def test_a_share_that_is_no_number(self, world_file, stand_in, tmp_path):
        with pytest.raises(SimulationError, match="must be ARM=SHARE, got right"):
            in_process(world_file, stand_in, tmp_path / "run", "--stated-share", "right")

    def test_a_world_that_is_none(self, stand_in, tmp_path):
        (tmp_path / "world.npz").touch()
        with pytest.raises(ValueError, match="not a world"):
            simulate(plan(tmp_path / "world.npz", stand_in.url), tmp_path / "run")

    def test_a_service_that_is_away(self, world_file, tmp_path):
        away = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(SimulationError, match=f"no service answers at {away}"):
            simulate(plan(world_file, away), tmp_path / "run")

    @pytest.mark.parametrize(
        ("models", "message"),
        [
            pytest.param([{"model": "imn"}], "models with arm, share and shadow", id="no arms"),
            pytest.param(
                [{"arm": "a", "share": 1.0, "shadow": True}], "no arm answers", id="shadow"
            ),
            pytest.param([], "no arm answers", id="none"),
        ],
    )
    def test_a_service_without_arms(self, stand_in, models, message):
        stand_in.models = models
        with pytest.raises(SimulationError, match=message):
            read_arms(stand_in.url)

    def test_a_server_that_is_something_else(self, stand_in):
        with pytest.raises(SimulationError, match=r"/nothing/models: .* got 404"):
            read_arms(f"{stand_in.url}/nothing")


@pytest.fixture
def signals() -> Iterator[None]:
    """Put the handlers back that a command line sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(world_file: Path, stand_in: StandIn, folder: Path, *flags: str) -> list[str]:
    where = [str(world_file), "--url", stand_in.url, "--folder", str(folder)]
    return ["ab", *where, "--candidates", "20", *flags]


def in_process(world_file: Path, stand_in: StandIn, folder: Path, *flags: str) -> int:
    """Run `ab` here; return its exit code."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(arguments(world_file, stand_in, folder, *flags))
    code: int = options.run(options)
    return code


@contextmanager
def command(
    world_file: Path, stand_in: StandIn, folder: Path, *flags: str
) -> Iterator["subprocess.Popen[str]"]:
    """Run `ab` as a program of its own; a test that fails leaves nothing of it."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND_LINE, *arguments(world_file, stand_in, folder, *flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        process_group=0,
    ) as process:
        try:
            yield process
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def wait_for(process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> None:
    """Return once it has happened; fail where the process ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        with suppress(httpx.TransportError):
            if happened():
                return
        time.sleep(0.05)
    pytest.fail(f"did not happen within {PATIENCE_S:.0f} s")
