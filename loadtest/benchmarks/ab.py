"""An A/B test of two bundles in the synthetic world, and its controls.

The controls: A/A over many seeds, where nothing is to be found, and an assignment that is not what
is stated, which must be noticed. Every run starts from the same histories, those of the log before
its visits: only so is each A/A run a repetition of the same experiment, and only so may the world's
clock start again where the histories end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import httpx
import redis
from tqdm import tqdm

from contract.history_log import HistoryLog
from loadtest.ab.comparison import LEVEL, Traffic
from loadtest.ab.people import Habits
from loadtest.ab.plan import Plan
from loadtest.ab.report import (
    METRIC_MEANINGS,
    METRIC_NAMES,
    PAPER_CTR_UPLIFT,
    REPORT_HTML,
    Report,
    markdown_table,
)
from loadtest.ab.simulation import SimulationError, add_plan_flags, plan_of, simulate
from loadtest.ab.visits import write_whole
from loadtest.redis_server import free_port, redis_server
from loadtest.results import table, write_section
from loadtest.world import World

_PREFIX = "history"
_START_TIMEOUT_S, _APPLY_TIMEOUT_S = 120.0, 120.0
_CHUNK_USERS = 500
_TITLE = "A/B in the synthetic world"
# What the planted fault says, and what it does.
_STATED = 0.5
_PLANTED = 0.6


@dataclass(frozen=True, kw_only=True)
class Results:
    """What the runs have shown: `ab`, its controls `aa`, one a seed, and the `planted` fault.

    `unposted_clicks`: of the A/B run, those that did not get into histories.
    """

    ab: Report
    unposted_clicks: int
    aa: tuple[Report, ...]
    planted: Report


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `ab-results` to the commands of a program."""
    one = commands.add_parser("ab-results", help="A/B of two bundles, and its controls")
    one.add_argument("world", help="file of the world, .world.npz")
    one.add_argument(
        "--bundle",
        action="append",
        required=True,
        metavar="ARM=FOLDER",
        help="twice: the new model, then the baseline",
    )
    one.add_argument("--log", type=Path, required=True, help="the world's prepared log")
    one.add_argument("--folder", type=Path, default=Path("runs/ab-results"), help="of all runs")
    one.add_argument("--page", type=Path, default=Path("docs/results/ab.md"), help="to write")
    one.add_argument("--aa-visits", type=int, default=3000, help="a seed (default %(default)s)")
    one.add_argument("--aa-seeds", type=int, default=20, help="default %(default)s")
    add_plan_flags(one, leave_out=("run_time_s", "start_days"))
    # Refusals would show which model is slow on this machine, in place of which one is better; the
    # share within 30 ms is in the report all the same.
    one.set_defaults(run=_run_command, visits=40_000, users=4, deadline_ms=2000.0)


def _run_command(options: argparse.Namespace) -> int:
    bundles = _read_bundles(options.bundle)
    if options.folder.exists() and any(options.folder.iterdir()):
        raise SimulationError(f"{options.folder} is not empty: name another folder for these runs")
    if options.aa_seeds < 1:
        raise SimulationError(f"--aa-seeds must be at least 1, got {options.aa_seeds}")
    results = measure(
        # Where the service listens is known when it starts.
        plan_of(options, url=""),
        bundles,
        log=HistoryLog(options.log),
        folder=options.folder,
        aa_visits=options.aa_visits,
        aa_seeds=options.aa_seeds,
    )
    shutil.copyfile(options.folder / "ab" / REPORT_HTML, options.page.with_suffix(".html"))
    write_section(
        options.page,
        title=_TITLE,
        command=_command(options),
        text=section(results),
        figures=figures(results),
    )
    print(section(results))
    return 0


