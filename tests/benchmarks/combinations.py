"""IMN 3P against IMN 1P and YouTube DNN in the synthetic world with combinations.

    python -m tests.benchmarks.combinations FOLDER [--seeds 1 2 3]

Trains each model once a seed (about 15 minutes for IMN 3P on one core) into FOLDER, where runs
that were stopped go on; prints test AUC, mean and spread, beside the world's ceiling.
"""

import argparse
import statistics
from pathlib import Path

import torch

from loadtest.machine import describe_machine
from loadtest.world import WorldSettings, make_world, write_log
from training.__main__ import NAMED_RUNS
from training.config import load_config
from training.data.log import PreparedLog
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource
from training.distributed import Worker
from training.trainer import train

WORLD = WorldSettings(users=16_000, history_length=150, memory=140, recipes=2)
MODELS = ("youtube-dnn", "imn-1p", "imn-3p")


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    log = _log(options.folder)
    print(f"{describe_machine()}\n{WORLD}")
    print(f"{'model':14s}{'AUC by seed':28s}{'mean':>8s}{'spread':>8s}{'ceiling':>9s}")
    for model in options.models:
        metrics = [_metrics(options.folder, log, model, seed) for seed in options.seeds]
        aucs = [one["auc"] for one in metrics]
        spread = statistics.stdev(aucs) if len(aucs) > 1 else float("nan")
        listed = " ".join(f"{auc:.4f}" for auc in aucs)
        print(
            f"{model:14s}{listed:28s}{statistics.mean(aucs):8.4f}{spread:8.4f}"
            f"{metrics[0]['ceiling_auc']:9.4f}",
            flush=True,
        )


def _log(folder: Path) -> PreparedLog:
    if not (folder / "log").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_log(make_world(WORLD), WORLD, folder / "world.parquet")
        prepare(LogSource(path=folder / "world.parquet"), folder / "log", PrepareOptions())
    return PreparedLog(folder / "log")


def _metrics(folder: Path, log: PreparedLog, model: str, seed: int) -> dict[str, float]:
    config = load_config(NAMED_RUNS / f"world-{model}.toml", (f"train.seed={seed}",))
    worker = Worker(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return train(config, log, folder / f"{model}-{seed}", worker, resume=True).metrics


if __name__ == "__main__":
    main()
