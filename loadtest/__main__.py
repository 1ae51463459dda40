"""`python -m loadtest world | demo`."""

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path

from contract.errors import ContractError
from loadtest.demo import DemoError, DemoOptions, run_demo
from loadtest.redis_server import RedisServerError
from loadtest.world import WorldSettings, make_world, write_log


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors of the user end in one clear line."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (DemoError, RedisServerError, ContractError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ended")
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("world", help="a synthetic behavior log with known probabilities")
    one.add_argument("log", type=Path, help="Parquet file to write; the world goes beside it")
    for setting in fields(WorldSettings):
        assert setting.default is not MISSING
        flag = f"--{setting.name.replace('_', '-')}"
        one.add_argument(flag, type=int, default=setting.default, help="default %(default)s")
    one.set_defaults(run=_world)

    one = commands.add_parser("demo", help="a log becomes scores over HTTP, in one command")
    one.add_argument("--data", type=Path, help="a behavior log; a synthetic one unless given")
    one.add_argument("--folder", type=Path, default=Path("demo"), help="where all files go")
    one.add_argument("--once", action="store_true", help="end after the scores")
    one.add_argument(
        "--port", type=int, default=0, help="of the service; any free one unless given"
    )
    one.set_defaults(run=_demo)
    return parser


def _world(options: argparse.Namespace) -> int:
    settings = WorldSettings(
        **{setting.name: getattr(options, setting.name) for setting in fields(WorldSettings)}
    )
    world = make_world(settings)
    world_path = options.log.with_suffix(".world.npz")
    world.save(world_path)
    n_rows = write_log(world, settings, options.log)
    print(f"{options.log}: {n_rows:,} rows of {settings.users:,} people; the world: {world_path}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    run_demo(
        DemoOptions(log=options.data, folder=options.folder, once=options.once, port=options.port)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