def measure(
    plan: Plan,
    bundles: Mapping[str, Path],
    *,
    log: HistoryLog,
    folder: Path,
    aa_visits: int,
    aa_seeds: int,
) -> Results:
    """Run everything, each run in a folder of its own; `bundles`: the new model, the baseline.

    The A/A runs take the seeds after the plan's. Raises ValueError where a run cannot go on.
    """
    new, baseline = bundles
    world = World.load(Path(plan.world))
    file = folder.resolve() / "experiments.toml"
    same = dict.fromkeys(("a", "b"), (bundles[baseline], _STATED))
    small = replace(plan, visits=aa_visits)
    arms = {arm: (bundles[arm], _STATED) for arm in (baseline, new)}
    write_experiments(file, "ab", arms)
    with redis_server() as redis_url, _service(file, redis_url) as url:

        def run(
            name: str, planned: Plan, arms: Mapping[str, tuple[Path, float]], *, seed: int
        ) -> tuple[Report, int]:
            write_experiments(file, name, arms)
            _wait_until_applied(url, name)
            set_histories(redis_url, log, before_s=world.history_end_s)
            outcome = simulate(
                replace(planned, url=url, habits=replace(plan.habits, seed=seed)),
                folder / name,
                stated_shares=dict.fromkeys(arms, _STATED),
                baseline=next(iter(arms)),
            )
            return outcome.report, outcome.unposted_clicks

        first = plan.habits.seed
        ab, unposted = run("ab", plan, arms, seed=first)
        aa = [
            run(f"aa-{seed}", small, same, seed=seed)[0]
            for seed in tqdm(range(first + 1, first + 1 + aa_seeds), desc="A/A", disable=None)
        ]
        uneven = {"a": (bundles[baseline], 1 - _PLANTED), "b": (bundles[baseline], _PLANTED)}
        planted, _ = run("planted", small, uneven, seed=first)
    return Results(ab=ab, unposted_clicks=unposted, aa=tuple(aa), planted=planted)


def figures(results: Results) -> dict[str, float]:
    """Return the figures of the page's JSON; uplifts are relative, 0.07 is 7 % more."""
    uplift = results.ab.comparison.arms[1].uplifts["ctr"]
    traffic = results.ab.comparison.traffic
    return {
        "ctr_uplift": uplift.value,
        "ctr_uplift_ci_low": uplift.low,
        "ctr_uplift_ci_high": uplift.high,
        "ctr_uplift_p": uplift.p_value,
        f"aa_significant_of_{len(results.aa)}": sum(p < LEVEL for p in _aa_p_values(results)),
        "srm_p_planted": results.planted.comparison.sample_ratio.p_value,
        "visits": traffic.n_requests,
        "errors": traffic.n_errors,
    }


def section(results: Results) -> str:
    """Return the Markdown of the page's section."""
    comparison = results.ab.comparison
    p_values = _aa_p_values(results)
    settings = results.ab.run.settings
    ratio = results.planted.comparison.sample_ratio
    n_significant = sum(p < LEVEL for p in p_values)
    listed = ", ".join(f"{p:.3f}" for p in p_values)
    people = (
        f"{comparison.traffic.n_requests:,} visits of {comparison.n_users:,} people, "
        f"{settings['candidates']} candidates each, of which {settings['shown']} are shown; "
        f"{settings['users']} at a time (a closed loop), "
        f"{comparison.traffic.n_errors:,} of them not answered, "
        f"{results.unposted_clicks:,} clicks not in histories. The paper's relative CTR, of other "
        f"people with other items, is {PAPER_CTR_UPLIFT:+.2%}."
    )
    words = "; ".join(f"{METRIC_NAMES[name]}: {METRIC_MEANINGS[name]}" for name in METRIC_NAMES)
    aa = (
        f"**A/A**, the baseline against itself, {len(p_values)} seeds with another salt each, "
        f"{results.aa[0].comparison.traffic.n_requests:,} visits a seed: {n_significant} of "
        f"{len(p_values)} with p < {LEVEL:g} for CTR. All p-values: {listed}."
    )
    planted = (
        f"**A planted fault**, {_PLANTED:.0%} of the people where {_STATED:.0%} are stated: "
        f"{' and '.join(f'{n} in {arm}' for arm, n in ratio.observed.items())}, sample ratio "
        f"p = {ratio.p_value:.2g}, "
        f"{'caught as a mismatch' if ratio.is_mismatched else 'not noticed'}."
    )
    return "\n\n".join(
        [
            people,
            markdown_table(results.ab),
            f"{words}. The paper does not spell its abbreviations out: so they are read here.",
            *results.ab.verdicts,
            table(_TRAFFIC_HEADS, [_traffic_row(arm.name, arm.traffic) for arm in comparison.arms]),
            aa,
            planted,
        ]
    )


