"""The sample loader alone against the training step that it feeds, in one run.

python -m tests.benchmarks.loader
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from loadtest.machine import describe_machine
from loadtest.world import WorldSettings, make_world, write_log
from training.config import parse_config
from training.data.log import PreparedLog
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource
from training.tasks import open_task

_BATCHES = 8
_SHAPES = ((64, 1000), (256, 200))


def main() -> None:
    """Print one row a shape."""
    print(f"{describe_machine()}, IMN 3P, 8 candidates a moment")
    print(f"{'B':>5}{'L':>6}{'loader ms/batch':>17}{'step ms/batch':>15}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for batch_size, length in _SHAPES:
            _row(Path(folder) / str(length), batch_size, length)


def _row(folder: Path, batch_size: int, length: int) -> None:
    folder.mkdir()
    settings = WorldSettings(users=1000, history_length=length, memory=length - 20)
    write_log(make_world(settings), settings, folder / "world.parquet")
    prepare(LogSource(path=folder / "world.parquet"), folder / "log", PrepareOptions())
    config = parse_config(
        {
            "name": "loader",
            "features": {"history_length": length},
            "model": {"name": "imn"},
            "train": {"batch_size": batch_size},
        },
        "benchmark",
    )
    task = open_task(PreparedLog(folder / "log"), config)
    optimizer = torch.optim.Adam(task.model.parameters())
    batches = task.batches(0, first_batch=0, rank=0, world_size=1)
    next(batches)  # the order of the epoch is drawn once
    loading_s, stepping_s = [], []
    for _ in range(_BATCHES):
        started = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        optimizer.zero_grad()
        task.loss(task.model, batch, torch.device("cpu")).backward()
        optimizer.step()
        loading_s.append(loaded - started)
        stepping_s.append(time.perf_counter() - loaded)
    load_ms, step_ms = (1000 * statistics.median(taken) for taken in (loading_s, stepping_s))
    print(f"{batch_size:5}{length:6}{load_ms:17.1f}{step_ms:15.1f}{step_ms / load_ms:8.1f}")


if __name__ == "__main__":
    main()
