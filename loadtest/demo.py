"""The whole path in one command: a log becomes a model, a bundle, a service, and scores.

Every step is the project's own command line, printed before it runs, so that the demo can be
repeated by hand, step by step.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx
import numpy as np
import polars as pl

from contract.history_log import HistoryLog
from loadtest.redis_server import free_port, redis_server

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_SHOWN_USERS = 3
_SHOWN_CANDIDATES = 6
# The demo's machine may be busy with anything; it is not what the deadline is there for.
_DEADLINE_MS = "5000"


@dataclass(frozen=True, kw_only=True)
class _Cast:
    """Who plays in a demo: models that train first, and the one that is served, named as the run
    files are, on a small synthetic log and on a real one; and the metric that compares them.
    """

    baselines: tuple[str, ...]
    served: str
    served_real: str
    metric: str
    title: str


_NEXT_ITEM_TITLE = "test NDCG@10 in the full ranking"
CASTS: dict[str, _Cast] = {
    "imn": _Cast(
        baselines=("popularity", "youtube-dnn"),
        served="imn-3p",
        served_real="imn-3p-plus",
        metric="auc",
        title="test AUC",
    ),
    **{
        model: _Cast(
            baselines=("fpmc",),
            served=model.replace("_", "-"),
            served_real=model.replace("_", "-"),
            metric="full_ndcg10",
            title=_NEXT_ITEM_TITLE,
        )
        for model in ("sasrec", "pkm_act")
    },
}


class DemoError(RuntimeError):
    """A step of the demo failed."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """`log`: a behavior log, None for a synthetic one. `folder`: where all files go, emptied
    first. `model`: one of CASTS. `once`: end after the scores instead of serving on. `port`: of the
    service, 0 for any that is free.
    """

    log: Path | None
    model: str
    folder: Path
    once: bool
    port: int


def run_demo(options: DemoOptions) -> None:
    """Run all steps; raises DemoError when one fails. Leaves no process behind."""
    _end_on_signals()
    _empty(options.folder)
    with ExitStack() as stack:
        log = options.log or _synthetic_log(options.folder)
        prepared = options.folder / "log"
        cast = CASTS[options.model]
        scale, served = ("demo", cast.served) if options.log is None else ("real", cast.served_real)
        k_core = [] if options.log is None else ["--min-interactions", "5"]
        _step("training", "prepare", log, prepared, *k_core)
        for model in (*cast.baselines, served):
            _step("training", "train", f"{scale}-{model}", prepared, options.folder / model)
        bundle = options.folder / "bundle"
        _step("exporter", options.folder / served / "model.pt", bundle)

        redis_url = os.environ.get("REDIS_URL")
        if redis_url is None:
            redis_url = stack.enter_context(redis_server())
        environment = {**os.environ, "REDIS_URL": redis_url, "MNEME_BUNDLE": str(bundle)}
        _step("service", "backfill", prepared, environment=environment)
        service, url = stack.enter_context(_service(environment, options.port))
        _print_metrics(options.folder, cast, served)
        with httpx.Client(base_url=url, headers={"X-Deadline-Ms": _DEADLINE_MS}) as client:
            _show_scores(client, HistoryLog(prepared), np.load(bundle / "catalogue.npy"))
        if not options.once:
            print(f"\nserving at {url} (try {url}/docs); Ctrl-C ends it", flush=True)
            raise DemoError(f"the service ended with status {service.wait()}")


def _synthetic_log(folder: Path) -> Path:
    log = folder / "world.parquet"
    _step("loadtest", "world", log, "--users", "3000", "--history-length", "150", "--memory", "140")
    return log


def _step(module: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
    command = ["-m", module, *map(str, arguments)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    with _child(command, environment) as process:
        status = process.wait()
    if status:
        raise DemoError(f"python {shlex.join(command)} ended with status {status}")


@contextmanager
def _child(
    command: Sequence[str], environment: dict[str, str] | None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run Python in a process group of its own, and end it with the block."""
    process = subprocess.Popen([sys.executable, *command], env=environment, process_group=0)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _service(
    environment: dict[str, str], port: int
) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["-m", "service", "--port", str(port), "--log-format", "text", "--drain-s", "0"]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    with _child(command, environment) as process:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _is_ready(url):
            if process.poll() is not None:
                raise DemoError(f"the service ended with status {process.returncode}")
            if time.monotonic() > deadline:
                raise DemoError(f"the service was not ready within {_START_TIMEOUT_S:.0f} s")
            time.sleep(0.1)
        yield process, url


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def _print_metrics(folder: Path, cast: _Cast, served: str) -> None:
    """Print the test metrics of the models that this run trained."""
    tests = {model: _test_metrics(folder / model) for model in (*cast.baselines, served)}
    print(f"\n{cast.title}, trained in this run")
    for model, metrics in tests.items():
        print(f"  {model:14s}{metrics[cast.metric]:.4f}")
    ceiling = tests[served].get("ceiling_auc")
    if ceiling is not None:
        print(f"  {'ceiling':14s}{ceiling:.4f}  (the true click probabilities themselves)")


def _test_metrics(run_folder: Path) -> dict[str, Any]:
    lines = pl.read_ndjson(run_folder / "metrics.jsonl", infer_schema_length=None)
    return lines.filter(part="test").row(0, named=True)


def _show_scores(client: httpx.Client, log: HistoryLog, catalogue: np.ndarray[Any, Any]) -> None:
    rng = np.random.default_rng(0)
    lengths = np.diff(log.behavior_offsets)
    longest_first = np.argsort(-lengths, kind="stable")
    shown = longest_first[np.linspace(0, len(longest_first) // 2, _SHOWN_USERS).astype(int)]
    for user_id in [*(log.user_id(int(user)) for user in shown), "somebody-unknown"]:
        candidates = rng.choice(catalogue, _SHOWN_CANDIDATES, replace=False).tolist()
        answer = client.post("/score", json={"user_id": user_id, "candidates": candidates})
        if not answer.is_success:
            raise DemoError(f"POST /score: {answer.status_code} {answer.text}")
        scored = answer.json()
        print(
            f"\nPOST /score  user {user_id}, scored by {scored['history_length']} behaviors "
            f"with {scored['version']}\n  {answer.headers['Server-Timing']}"
        )
        is_probability = scored["score_kind"] == "probability"
        ranked = sorted(zip(scored["scores"], candidates, strict=True), reverse=True)
        for score, item in ranked:
            bar = "#" * round(40 * score) if is_probability else ""
            print(f"  item {item:<16d}{score:.4f}  {bar}".rstrip())
        if not is_probability:
            _show_recommendations(client, user_id)


def _show_recommendations(client: httpx.Client, user_id: str) -> None:
    question = {"user_id": user_id, "k": _SHOWN_CANDIDATES, "exclude_seen": True}
    answer = client.post("/recommend", json=question)
    if not answer.is_success:
        raise DemoError(f"POST /recommend: {answer.status_code} {answer.text}")
    items = ", ".join(str(item) for item in answer.json()["item_ids"])
    print(f"POST /recommend  user {user_id}, the best of all items: {items}")


def _empty(folder: Path) -> None:
    """Remove what an earlier demo left, and only that."""
    marker = folder / ".mneme-demo"
    if folder.exists():
        if not marker.exists() and any(folder.iterdir()):
            raise DemoError(f"{folder} holds files that are not of a demo: name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    marker.touch()


def _end_on_signals() -> None:
    # Both end the blocks that hold child processes. SIGINT is named too: a shell that starts this
    # in the background has it ignored.
    def interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
