"""Trains the runs of docs/results/click.md: click models on several data sets, and variants.

    python -m tests.benchmarks.click_models DATA FOLDER [--data kuairand books] [--seeds 1 2 3]

DATA holds ml1m.parquet, amazon_books2014_1m.parquet, kuairand_pure_impressions.parquet and
kuairand_pure_history50.parquet; the synthetic world is made. Prepared logs go to FOLDER/logs, runs
to FOLDER/runs, where those that were stopped go on and finished ones stay. `--full` trains without
a limit of time, as a GPU can. The pages are then made by

    python -m training compare-clicks FOLDER/runs/* --log kuairand=FOLDER/logs/kuairand ... \
        --page docs/results/click.md --html docs/results/click.html --costs
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from loadtest.world import WorldSettings, make_world, write_log
from training.__main__ import NAMED_RUNS
from training.config import RunConfig, load_config
from training.data.log import PreparedLog
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource
from training.distributed import Worker
from training.trainer import train

MODELS = (
    "youtube-dnn",
    "din",
    "dien",
    "sasrec",
    "mimn",
    "ubr4ctr",
    "imn-2p",
    "imn-3p",
    "imn-3p-plus",
)
# Steps of a recurrence over 1,000 behaviors are for a GPU, and so is a second table of MovieLens.
_FAST_MODELS = ("youtube-dnn", "din", "imn-3p-plus")
_FAST_DATA = ("world", "ml1m_positives")
ABLATIONS = (
    "model.attention=none",
    "model.attention=dot",
    "model.weights=softmax",
    "model.distance=false",
    "model.walk=target",
    "model.cross=delayed",
    "model.segment=20",
)
_DEPTHS = (1, 4, 5, 6)
_LENGTHS = {
    "kuairand": (25, 50),
    "books": (50, 200, 500, 1000),
    "world": (50, 200, 500),
}
WORLD = WorldSettings(
    users=30_000,
    items=400,
    topics=10,
    targets=4,
    visits=1,
    targets_per_visit=4,
    history_length=1000,
)


# Settings that all runs of a data set share, chosen by validation.
COMMON: dict[str, tuple[str, ...]] = {
    "kuairand": (),
    "books": ("train.max_epochs=15",),
    "ml1m": ("features.history_length=50", "train.learning_rate=3e-4"),
    "ml1m_positives": ("features.history_length=50", "train.max_epochs=15"),
    "world": (
        "features.history_length=1000",
        "train.batch_size=32",
        "train.learning_rate=2e-3",
        "train.weight_decay=0.0",
        "train.patience=3",
        "train.max_epochs=40",
    ),
}
_LIMITS_S = {"kuairand": 240, "books": 600, "ml1m": 300, "ml1m_positives": 300, "world": 1300}


@dataclass(frozen=True)
class Experiment:
    """One run: of which data, from which run file, with which settings beside COMMON's."""

    data: str
    model: str
    varied: tuple[str, ...]

    def name(self, seed: int) -> str:
        """Return "books-din", with what is varied, and the seed unless it is 1."""
        words = [one.rpartition(".")[2].replace("=", "-") for one in self.varied]
        words = [f"{self.data}-{self.model}", *words, *([f"seed-{seed}"] if seed != 1 else [])]
        return "-".join(words).replace('["', "").replace('"]', "")

    def config(self, seed: int, *, full: bool) -> RunConfig:
        """Return the settings of the run; a `full` one has no limit of time."""
        limit = () if full else (f"train.max_train_s={_LIMITS_S[self.data]}",)
        return load_config(
            NAMED_RUNS / f"click-{self.model}.toml",
            (*COMMON[self.data], *self.varied, *limit, f"train.seed={seed}"),
        )


def main() -> None:
    """Prepare and train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="DATA")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs="+", choices=COMMON, default=list(COMMON))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--full", action="store_true", help="no limit of time, all models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    worker = Worker(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for data in options.data:
        log = open_log(data, options.source, options.folder / "logs")
        for experiment in experiments(data, full=options.full):
            for seed in options.seeds:
                folder = options.folder / "runs" / experiment.name(seed)
                config = experiment.config(seed, full=options.full)
                trained = train(config, log, folder, worker, resume=True)
                print(f"{folder.name:40s} test AUC {trained.metrics['auc']:.4f}", flush=True)


def experiments(data: str, *, full: bool) -> Iterator[Experiment]:
    """Yield the runs on one data set."""

    def one(model: str, *varied: str) -> Experiment:
        return Experiment(data, model, varied)

    for model in MODELS:
        if data not in _FAST_DATA or full or model in _FAST_MODELS:
            yield one(model)
    if data == "kuairand" or full:
        for ablation in ABLATIONS:
            yield one("imn-3p", ablation)
        for depth in _DEPTHS:
            yield one("imn-3p", f"model.iterations={depth}")
    if data == "kuairand":
        for model in ("youtube-dnn", "imn-3p"):
            yield one(model, 'model.item_features=["category"]')
    if data in ("kuairand", "world") or full:
        for length in _LENGTHS.get(data, ()):
            for model in ("youtube-dnn", "din", "imn-3p-plus" if data == "world" else "imn-3p"):
                yield one(model, f"features.history_length={length}")


def open_log(data: str, source: Path, folder: Path) -> PreparedLog:
    """Prepare a log, if that is not done yet, and open it."""
    target = folder / data
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        match data:
            case "world":
                path = folder / "world.parquet"
                write_log(make_world(WORLD), WORLD, path)
                prepare(LogSource(path=path), target, PrepareOptions())
                path.unlink()
            case "kuairand":
                # One item has number 0, which is no id: 11 rows.
                prepare(
                    LogSource(
                        path=source / "kuairand_pure_impressions.parquet",
                        columns={"order": "time_ms"},
                    ),
                    target,
                    PrepareOptions(drop_invalid=True),
                    history=LogSource(
                        path=source / "kuairand_pure_history50.parquet", columns={"order": "pos"}
                    ),
                )
            case "ml1m":
                path = source / "ml1m.parquet"
                prepare(
                    LogSource(path=path, columns={"order": "sasrec_pos"}), target, PrepareOptions()
                )
            case "ml1m_positives":
                path = folder / "ml1m_positives.parquet"
                # Without labels: a behavior is a sample, beside others that are drawn.
                columns = ("user_id", "item_id", "timestamp", "category", "sasrec_pos")
                liked = pl.read_parquet(source / "ml1m.parquet").filter(pl.col("rating") >= 4)
                liked.select(columns).write_parquet(path)
                prepare(
                    LogSource(path=path, columns={"order": "sasrec_pos"}), target, PrepareOptions()
                )
                path.unlink()
            case "books":
                path = source / "amazon_books2014_1m.parquet"
                prepare(LogSource(path=path), target, PrepareOptions())
    return PreparedLog(target)


if __name__ == "__main__":
    main()
