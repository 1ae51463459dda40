"""`python -m service` serves. Beside it: `... publish` and `... rollback` say which bundle,
`... backfill` loads histories, `... make-key` makes an API key, `... profile` measures.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from contextlib import ExitStack
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

from redis.exceptions import AuthenticationError
from tqdm import tqdm

from contract.bundle import read_manifest
from contract.errors import ContractError
from contract.history_log import HistoryLog
from service.api_keys import ApiKeysError, Role, described, make_key, read_keys
from service.backfill import backfill, blocking_client
from service.descriptors import max_connections
from service.errors import ServiceError
from service.experiment import ExperimentError
from service.listening import bind, refuse_open_doors
from service.logs import configure
from service.pointer import bundle_in_force, publish, rollback
from service.redis_url import PasswordFile
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
    except (ApiKeysError, ContractError, ExperimentError, SettingsError, ServiceError) as error:
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
        raise SettingsError("tracing: otel needs the extra `otel`: pip install '.[otel]'")
    refuse_open_doors(settings)
    configure(
        level=settings.log_level,
        style=settings.log_format,
        personal_data=settings.log_personal_data,
    )
    # What cannot be served is found out before there are processes.
    read_titles(settings.titles)
    max_connections(settings)
    _read_password_file(settings)
    if settings.api_keys is not None:
        read_keys(settings.api_keys)
    wanted = read_wanted(settings)
    listeners = bind(settings)
    with ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener)
        folder = stack.enter_context(TemporaryDirectory(prefix="mneme-metrics-"))
        # Of `service.metrics`, and read when that is imported: here, and in each worker.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        from service.supervisor import RefusedError, Supervisor

        admin = ""
        if settings.admin_port is not None:
            admin = f", metrics and admin at http://{settings.admin_host}:{settings.admin_port}"

        def announce(url: str) -> None:
            try:
                print(f"serving {', '.join(wanted.versions)} at {url}{admin}", flush=True)
            except OSError:  # nobody reads it, which is no reason not to serve
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

        async def supervise() -> int:
            supervisor = Supervisor(settings, listeners, folder=Path(folder))
            return await supervisor.run(wanted, announce=announce)

        try:
            return asyncio.run(supervise())
        except RefusedError as error:
            raise SettingsError(str(error)) from error


def _read_password_file(settings: Settings) -> None:
    """Refuse a file that is not there at once; later, a connection without it only fails."""
    path = settings.redis_password_file
    if path is not None:
        try:
            PasswordFile(path, None).get_credentials()
        except AuthenticationError as error:
            raise SettingsError(f"redis_password_file: {path}: {error}") from error


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
    add_flags(parser, ["bundle", "experiments", "redis_url", "redis_password_file", "key_prefix"])
    flags = vars(parser.parse_args(arguments))
    log = HistoryLog(flags.pop("log"))
    settings: Settings = read_settings(flags)
    _read_password_file(settings)
    arms = wanted_experiment(settings).arms.values()
    keep = max(
        arm.history_length or read_manifest(arm.bundle).features.history_length for arm in arms
    )
    with (
        blocking_client(
            settings.redis_url,
            timeout_s=_BACKFILL_TIMEOUT_S,
            password_file=settings.redis_password_file,
        ) as redis,
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
    add_flags(
        parser,
        ["bundle", "redis_url", "redis_password_file", "key_prefix", "provider", "threads"],
    )
    options = vars(parser.parse_args(arguments))
    batches, candidates, lengths = (
        options.pop(axis) for axis in ("batches", "candidates", "lengths")
    )
    users, seconds = options.pop("users"), options.pop("seconds")
    settings: Settings = read_settings(options)
    if settings.bundle is None:
        raise SettingsError("profile measures one model: name its --bundle")
    # What serves is loaded where it serves, and not by whoever supervises it.
    from service.history import HistoryStore
    from service.model import OnnxModel
    from service.profile import profile, shapes_of
    from service.redis_nodes import connect

    shapes = shapes_of(batches, candidates, lengths)
    bundle = bundle_in_force(settings.bundle)
    model = OnnxModel(bundle, provider=settings.provider, threads=settings.threads)

    async def measure() -> "list[ShapeProfile]":
        store = HistoryStore(
            connect(
                settings.redis_url,
                timeout_s=_BACKFILL_TIMEOUT_S,
                password_file=settings.redis_password_file,
            ),
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


def _make_key(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service make-key",
        description="Print a new API key, once, and the lines that let the file of keys know it.",
    )
    parser.add_argument("name", help="by which metrics and logs call it")
    parser.add_argument("--roles", nargs="+", choices=get_args(Role), required=True)
    parser.add_argument("--expires", type=date.fromisoformat, help="its first day without use")
    parser.add_argument("--requests-per-s", type=float, help="of all workers together")
    parser.add_argument("--burst", type=int, help="requests that may come at once")
    options = vars(parser.parse_args(arguments))
    key = make_key()
    lines = described(options.pop("name"), key, **options)
    print(f"{key}\n\n# The key stands nowhere else. To the file of keys add:\n{lines}", end="")
    return 0


_COMMANDS = {
    "publish": _publish,
    "rollback": _rollback,
    "backfill": _backfill,
    "make-key": _make_key,
    "profile": _profile,
}


if __name__ == "__main__":
    # As the first process of a container it would not hear what it has no handler for; from
    # elsewhere, it would leave its folder behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Where the parent ignored it, nobody could wait for a process.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit(main())