_TRAFFIC_HEADS = ("arm", "visits", "errors", "p50 ms", "p99 ms", "p99.9 ms", "within 30 ms")


def _traffic_row(arm: str, traffic: Traffic) -> tuple[object, ...]:
    return (
        *(arm, f"{traffic.n_requests:,}", f"{traffic.n_errors:,}"),
        *(f"{ms:.1f}" for ms in (traffic.p50_ms, traffic.p99_ms, traffic.p999_ms)),
        f"{traffic.share_in_budget:.1%}",
    )


def _aa_p_values(results: Results) -> list[float]:
    return [report.comparison.arms[1].uplifts["ctr"].p_value for report in results.aa]


def write_experiments(path: Path, salt: str, arms: Mapping[str, tuple[Path, float]]) -> None:
    """Write an experiments file of arms with a bundle and a share each, all of it at once."""
    lines = [f"salt = {json.dumps(salt)}"]
    for arm, (bundle, share) in arms.items():
        # A JSON string is a TOML string too.
        lines += [f"[arms.{arm}]", f"bundle = {json.dumps(str(bundle.resolve()))}"]
        lines += [f"share = {share!r}"]
    write_whole(path, lambda staging: staging.write_text("\n".join(lines) + "\n"))


def set_histories(redis_url: str, log: HistoryLog, *, before_s: int) -> None:
    """Replace all that the Redis holds by the log's behaviors before a unix time.

    Not by `python -m service backfill`: the log holds the clicks of its own visits too, which the
    clock of a run has not reached when it starts.
    """
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        pipeline = client.pipeline(transaction=False)
        for user in range(len(log)):
            start, end = log.behavior_offsets[user : user + 2]
            records = log.behaviors[start:end]
            pipeline.set(
                f"{_PREFIX}:{log.user_id(user)}", records[records["time"] < before_s].tobytes()
            )
            if user % _CHUNK_USERS == 0:
                pipeline.execute()
        pipeline.execute()


@contextmanager
def _service(experiments: Path, redis_url: str) -> Iterator[str]:
    """Run the service with an experiments file, and yield its URL when it is ready."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "service", "--experiments", str(experiments)),
        *("--redis-url", redis_url, "--key-prefix", _PREFIX, "--port", str(port)),
        *("--drain-s", "0"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, process_group=0)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _is_ready(url):
            if process.poll() is not None:
                raise SimulationError(f"the service ended with status {process.returncode}")
            if time.monotonic() > deadline:
                raise SimulationError(f"the service was not ready in {_START_TIMEOUT_S:.0f} s")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def _wait_until_applied(url: str, salt: str) -> None:
    deadline = time.monotonic() + _APPLY_TIMEOUT_S
    while (applied := httpx.get(f"{url}/experiments").json())["salt"] != salt:
        if applied["refused"] is not None:
            raise SimulationError(f"the service refused the experiments: {applied['refused']}")
        if time.monotonic() > deadline:
            raise SimulationError(f"the experiments were not applied in {_APPLY_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _read_bundles(texts: list[str]) -> dict[str, Path]:
    pairs = [text.partition("=") for text in texts]
    bundles = {arm: Path(folder) for arm, _, folder in pairs if arm and folder}
    if len(texts) != 2 or len(bundles) != 2:
        raise SimulationError(
            f"--bundle ARM=FOLDER is needed for two arms, the new model and the baseline, "
            f"got {' '.join(texts)}"
        )
    return bundles


def _command(options: argparse.Namespace) -> str:
    bundles = " ".join(f"--bundle {text}" for text in options.bundle)
    habits = " ".join(
        f"--{habit.name.replace('_', '-')} {getattr(options, habit.name)}"
        for habit in fields(Habits)
        if getattr(options, habit.name) != habit.default
    )
    return (
        f"python -m loadtest ab-results {options.world} {bundles} --log {options.log} "
        f"--visits {options.visits} --aa-visits {options.aa_visits} {habits}"
    ).strip()
