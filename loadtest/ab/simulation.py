"""An A/B test, rehearsed: people of the synthetic world visit a running service with arms.

`python -m loadtest ab WORLD --url URL --folder FOLDER`. The people are users of Locust, in a
process of their own; they wait for answers before they go on (a closed loop), so latencies are
those of the visits made, and no measure of what the service does at a given rate of arrivals.
"""

import argparse
import datetime
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from loadtest.ab.journal import count_lines, read_journals, remove_journals
from loadtest.ab.people import Habits, Visitors
from loadtest.ab.plan import TIMEOUT_S, Plan
from loadtest.ab.report import REPORT_HTML, Report, summary, write_report
from loadtest.ab.visits import Run, write_run, write_visits
from loadtest.api_key import api_key_headers
from loadtest.redis_server import free_port
from loadtest.world import World

LOCUST_LOG = "locust.log"
_DEFAULT_VISITS = 40_000
_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_MODELS_TIMEOUT_S = 10.0
_WORKERS_TIMEOUT_S = 120
_POLL_S = 0.5
# Longer than a visit takes at worst: two requests, each given up after its time.
_STOP_S = math.ceil(2 * TIMEOUT_S) + 1
_SHOWN_LOG_LINES = 5


class SimulationError(ValueError):
    """A simulation that cannot start, or that could not go on."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`report`: of the run. `unposted_clicks`: those that did not get into histories, because
    `POST /events` failed.
    """

    report: Report
    unposted_clicks: int


