"""`python -m service` serves, `... publish` and `... rollback` say which bundle, `... backfill`
loads histories, `... profile` measures.
"""

import argparse
import asyncio
import json
import os
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from redis import Redis
from tqdm import tqdm

from contract.bundle import read_manifest
from contract.errors import ContractError
from contract.history_log import HistoryLog
from service.backfill import backfill
from service.errors import ServiceError
from service.experiment import ExperimentError
from service.history import HistoryStore, connect
from service.listening import bind
from service.logs import configure
from service.pointer import bundle_in_force, publish, rollback
from service.settings import (
    Settings,
    SettingsError,
    add_flags,
    read_settings,
)
from service.titles import read_titles
from service.wanted import read_wanted, wanted_experiment

if TYPE_CHECKING:
    from service.profile import ShapeProfile

_BACKFILL_TIMEOUT_S = 30.0
_TRACING_NEEDS = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors of the user end in one clear line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = _COMMANDS.get(arguments[0]) if arguments else None
        return _serve(arguments) if command is None else command(arguments[1:])
    except (ContractError, ExperimentError, SettingsError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _serve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    add_flags(parser)
    settings = read_settings(vars(parser.parse_args(arguments)))
    missing = [name for name in ("uvloop", "httptools") if not _is_installed(name)]
    if missing:
        raise SettingsError(f"{' and '.join(missing)} must be installed: without, it is too slow")
    if settings.tracing == "otel" and not all(map(_is_installed, _TRACING_NEEDS)):
        raise SettingsError("tracing: otel needs the extra `otel`: mneme[otel]")
    configure(
        level=settings.log_level,
        style=settings.log_format,
        personal_data=settings.log_personal_data,
    )
    # What cannot be served is found out before there are processes.
    read_titles(settings.titles)
    wanted = read_wanted(settings)
    listeners = bind(settings)
    with ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        folder = stack.enter_context(TemporaryDirectory(prefix="mneme-metrics-"))
        # Of `service.metrics`, and read when that is imported: here, and in each worker.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        from service.supervisor import RefusedError, Supervisor

        def announce(url: str) -> None:
            print(f"serving {', '.join(wanted.versions)} at {url}", flush=True)

        async def supervise() -> int:
            supervisor = Supervisor(settings, listeners, folder=Path(folder))
            return await supervisor.run(wanted, announce=announce)

        try:
            return asyncio.run(supervise())
        except RefusedError as error:
            raise SettingsError(str(error)) from error


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _publish(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service publish",
        description="Let a pointer file name a bundle: a service that was started with "
        "`--bundle POINTER` serves it from then on.",
    )
    parser.add_argument("pointer", type=Path, help="is made where there is none")
    parser.add_argument("folder", type=Path, help="a bundle")
    given = parser.parse_args(arguments)
    manifest = publish(given.pointer, given.folder)
    print(f"{given.pointer} names {given.folder} ({manifest.model_version})")
    return 0


def _rollback(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service rollback",
        description="Let a pointer file name the bundle before the one that it names now.",
    )
    parser.add_argument("pointer", type=Path)
    pointer = parser.parse_args(arguments).pointer
    manifest = rollback(pointer)
    print(f"{pointer} names {bundle_in_force(pointer)} ({manifest.model_version})")
    return 0


def _backfill(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service backfill", description=backfill.__doc__
    )
    parser.add_argument("log", type=Path, help="a prepared log")
    add_flags(parser, ["bundle", "experiments", "redis_url", "key_prefix"])
    flags = vars(parser.parse_args(arguments))
    log = HistoryLog(flags.pop("log"))
    settings: Settings = read_settings(flags)
    arms = wanted_experiment(settings).arms.values()
    keep = max(
        arm.history_length or read_manifest(arm.bundle).features.history_length for arm in arms
    )
    with (
        Redis.from_url(settings.redis_url, socket_timeout=_BACKFILL_TIMEOUT_S) as redis,
        tqdm(total=len(log), desc="backfill", unit=" users") as bar,
    ):
        report = backfill(
            redis, log, prefix=settings.key_prefix, keep=keep, progress=lambda n: bar.update(n)
        )
    print(
        f"{report.written:,} histories written, {report.merged:,} merged, "
        f"{report.unchanged:,} unchanged, {len(report.corrupt):,} corrupt"
    )
    if report.corrupt:
        print(f"corrupt, left as they are: {', '.join(report.corrupt[:10])}", file=sys.stderr)
        return 1
    return 0


def _profile(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service profile",
        description="Score without HTTP and print what each shape takes, one JSON object a line. "
        "Writes histories of users `profile-...` to Redis.",
    )
    for axis, default in (("batches", [1, 8]), ("candidates", [100]), ("lengths", [1000])):
        parser.add_argument(f"--{axis}", type=int, nargs="+", default=default)
    parser.add_argument("--users", type=int, default=200, help="histories of each length")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape")
    add_flags(parser, ["bundle", "redis_url", "key_prefix", "provider", "threads"])
    options = vars(parser.parse_args(arguments))
    batches, candidates, lengths = (
        options.pop(axis) for axis in ("batches", "candidates", "lengths")
    )
    users, seconds = options.pop("users"), options.pop("seconds")
    settings: Settings = read_settings(options)
    if settings.bundle is None:
        raise SettingsError("profile measures one model: name its --bundle")
    # What serves is loaded where it serves, and not by whoever supervises it.
    from service.model import OnnxModel
    from service.profile import profile, shapes_of

    shapes = shapes_of(batches, candidates, lengths)
    bundle = bundle_in_force(settings.bundle)
    model = OnnxModel(bundle, provider=settings.provider, threads=settings.threads)

    async def measure() -> "list[ShapeProfile]":
        store = HistoryStore(
            connect(settings.redis_url, timeout_s=_BACKFILL_TIMEOUT_S),
            prefix=settings.key_prefix,
            keep=model.manifest.features.history_length,
        )
        try:
            return await profile(
                model,
                store,
                shapes,
                users=users,
                seconds=seconds,
                warm_up=settings.provider == "cuda",
            )
        finally:
            await store.close()

    for row in asyncio.run(measure()):
        print(json.dumps(row.as_dict()))
    return 0


_COMMANDS = {
    "publish": _publish,
    "rollback": _rollback,
    "backfill": _backfill,
    "profile": _profile,
}

if __name__ == "__main__":
    sys.exit(main())
