"""`python -m service` serves, `... backfill` loads histories, `... profile` measures."""

import argparse
import asyncio
import json
import os
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import uvicorn
from fastapi import FastAPI
from redis import Redis
from tqdm import tqdm

from contract.bundle import read_manifest
from contract.errors import ContractError
from contract.history_log import HistoryLog
from service.app import create_app
from service.backfill import backfill
from service.connections import limited_protocol
from service.descriptors import max_connections
from service.errors import ServiceError
from service.experiment import Experiment, ExperimentError, read_experiment
from service.history import HistoryStore, connect
from service.logs import configure
from service.metrics import FOLDER_VARIABLE
from service.model import Model, OnnxModel
from service.profile import ShapeProfile, profile, shapes_of
from service.settings import (
    Settings,
    SettingsError,
    add_flags,
    read_settings,
    write_settings,
)
from service.titles import read_titles

_BACKFILL_TIMEOUT_S = 30.0


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors of the user end in one clear line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["backfill"]:
            return _backfill(arguments[1:])
        if arguments[:1] == ["profile"]:
            return _profile(arguments[1:])
        return _serve(arguments)
    except (ContractError, ExperimentError, SettingsError, ServiceError) as error:
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
    _configure_logs(settings)
    # With several workers this is a rehearsal: what refuses to start must not start again and
    # again in each of them.
    read_titles(settings.titles)
    max_connections(settings)
    bundles = {arm.bundle for arm in _experiment(settings).arms.values()}
    opened = {bundle: _open_model(settings, bundle) for bundle in sorted(bundles)}
    versions = ", ".join(model.manifest.model_version for model in opened.values())
    print(f"serving {versions} at http://{settings.host}:{settings.port}", flush=True)
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


def _experiment(settings: Settings) -> Experiment:
    if settings.bundle is not None:
        return Experiment.of_bundle(settings.bundle)
    assert settings.experiments is not None, "the settings name one or the other"
    return read_experiment(settings.experiments)


def _open_model(settings: Settings, bundle: Path) -> Model:
    return OnnxModel(bundle, provider=settings.provider, threads=settings.threads)


def _listen(settings: Settings, app: FastAPI | str) -> None:
    uvicorn.run(
        app,
        factory=isinstance(app, str),
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        loop="uvloop",
        http=limited_protocol(settings),
        ws="none",
        log_config=None,  # the root's handler writes what the server says
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


def _backfill(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service backfill", description=backfill.__doc__
    )
    parser.add_argument("log", type=Path, help="a prepared log")
    add_flags(parser, ["bundle", "experiments", "redis_url", "key_prefix"])
    flags = vars(parser.parse_args(arguments))
    log = HistoryLog(flags.pop("log"))
    settings: Settings = read_settings(flags)
    arms = _experiment(settings).arms.values()
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
    shapes = shapes_of(*(options.pop(axis) for axis in ("batches", "candidates", "lengths")))
    users, seconds = options.pop("users"), options.pop("seconds")
    settings: Settings = read_settings(options)
    if settings.bundle is None:
        raise SettingsError("profile measures one model: name its --bundle")
    model = _open_model(settings, settings.bundle)

    async def measure() -> list[ShapeProfile]:
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


if __name__ == "__main__":
    sys.exit(main())
