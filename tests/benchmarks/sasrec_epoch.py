"""Seconds of a training epoch of SASRec, beside pmixer/SASRec.pytorch's for the same work.

python -m tests.benchmarks.sasrec_epoch ML1M.parquet CHECKOUT_OF_SASREC_PYTORCH

Both train on the newest 200 behaviors of every user, all positions, BCE with one negative, 128 rows
a batch, width 50, two blocks, one head, dropout 0.2, on the same interactions in the same order and
on all cores: in turns, each in a process of its own, first epoch left out.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import torch

from loadtest.results import table, write_section
from training.config import load_config
from training.data.log import PreparedLog
from training.tasks import open_task

_MODULE = "tests.benchmarks.sasrec_epoch"
_ROUNDS = 3
_EPOCHS = 2
_EPOCH_STARTS = re.compile(r"loss in epoch (\d+) iteration 0:")
_RUN = """
name = "epoch"
features = { history_length = 200 }
data = { split = "leave-one-out", unknown_rate = 0.0 }
next_item = { loss = "bce", n_negatives = 1 }
model = { name = "sasrec", embedding_dim = 50, heads = 1, ffn_units = 50 }
train = { batch_size = 128, adam_beta2 = 0.98 }
"""


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path, help="MovieLens-1M, with sasrec_pos")
    parser.add_argument("peer", type=Path, help="a checkout of pmixer/SASRec.pytorch")
    parser.add_argument("--page", type=Path, default=Path("docs/results/sasrec_epoch.md"))
    options = parser.parse_args()
    ours_s, peer_s = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(options.log, folder)
        for _ in range(_ROUNDS):
            ours_s.append(_time_ours(folder))
            peer_s.append(_time_peer(options.peer / "python" / "main.py", folder))
            print(f"Mneme {ours_s[-1]:.1f} s, pmixer/SASRec.pytorch {peer_s[-1]:.1f} s", flush=True)
    ours, peer = statistics.median(ours_s), statistics.median(peer_s)
    rows = [
        (name, f"{statistics.median(seconds):.1f}", " ".join(f"{s:.1f}" for s in seconds))
        for name, seconds in (("Mneme", ours_s), ("pmixer/SASRec.pytorch", peer_s))
    ]
    intro = (__doc__ or "").split("\n\n")[-1]
    write_section(
        options.page,
        title="An epoch of SASRec",
        command="python -m tests.benchmarks.sasrec_epoch ml1m.parquet SASRec.pytorch",
        text=f"{intro}\n\n{table(('', 'seconds an epoch, median', 'rounds'), rows)}",
        figures={
            "sasrec_epoch_s": ours,
            "sasrec_epoch_peer_s": peer,
            "sasrec_epoch_peer_over_ours": peer / ours,
        },
    )


def _prepare(log: Path, folder: Path) -> None:
    """Write the log for both: prepared, and as the peer's lines of user and item."""
    command = ["training", "prepare", str(log), str(folder / "log")]
    options = ["--behaviors", "all", "--column", "order=sasrec_pos"]
    subprocess.run([sys.executable, "-m", *command, *options], check=True)
    (folder / "run.toml").write_text(_RUN)
    (folder / "data").mkdir()
    rows = pl.read_parquet(log).sort("sasrec_user_id", "sasrec_pos")
    rows.select("sasrec_user_id", "sasrec_item_id").write_csv(
        folder / "data" / "ml1m.txt", separator=" ", include_header=False
    )


def _time_ours(folder: Path) -> float:
    program = f"from {_MODULE} import time_epochs; time_epochs({str(folder)!r})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def time_epochs(folder: str) -> None:
    """Print the seconds of an epoch."""
    config = load_config(Path(folder) / "run.toml")
    task = open_task(PreparedLog(Path(folder) / "log"), config)
    optimizer = torch.optim.Adam(task.model.parameters(), betas=(0.9, config.train.adam_beta2))
    starts_s = []
    for epoch in range(1 + _EPOCHS):
        starts_s.append(time.perf_counter())
        for batch in task.batches(epoch, first_batch=0, rank=0, world_size=1):
            optimizer.zero_grad()
            task.loss(task.model.train(), batch, torch.device("cpu")).backward()
            optimizer.step()
    print((time.perf_counter() - starts_s[1]) / _EPOCHS)


def _time_peer(program: Path, folder: Path) -> float:
    # Its first line of an epoch is written after one step of it, in every epoch alike.
    settings = ["--dataset=ml1m", "--train_dir=run", "--device=cpu", f"--num_epochs={_EPOCHS + 2}"]
    command = [sys.executable, "-u", str(program.resolve()), *settings]
    starts_s = {}
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := _EPOCH_STARTS.match(line):
                starts_s[int(found[1])] = time.perf_counter()
            if len(starts_s) == _EPOCHS + 2:
                os.killpg(process.pid, signal.SIGKILL)  # it has processes that draw samples
                break
    if len(starts_s) < _EPOCHS + 2:
        raise SystemExit(f"{program} ended early: is it a checkout of SASRec.pytorch?")
    return (starts_s[_EPOCHS + 2] - starts_s[2]) / _EPOCHS


if __name__ == "__main__":
    main()
