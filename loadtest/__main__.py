"""`python -m loadtest`: a synthetic world and its people, the demo, load, and measurements."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

from contract.errors import ContractError
from loadtest import rate, replay
from loadtest.ab import report, simulation
from loadtest.benchmarks import ab, honesty, http_rate, overhead, overload, race
from loadtest.benchmarks.engine import run_engine, run_growth, run_length
from loadtest.benchmarks.stand import StandError
from loadtest.bundles import BundleError
from loadtest.chaos import command, reloads, soak
from loadtest.chaos.errors import ChaosError
from loadtest.demo import CASTS, DemoError, DemoOptions, run_demo
from loadtest.open_loop import LoadError
from loadtest.peers.install import PEERS
from loadtest.redis_server import RedisServerError
from loadtest.world import WorldSettings, make_world, write_log

_ERRORS = (
    *(BundleError, ChaosError, DemoError, LoadError, RedisServerError, StandError),
    *(ContractError, ValueError, OSError),
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors of the user end in one clear line."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except _ERRORS as error:
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
    one.add_argument("--model", choices=sorted(CASTS), default="imn", help="which is served")
    one.add_argument("--folder", type=Path, default=Path("demo"), help="where all files go")
    one.add_argument("--once", action="store_true", help="end after the scores")
    one.add_argument(
        "--port", type=int, default=0, help="of the service; any free one unless given"
    )
    one.set_defaults(run=_demo)
    for name, description, measure in _BENCHMARKS:
        one = commands.add_parser(name, help=description)
        one.add_argument(
            "--folder", type=Path, default=Path("bundles/benchmarks"), help="where bundles are made"
        )
        one.add_argument(
            "--page",
            type=Path,
            default=Path("docs/results/performance.md"),
            help="where the section is written, with its figures beside it as .json",
        )
        if name in ("overhead", "peers"):
            names = [peer.name for peer in PEERS]
            one.add_argument("--peers", nargs="*", choices=names, default=names)
        if name == "peers":
            graphs = ("rearranged", "literal")
            one.add_argument("--graphs", nargs="+", choices=graphs, default=graphs)
        if name == "http":
            one.add_argument("--workers", type=int, default=1, help="processes that serve")
            one.add_argument("--rate", type=float, default=1500.0, help="requests/s")
        if name in ("engine", "length", "http"):
            one.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
        one.set_defaults(run=_benchmark, measure=measure)
    for module in (rate, replay, simulation, report, ab, honesty, command, reloads, soak):
        module.add_command(commands)
    return parser


_BENCHMARKS: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("engine", "the scorer in process, over batch, candidates, length and model", run_engine),
    ("overhead", "everything but the model, beside other servers", overhead.run),
    ("peers", "the highest rate within the deadline, beside other servers", race.run),
    ("overload", "goodput up to three times the capacity", overload.run),
    ("length", "latency and memory over the history length", run_length),
    ("http", "one rate, and the highest within the deadline; for a GPU", http_rate.run),
    ("growth", "memory over 100,000 requests", run_growth),
)


def _benchmark(options: argparse.Namespace) -> int:
    chosen = {
        name: value for name, value in vars(options).items() if name not in ("run", "measure")
    }
    options.measure(**chosen)
    return 0


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
        DemoOptions(
            log=options.data,
            model=options.model,
            folder=options.folder,
            once=options.once,
            port=options.port,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
