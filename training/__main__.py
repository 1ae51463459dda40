"""`python -m training prepare | train | evaluate | autoregress | compare | compare-clicks`."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from contract.errors import ContractError
from training.autoregression import autoregress
from training.checkpoint import TrainedModel, load_model
from training.comparison.click_page import write_click_comparison
from training.comparison.next_item_page import write_comparison
from training.config import RunConfig, load_config
from training.data.log import PreparedLog
from training.data.next_item_data import open_next_item_data
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import FORMATS, LogSource
from training.data.splits import Part
from training.distributed import join_workers
from training.errors import ConfigError, TrainingError
from training.models.next_item import NextItemModel
from training.tasks import open_task
from training.trainer import MODEL, train

NAMED_RUNS = Path(__file__).parent / "runs"
_SHOWN = ("ndcg10", "hr10")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code. Errors of the user end in one clear line, and output
    that nobody reads any more (`| head`) in none.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        # What is still buffered is to fail here, not in the interpreter's own last flush.
        sys.stdout.flush()
    except (TrainingError, ContractError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _discard_output()
        return 1  # as Python itself ends on EPIPE
    return code


def _discard_output() -> None:
    """Let what is written from here on, at the interpreter's end too, meet no broken pipe."""
    with Path(os.devnull).open("wb") as nothing:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nothing.fileno(), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("prepare", help="a behavior log to a prepared log")
    one.add_argument("log", type=Path, help="ratings.dat, a CSV, a Parquet file or folder")
    one.add_argument("target", type=Path, help="folder to write; must not exist")
    one.add_argument("--format", choices=FORMATS, help="of the log, guessed unless said")
    one.add_argument("--min-interactions", type=int, default=1, metavar="K", help="k of the k-core")
    one.add_argument(
        "--behaviors",
        choices=("positives", "all"),
        default="positives",
        help="rows of a labelled log that are behaviors",
    )
    one.add_argument("--label-threshold", type=float, default=4.0, help="MovieLens: a positive")
    one.add_argument("--time-unit", choices=("s", "ms"), default="s", help="of the timestamps")
    one.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="the log's name for user, item, time, label, category or order",
    )
    one.add_argument(
        "--item-feature",
        action="append",
        default=[],
        metavar="NAME[=COLUMN]",
        help="a further categorical feature of items, such as brand=brand_id",
    )
    one.add_argument("--drop-invalid", action="store_true", help="leave out rows without meaning")
    one.add_argument(
        "--history",
        type=Path,
        help="a second log, of what users did before; its rows need an order or a timestamp",
    )
    one.add_argument(
        "--history-column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="as --column, of the second log",
    )
    one.set_defaults(run=_prepare)

    one = commands.add_parser("train", help="a prepared log to a model")
    one.add_argument("config", help="a run file, or the name of one in training/runs")
    one.add_argument("log", type=Path, help="a prepared log")
    one.add_argument("run_folder", type=Path)
    one.add_argument("--resume", action="store_true", help="go on where the run was stopped")
    one.add_argument("--no-progress", action="store_true")
    one.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="replace one setting, such as train.seed=2",
    )
    one.set_defaults(run=_train)

    one = commands.add_parser("evaluate", help="metrics of a trained model on a part of a log")
    one.add_argument("model", type=Path, help="model.pt of a run folder")
    one.add_argument("log", type=Path, help="the prepared log it was trained on")
    one.add_argument("--part", choices=[part.name.lower() for part in Part], default="test")
    one.set_defaults(run=_evaluate)

    one = commands.add_parser("autoregress", help="rankings after a model's own predictions")
    one.add_argument("model", type=Path, help="model.pt of a run folder")
    one.add_argument("log", type=Path, help="the prepared log it was trained on")
    one.add_argument("--steps", type=int, default=5, help="at most the run's data.holdout_steps")
    one.set_defaults(run=_autoregress)

    one = commands.add_parser("compare", help="finished runs of next-item models to two pages")
    one.add_argument("--log", type=Path, required=True, help="the prepared log of all runs")
    one.add_argument("--data", default="ml1m", metavar="NAME", help="the log's name in figures")
    _add_comparison(one)
    one.set_defaults(run=_compare)

    one = commands.add_parser("compare-clicks", help="finished runs of click models to two pages")
    one.add_argument(
        "--log",
        action="append",
        required=True,
        dest="logs",
        metavar="NAME=FOLDER",
        help="a prepared log that runs were trained on, and its name in figures",
    )
    _add_comparison(one)
    one.set_defaults(run=_compare_clicks)
    return parser


def _add_comparison(one: argparse.ArgumentParser) -> None:
    one.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER")
    one.add_argument("--page", type=Path, required=True, help="Markdown; figures go beside it")
    one.add_argument("--html", type=Path, required=True, help="one page with plots")
    one.add_argument("--costs", action="store_true", help="time and memory over L; takes minutes")
    one.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of --costs, and of attention"
    )
    one.add_argument(
        "--cite", type=Path, nargs="*", default=[], help="twins of other pages: figures to repeat"
    )


