"""`python -m service` serves a bundle; `python -m service backfill LOG` loads histories."""

import argparse
import sys
from pathlib import Path

import uvicorn
from redis import Redis
from tqdm import tqdm

from contract.bundle import read_manifest
from contract.errors import ContractError
from contract.history_log import HistoryLog
from service.app import create_app
from service.backfill import backfill
from service.errors import ServiceError
from service.model import OnnxModel
from service.settings import Settings, SettingsError, add_flags, read_settings

_BACKFILL_TIMEOUT_S = 30.0


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors of the user end in one clear line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["backfill"]:
            return _backfill(arguments[1:])
        return _serve(arguments)
    except (ContractError, SettingsError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _serve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    add_flags(parser)
    settings = read_settings(vars(parser.parse_args(arguments)))
    model = OnnxModel(settings.bundle, provider=settings.provider, threads=settings.threads)
    manifest = model.manifest
    print(f"serving {manifest.model_version} at http://{settings.host}:{settings.port}", flush=True)
    uvicorn.run(
        create_app(settings, model),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )
    return 0


def _backfill(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m service backfill", description=backfill.__doc__
    )
    parser.add_argument("log", type=Path, help="a prepared log")
    add_flags(parser, ["bundle", "redis_url", "key_prefix"])
    flags = vars(parser.parse_args(arguments))
    log = HistoryLog(flags.pop("log"))
    settings: Settings = read_settings(flags)
    keep = read_manifest(settings.bundle).features.history_length
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


if __name__ == "__main__":
    sys.exit(main())
