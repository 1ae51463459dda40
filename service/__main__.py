"""`python -m service` serves; `... backfill`, `... profile` and `... make-key` are beside it:
they load histories, measure, and make an API key.
"""

import argparse
import asyncio
import json
import os
import sys
from contextlib import suppress
from datetime import date
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import uvicorn
from fastapi import FastAPI
from redis.exceptions import AuthenticationError
from tqdm import tqdm
from uvicorn.supervisors import Multiprocess

from contract.bundle import read_manifest
from contract.errors import ContractError
from contract.history_log import HistoryLog
from service.api_keys import ApiKeysError, Role, described, make_key, read_keys
from service.app import create_app
from service.backfill import backfill, blocking_client
from service.connections import limited_protocol
from service.descriptors import max_connections
from service.errors import ServiceError
from service.experiment import Experiment, ExperimentError, read_experiment
from service.history import HistoryStore
from service.listening import bind, refuse_open_doors
from service.logs import configure
from service.metrics import FOLDER_VARIABLE
from service.model import Model, OnnxModel
from service.profile import ShapeProfile, profile, shapes_of
from service.redis_nodes import connect
from service.redis_url import PasswordFile
from service.settings import (
    Settings,
    SettingsError,
    add_flags,
    read_settings,
    write_settings,
)
from service.titles import read_titles

_BACKFILL_TIMEOUT_S = 30.0
_STARTUP_FAILURE = 3  # uvicorn's number


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors of the user end in one clear line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["backfill"]:
            return _backfill(arguments[1:])
        if arguments[:1] == ["profile"]:
            return _profile(arguments[1:])
        if arguments[:1] == ["make-key"]:
            return _make_key(arguments[1:])
        return _serve(arguments)
    except (ApiKeysError, ContractError, ExperimentError, SettingsError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _serve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    add_flags(parser)
    settings = read_settings(vars(parser.parse_args(arguments)))
    missing = [name for name in ("uvloop", "httptools") if find_spec(name) is None]
    if missing:
        raise SettingsError(f"{' and '.join(missing)} must be installed: without, it is too slow")
    if settings.tracing == "otel":
        try:
            import_module("service.tracing")
        except ModuleNotFoundError as error:
            raise SettingsError("tracing: otel needs the extra `otel`: mneme[otel]") from error
    refuse_open_doors(settings)
    _read_password_file(settings)
    _configure_logs(settings)
    # With several workers this is a rehearsal: what refuses to start must not start again and
    # again in each of them.
    read_titles(settings.titles)
    max_connections(settings)
    if settings.api_keys is not None:
        read_keys(settings.api_keys)
    bundles = {arm.bundle for arm in _experiment(settings).arms.values()}
    opened = {bundle: _open_model(settings, bundle) for bundle in sorted(bundles)}
    versions = ", ".join(model.manifest.model_version for model in opened.values())
    admin = ""
    if settings.admin_port is not None:
        admin = f", metrics and admin at http://{settings.admin_host}:{settings.admin_port}"
    print(f"serving {versions} at http://{settings.host}:{settings.port}{admin}", flush=True)
    if settings.workers == 1:

        def open_model(bundle: Path) -> Model:
            return opened.pop(bundle, None) or _open_model(settings, bundle)

        _listen(settings, create_app(settings, open_model))
        return 0
    opened.clear()
    with TemporaryDirectory(prefix="mneme-metrics-") as folder:
        # Workers are new processes: they read all of it when they begin.
        os.environ.update(write_settings(settings))
        os.environ[FOLDER_VARIABLE] = folder
        _listen(settings, "service.__main__:worker_app")
    return 0


def worker_app() -> FastAPI:
    """Return the application of one of several workers, by the settings in the environment."""
    settings = read_settings({})
    _configure_logs(settings)
    return create_app(settings, partial(_open_model, settings))


def _configure_logs(settings: Settings) -> None:
    configure(
        level=settings.log_level,
        style=settings.log_format,
        personal_data=settings.log_personal_data,
    )


def _read_password_file(settings: Settings) -> None:
    """Refuse a file that is not there at once; later, a connection without it only fails."""
    path = settings.redis_password_file
    if path is not None:
        try:
            PasswordFile(path, None).get_credentials()
        except AuthenticationError as error:
            raise SettingsError(f"redis_password_file: {path}: {error}") from error


def _experiment(settings: Settings) -> Experiment:
    if settings.bundle is not None:
        return Experiment.of_bundle(settings.bundle)
    assert settings.experiments is not None, "the settings name one or the other"
    return read_experiment(settings.experiments)


def _open_model(settings: Settings, bundle: Path) -> Model:
    return OnnxModel(bundle, provider=settings.provider, threads=settings.threads)


def _listen(settings: Settings, app: FastAPI | str) -> None:
    sockets = bind(settings)
    config = uvicorn.Config(
        app,
        factory=isinstance(app, str),
        workers=settings.workers,
        loop="uvloop",
        http=limited_protocol(settings),
        ws="none",
        log_config=None,  # the root's handler writes what the server says
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    with suppress(KeyboardInterrupt):
        if settings.workers > 1:
            Multiprocess(config, sockets=sockets).run()
            return
        server = uvicorn.Server(config)
        server.run(sockets=sockets)
        if not server.started:
            sys.exit(_STARTUP_FAILURE)


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
    arms = _experiment(settings).arms.values()
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
    shapes = shapes_of(*(options.pop(axis) for axis in ("batches", "candidates", "lengths")))
    users, seconds = options.pop("users"), options.pop("seconds")
    settings: Settings = read_settings(options)
    if settings.bundle is None:
        raise SettingsError("profile measures one model: name its --bundle")
    model = _open_model(settings, settings.bundle)

    async def measure() -> list[ShapeProfile]:
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


if __name__ == "__main__":
    sys.exit(main())