def _prepare(options: argparse.Namespace) -> int:
    report = prepare(
        LogSource(
            path=options.log,
            format=options.format,
            columns=_pairs(options.column),
            item_features={
                name: column or name for name, column in _pairs(options.item_feature).items()
            },
            label_threshold=options.label_threshold,
            time_unit=options.time_unit,
        ),
        options.target,
        PrepareOptions(
            min_interactions=options.min_interactions,
            behaviors=options.behaviors,
            drop_invalid=options.drop_invalid,
        ),
        history=(
            LogSource(
                path=options.history,
                columns=_pairs(options.history_column),
                time_unit=options.time_unit,
            )
            if options.history is not None
            else None
        ),
    )
    header = report.header
    print(
        f"{options.target}: {header.n_users:,} users, {header.n_items:,} items, "
        f"{header.n_behaviors:,} behaviors, {header.n_impressions:,} labelled impressions"
        + (f"; {report.n_dropped:,} invalid rows left out" if report.n_dropped else "")
    )
    return 0


def _pairs(words: list[str]) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in words)


def _train(options: argparse.Namespace) -> int:
    config = _config(options.config, tuple(options.overrides))
    log = PreparedLog(options.log)
    with join_workers() as worker:
        trained = train(
            config,
            log,
            options.run_folder,
            worker,
            resume=options.resume,
            show_progress=not options.no_progress,
        )
        if worker.is_first:
            _print_metrics(f"{config.name}, test", trained.metrics)
            print(f"model: {options.run_folder / MODEL}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    trained, log = _model_with_log(options)
    task = open_task(log, trained.config)
    metrics = task.evaluate(
        trained.model, Part[options.part.upper()], torch.device("cpu"), trained.calibration
    )
    _print_metrics(f"{trained.config.name}, {options.part}", metrics)
    return 0


def _autoregress(options: argparse.Namespace) -> int:
    trained, log = _model_with_log(options)
    if not isinstance(trained.model, NextItemModel):
        raise ConfigError(f"{options.model}: {trained.config.model.name} predicts no next item")
    data = open_next_item_data(log, trained.config)
    steps = autoregress(trained.model, data, options.steps, torch.device("cpu"))
    print(f"{trained.config.name}, {len(data.held_out[Part.TEST]):,} users")
    print(f"{'':6}{'own predictions':>20}{'true behaviors':>20}")
    print(f"{'step':6}" + f"{'NDCG@10':>10}{'HR@10':>10}" * 2)
    for one in steps:
        figures = [form[name] for form in (one.fed_back, one.teacher_forced) for name in _SHOWN]
        print(f"{one.step:<6}" + "".join(f"{figure:10.4f}" for figure in figures))
    return 0


def _model_with_log(options: argparse.Namespace) -> tuple[TrainedModel, PreparedLog]:
    trained = load_model(options.model)
    log = PreparedLog(options.log)
    if log.header.fingerprint != trained.data_fingerprint:
        raise ConfigError(f"{options.model} was trained on another log than {options.log}")
    return trained, log


def _compare(options: argparse.Namespace) -> int:
    write_comparison(
        options.runs,
        PreparedLog(options.log),
        page=options.page,
        html=options.html,
        data=options.data,
        command=_command(options, "compare", "--log", _shown(options.log), "--data", options.data),
        costs=options.costs,
        cited=options.cite,
        device=torch.device(options.device),
    )
    print(f"{options.page}, {options.page.with_suffix('.json')}, {options.html}")
    return 0


def _compare_clicks(options: argparse.Namespace) -> int:
    folders: dict[str, Path] = {}
    for word in options.logs:
        name, _, folder = word.partition("=")
        if not name or not folder:
            raise ConfigError(f"--log {word}: expected NAME=FOLDER")
        if name in folders:
            raise ConfigError(f"--log {word}: {name} is {folders[name]} already")
        folders[name] = Path(folder)
    words = [word for name in folders for word in ("--log", f"{name}={_shown(folders[name])}")]
    write_click_comparison(
        options.runs,
        {name: PreparedLog(folder) for name, folder in folders.items()},
        page=options.page,
        html=options.html,
        command=_command(options, "compare-clicks", *words),
        costs=options.costs,
        cited=options.cite,
        device=torch.device(options.device),
    )
    print(f"{options.page}, {options.page.with_suffix('.json')}, {options.html}")
    return 0


def _command(options: argparse.Namespace, name: str, *logs: str) -> str:
    """Return the command as it is shown; `logs`: the words that tell which data there is."""
    words = ["python", "-m", "training", name, *map(_shown, options.runs), *logs]
    words += ["--page", _shown(options.page), "--html", _shown(options.html)]
    if options.costs:
        words += ["--costs", "--device", options.device]
    if options.cite:
        words += ["--cite", *map(_shown, options.cite)]
    return shlex.join(words)


def _shown(path: Path) -> str:
    """Return a path, of an absolute one, which is a machine's own, the end."""
    return path.name if path.is_absolute() else str(path)


def _config(name: str, overrides: tuple[str, ...]) -> RunConfig:
    path = Path(name)
    if not path.suffix:
        path = NAMED_RUNS / f"{name}.toml"
        if not path.exists():
            known = ", ".join(sorted(run.stem for run in NAMED_RUNS.glob("*.toml")))
            raise ConfigError(f"no run named {name!r}; expected a .toml file or one of {known}")
    return load_config(path, overrides)


def _print_metrics(title: str, metrics: dict[str, float]) -> None:
    print(title)
    for name, value in metrics.items():
        print(f"  {name:40s}{value:{',.0f' if name == 'n_samples' else '.4f'}}")


if __name__ == "__main__":
    sys.exit(main())