def read_arms(url: str) -> dict[str, float]:
    """Return the share of each arm that answers, in the service's order: `GET /models`.

    Arms that are shadows or have no share are left out. Raises SimulationError where no service
    with arms answers.
    """
    try:
        answer = httpx.get(f"{url}/models", headers=api_key_headers(), timeout=_MODELS_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SimulationError(f"no service answers at {url}: {error}") from error
    try:
        models = answer.raise_for_status().json()["models"]
        shares = {one["arm"]: float(one["share"]) for one in models if not one["shadow"]}
    except (httpx.HTTPStatusError, ValueError, TypeError, KeyError) as error:
        raise SimulationError(
            f"GET {url}/models: models with arm, share and shadow are expected, got "
            f"{answer.status_code} {answer.text[:300]}"
        ) from error
    shares = {arm: share for arm, share in shares.items() if share > 0}
    if not shares:
        raise SimulationError(f"GET {url}/models: no arm answers: {answer.text[:300]}")
    return shares


def simulate(
    plan: Plan,
    folder: Path,
    *,
    stated_shares: Mapping[str, float] | None = None,
    baseline: str | None = None,
) -> Outcome:
    """Run the plan against its service and write the folder of the run: all files and the report.

    `stated_shares`: what the shares are compared with, those of the service unless given.
    `baseline`: the first arm of the service unless given. Ctrl-C ends the visits early; the report
    is of those made. Raises ValueError (SimulationError for what concerns the service) where the
    run cannot start, cannot go on, or has made no visit.
    """
    Visitors(World.load(Path(plan.world)), plan.habits)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SimulationError(f"{folder} is not empty: name another folder for this run")
    arms = read_arms(plan.url)
    stated = dict(stated_shares or arms)
    if stated.keys() != arms.keys():
        raise SimulationError(
            f"stated shares must be of the arms that answer ({', '.join(arms)}), "
            f"got {', '.join(stated)}"
        )
    baseline = next(iter(arms)) if baseline is None else baseline
    if baseline not in arms:
        raise SimulationError(
            f"baseline must be one of the arms that answer ({', '.join(arms)}), got {baseline}"
        )
    run = Run(
        started=datetime.datetime.now(datetime.UTC),
        stated_shares=stated,
        baseline=baseline,
        settings=plan.as_settings(),
    )
    write_run(run, folder)
    _run_locust(plan, folder)
    journals = read_journals(folder)
    if journals.errors:
        raise SimulationError(journals.errors[0])
    if not journals.visits:
        raise SimulationError(f"no visit was made; what Locust said: {folder / LOCUST_LOG}")
    write_visits(journals.visits, folder)
    remove_journals(folder)
    return Outcome(report=write_report(folder), unposted_clicks=journals.unposted_clicks)


def _run_locust(plan: Plan, folder: Path) -> None:
    with (
        (folder / LOCUST_LOG).open("wb") as log,
        subprocess.Popen(
            _locust_command(plan, folder),
            # Without a terminal: Locust reads keys from it.
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal must reach the parent alone, which then ends all of Locust.
            process_group=0,
        ) as process,
    ):
        try:
            _watch(process, plan, folder)
        except KeyboardInterrupt:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(2 * _STOP_S)
            return
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode and not read_journals(folder).errors:
        lines = (folder / LOCUST_LOG).read_text(errors="replace").splitlines()
        raise SimulationError(
            f"Locust ended with status {process.returncode}: "
            + " | ".join(lines[-_SHOWN_LOG_LINES:])
        )


def _watch(process: "subprocess.Popen[bytes]", plan: Plan, folder: Path) -> None:
    with tqdm(total=plan.visits, desc="visits", unit="", disable=None) as bar:
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
                return
            if not bar.disable:
                bar.update(count_lines(folder) - bar.n)


def _locust_command(plan: Plan, folder: Path) -> list[str]:
    flags: dict[str, object] = {
        "-f": _LOCUSTFILE,
        "--ab-run": folder,
        "--host": plan.url,
        "--users": plan.users,
        # With a rate, people come one by one, which spreads their visits evenly over time.
        "--spawn-rate": plan.rate or plan.users,
        "--stop-timeout": _STOP_S,
        # Failed visits are results. What must end the run says so itself.
        "--exit-code-on-error": 0,
        "--loglevel": "WARNING",
    }
    if plan.run_time_s is not None:
        flags["--run-time"] = f"{math.ceil(plan.run_time_s)}s"
    if plan.ui_port is not None:
        flags |= {"--web-host": "127.0.0.1", "--web-port": plan.ui_port}
    if plan.processes > 1:
        port = free_port()
        flags |= {
            "--processes": plan.processes,
            "--master-bind-host": "127.0.0.1",
            "--master-bind-port": port,
            "--master-port": port,
            # One that cannot start would be waited for without end.
            "--expect-workers-max-wait": _WORKERS_TIMEOUT_S,
        }
    switches = ["--headless", "--only-summary"] if plan.ui_port is None else []
    pairs = [str(part) for pair in flags.items() for part in pair]
    return [sys.executable, "-m", "locust", *pairs, *switches]


def add_plan_flags(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    """Give a parser a flag for each setting of a plan and of its habits, but those left out."""
    for setting in (*fields(Plan), *fields(Habits)):
        if setting.name in _HELP and setting.name not in leave_out:
            parser.add_argument(
                f"--{setting.name.replace('_', '-')}",
                type=_number_type(setting),
                default=setting.default,
                help=_HELP[setting.name],
            )


def plan_of(options: argparse.Namespace, **others: Any) -> Plan:
    """Return the plan that the flags of `add_plan_flags`, and `others`, describe."""
    given = {**vars(options), **others}
    habits = Habits(**{one.name: given[one.name] for one in fields(Habits)})
    names = [one.name for one in fields(Plan) if one.name != "habits" and one.name in given]
    return Plan(**{name: given[name] for name in names}, habits=habits)


_HELP = {
    "users": "people at a time; each waits for the answer, a closed loop (default %(default)s)",
    "processes": "of Locust, a divisor of users (default %(default)s)",
    "visits": f"in all (default {_DEFAULT_VISITS:,} where no run time is given)",
    "run_time_s": "seconds after which the run ends at the latest",
    "rate": "visits/s in all, as long as answers are quick enough; no pause unless given",
    "deadline_ms": "sent as X-Deadline-Ms",
    "start_days": "days from the end of the world's histories to the first visit (default "
    "%(default)s); more where the service's histories hold later behaviors",
    "speedup": "world seconds in a second (default %(default)s, a day a minute)",
    "candidates": "items scored in a visit (default %(default)s)",
    "targets_per_visit": "of the candidates (default %(default)s)",
    "shown": "the best items, which the person sees (default %(default)s)",
    "eta": "position k is looked at with probability 1/(1+k)^eta (default %(default)s)",
    "user_skew": "Zipf's exponent of how often people visit (default %(default)s: all alike)",
    "seed": "of all that people do (default %(default)s)",
}


def _number_type(setting: "Field[Any]") -> type:
    return int if setting.type in (int, int | None) else float


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `ab` to the commands of a program."""
    one = commands.add_parser(
        "ab", help="rehearse an A/B test with people whose click probabilities are known"
    )
    one.add_argument("world", help="file of the world, .world.npz")
    one.add_argument("--url", default="http://127.0.0.1:8000", help="default %(default)s")
    one.add_argument("--folder", type=Path, default=Path("runs/ab"), help="default %(default)s")
    one.add_argument(
        "--stated-share",
        action="append",
        metavar="ARM=SHARE",
        help="of users, once for each arm; those of the service unless given",
    )
    one.add_argument("--baseline", help="arm to compare with; the service's first unless given")
    one.add_argument("--ui", action="store_true", help="start and end the run in Locust's web page")
    one.add_argument("--ui-port", type=int, default=8089, help="default %(default)s")
    add_plan_flags(one)
    one.set_defaults(run=_run_command)


def _run_command(options: argparse.Namespace) -> int:
    # Both end the visits: a shell that starts this in the background has SIGINT ignored.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    url = options.url.rstrip("/")
    visits = options.visits
    if visits is None and options.run_time_s is None and not options.ui:
        visits = _DEFAULT_VISITS
    plan = plan_of(options, url=url, visits=visits, ui_port=options.ui_port if options.ui else None)
    if options.ui:
        _say(f"http://127.0.0.1:{plan.ui_port} starts and stops the visits; Ctrl-C ends the run")
    outcome = simulate(
        plan,
        options.folder,
        stated_shares=_read_shares(options.stated_share),
        baseline=options.baseline,
    )
    _say(summary(outcome.report))
    if outcome.unposted_clicks:
        _say(f"{outcome.unposted_clicks} clicks did not get into histories: POST /events failed")
    _say(str(options.folder / REPORT_HTML))
    return int(outcome.report.comparison.sample_ratio.is_mismatched)


def _read_shares(texts: Sequence[str] | None) -> dict[str, float] | None:
    shares = {}
    for text in texts or ():
        arm, _, share = text.partition("=")
        try:
            shares[arm] = float(share)
        except ValueError as error:
            raise SimulationError(f"--stated-share must be ARM=SHARE, got {text}") from error
    return shares or None


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n\n")
    sys.stdout.flush()
