"""The people of an A/B simulation, as users of Locust.

`python -m locust -f loadtest/ab/locustfile.py --ab-run FOLDER ...`, which `python -m loadtest ab`
starts. Nothing else imports it: locust rewrites the standard library when it is imported.
"""

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from locust import FastHttpUser, constant_pacing, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import LocalRunner, Runner, WorkerRunner

from loadtest.ab.answer import Answer, AnswerError, read_answer
from loadtest.ab.journal import Journal, run_began_s
from loadtest.ab.people import Visit, Visitors
from loadtest.ab.plan import TIMEOUT_S, Plan
from loadtest.ab.visits import OK_STATUS, read_run
from loadtest.api_key import api_key_headers
from loadtest.world import World

_DONE, _FAILED = "people_done", "people_failed"
_TOO_MANY_REQUESTS = 429
_CLIENT_ERRORS = range(400, 500)


class _Stage:
    """What the people of one process have in common."""

    def __init__(self, folder: Path, runner: LocalRunner | WorkerRunner) -> None:
        run = read_run(folder)
        self.plan = Plan.from_settings(run.settings)
        self.arms = run.stated_shares.keys()
        self.world = World.load(Path(self.plan.world))
        self.visitors = Visitors(self.world, self.plan.habits)
        self.journal = Journal(folder)
        self.headers = {"Content-Type": "application/json", **api_key_headers()}
        if self.plan.deadline_ms is not None:
            self.headers["X-Deadline-Ms"] = str(self.plan.deadline_ms)
        self._folder = folder
        self._runner = runner
        self._numbers = itertools.count()
        self._n_working = self.plan.users // self.plan.processes
        self._began_s: float | None = None

    def enter(self) -> tuple[float, np.random.Generator]:
        """Return the number of visits of a person that enters, and where its chances come from."""
        number = next(self._numbers)
        process = self._runner.worker_index
        seed = [self.plan.habits.seed, process, number]
        quota = self.plan.quota(process * self.plan.users // self.plan.processes + number)
        return quota, np.random.default_rng(seed)

    def leave(self) -> None:
        """Count a person that has made all its visits."""
        self._n_working -= 1
        if self._n_working == 0:
            self._runner.send_message(_DONE)

    def fail(self, reason: str) -> None:
        """End the run, in all processes."""
        self.journal.write({"error": reason})
        self._runner.send_message(_FAILED)

    def age_s(self) -> float:
        """Return how old the run is."""
        if self._began_s is None:
            self._began_s = run_began_s(self._folder)
        return time.monotonic() - self._began_s


class Person(FastHttpUser):
    """Somebody of the world, somebody else at each visit."""

    network_timeout = TIMEOUT_S
    connection_timeout = TIMEOUT_S
    stage: ClassVar[_Stage]

    def on_start(self) -> None:
        """Take a place among the people of this process."""
        self._left, self._rng = self.stage.enter()

    @task
    def visit(self) -> None:
        """Ask for scores, look at the best, click, and tell the service."""
        stage = self.stage
        visit = stage.visitors.visit(self._rng)
        at_s = stage.age_s()
        time_s = stage.plan.world_time_s(stage.world.history_end_s, at_s)
        user_id = str(visit.user + 1)
        question = {
            "user_id": user_id,
            "candidates": stage.world.item_ids[visit.items].tolist(),
            "ranking_time": time_s,
        }
        status, latency_s, content = self._post("/score", question)
        answer = self._read(content, visit) if status == OK_STATUS else None
        clicked = (
            stage.visitors.clicks(visit, answer.scores) if answer else np.empty(0, dtype=np.int64)
        )
        item_ids = stage.world.item_ids[clicked].tolist()
        stage.journal.write(
            {
                "user_id": user_id,
                "arm": answer.arm if answer else None,
                "version": answer.version if answer else None,
                "at_s": at_s,
                "latency_s": latency_s if answer else None,
                "status": status,
                "n_shown": stage.plan.habits.shown if answer else 0,
                "clicked_items": item_ids,
                "clicked_categories": stage.visitors.categories(clicked).tolist(),
            }
        )
        if item_ids:
            self._tell(user_id, item_ids, time_s)
        self._left -= 1
        if self._left == 0:
            stage.leave()
            raise StopUser

    def wait_time(self) -> float:
        """Return the seconds until the next visit."""
        plan = self.stage.plan
        return constant_pacing(plan.users / plan.rate)(self) if plan.rate else 0.0

    def _tell(self, user_id: str, item_ids: list[int], time_s: int) -> None:
        happened = [{"user_id": user_id, "item_id": item, "time": time_s} for item in item_ids]
        status, _, _ = self._post("/events", {"events": happened})
        if status != OK_STATUS:
            self.stage.journal.write({"unposted_clicks": len(item_ids)})

    def _post(self, path: str, body: object) -> tuple[int, float, bytes]:
        """Return status (0: no answer), seconds and content; end the run on a refused question."""
        sent_s = time.perf_counter()
        response = self.client.post(path, data=json.dumps(body), headers=self.stage.headers)
        latency_s = time.perf_counter() - sent_s
        status = response.status_code or 0
        content = bytes(response.content or b"")
        if status in _CLIENT_ERRORS and status != _TOO_MANY_REQUESTS:
            self._give_up(f"POST {path}: {status} {content.decode(errors='replace')[:300]}")
        return status, latency_s, content

    def _read(self, content: bytes, visit: Visit) -> Answer:
        try:
            return read_answer(content, n_candidates=len(visit.items), arms=self.stage.arms)
        except AnswerError as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> NoReturn:
        self.stage.fail(reason)
        raise StopUser


def add_flags(parser: LocustArgumentParser, **_: Any) -> None:
    """Tell Locust of the folder of the run."""
    parser.add_argument("--ab-run", required=True, include_in_web_ui=False)


def set_stage(environment: Environment, runner: Runner, **_: Any) -> None:
    """Make what the people of this process need, and let the one that leads hear of their end."""
    assert environment.parsed_options is not None
    folder = Path(environment.parsed_options.ab_run)
    if isinstance(runner, LocalRunner | WorkerRunner):
        Person.stage = _Stage(folder, runner)
    if not isinstance(runner, WorkerRunner):
        _listen(environment, runner, Plan.from_settings(read_run(folder).settings).processes)


def _listen(environment: Environment, runner: Runner, n_processes: int) -> None:
    done = itertools.count(1)

    def end() -> None:
        runner.quit()
        if environment.web_ui is not None:
            environment.web_ui.stop()  # type: ignore[no-untyped-call]

    # A greenlet, as Locust makes of every thread, of its own: `end` would end a person's half-way.
    def on_failed(**_: Any) -> None:
        threading.Thread(target=end).start()

    def on_done(**_: Any) -> None:
        if next(done) == n_processes:
            on_failed()

    runner.register_message(_DONE, on_done)
    runner.register_message(_FAILED, on_failed)


def end_on_error(exception: Exception, **_: Any) -> None:
    """End the run on an error of this program; Locust would only log it, and go on."""
    Person.stage.fail(f"{type(exception).__name__}: {exception}")


# Locust's own listeners have no types.
events.init_command_line_parser.add_listener(add_flags)  # type: ignore[no-untyped-call]
events.init.add_listener(set_stage)  # type: ignore[no-untyped-call]
events.user_error.add_listener(end_on_error)  # type: ignore[no-untyped-call]
